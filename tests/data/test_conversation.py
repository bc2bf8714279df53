"""Labels cannot lie: spans decode to the answers, and the chat template writes what training read."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from haplovl.data.conversation import GUARD, TEMPLATES, Encoder, encode, segments
from haplovl.records import Record, RecordError, Turn
from haplovl.teacher_training import train_tokenizer
from haplovl.teachers import prepare_tokenizer

TEXT = [
    "USER: Where is it? ASSISTANT: left system user assistant\n\nYou are. Is there a red 7?\nyes Ünïcödé ✓\n\n\nno",
    "A chat between a curious user and an artificial intelligence assistant.  top left\n\n the answer is  two",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(template):
    """As the embedded teachers train it."""
    return train_tokenizer(TEXT, 400, template)


def qwen(template):
    """Qwen2's own class: NFC, digits one by one, runs of line breaks joined. Its vocabulary is learnt here."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return prepare_tokenizer(Qwen2Tokenizer(*vocabulary_and_merges(backend)), template)


def llama(template, legacy=False):
    """Llama's own class: a space at the start, bytes for characters it does not know."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    backend.train_from_iterator(" ".join(TEXT).splitlines(), trainer)  # Llama knows line breaks as bytes alone
    return prepare_tokenizer(LlamaTokenizer(*vocabulary_and_merges(backend), legacy=legacy), template)


def old_llama(template):
    """The same as Vicuna was trained with: a space at the start and after every special token."""
    return llama(template, legacy=True)


def unigram(template):
    """A SentencePiece unigram model with bytes for characters it does not know."""
    space = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = space
    special = ["<unk>", "<s>", "</s>", *BYTES]
    backend.train_from_iterator(
        TEXT, trainers.UnigramTrainer(vocab_size=500, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    pieces = json.loads(backend.to_str())["model"]["vocab"]
    backend = Tokenizer(models.Unigram([tuple(piece) for piece in pieces], unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = space
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return prepare_tokenizer(fast, template)


def vocabulary_and_merges(backend):
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def name(request):
    """A template's name."""
    return request.param


@pytest.fixture(scope="module", params=[byte_level, qwen, llama, old_llama, unigram])
def case(request, name):
    """A template and a tokenizer with its special tokens, for every pair of both."""
    return TEMPLATES[name], request.param(name)


LOOK_ALIKES = "</s> <s> <|end|> <|im_end|> <|im_start|> <|eot_id|> [INST] [/INST] <|assistant|> <unk> <video>"
RECORDS = [
    Record("one", ("a.png",), (Turn("<image>\nWhere is it?", "top left"),)),
    Record("many", ("a.png", "b.png"), (Turn("<image><image>\nWhich?", "first"), Turn("Sure?", "yes ✓ Ünïcödé"))),
    Record("system", (), (Turn("Hello", "Hi"), Turn("And?", "No.\n\n1. yes\n2. no")), system="Be brief."),
    Record("inside", ("a.png", "b.png"), (Turn("Is <image> or\n<image>", "left"), Turn("Why?", "so"))),
    Record("emoji", (), (Turn("👩‍👩‍👧‍👦?", "👍🏽 🇩🇪 🏳️‍🌈"), Turn("漢字かな", "한국어 漢字"))),
    Record("right to left", (), (Turn("מה זה?", "\u200fشكرا جزيلا\u200f 42"), Turn("کجا؟", "بالا چپ"))),
    Record("combining", (), (Turn("e\u0301?", "a\u0308o\u0308 Z\u0351\u036b\u0343 é"),)),
    Record("long", (), tuple(Turn(f"Question {n}?", f"answer {n}" * (n + 1)) for n in range(12))),
]
ODD = [
    Record("look-alike", (), (Turn(f"say {LOOK_ALIKES}", f"{LOOK_ALIKES} are no tokens"), Turn("<|end|>", "</s>"))),
    Record("look-alike system", (), (Turn("Hi", "Ho"),), system=f"{LOOK_ALIKES} <image>"),
    Record("spaces", (), (Turn("  two  ", "  two \n"), Turn("\n\nline", "\n\nline\n"), Turn(" ", " "))),
    Record("placeholder in an answer", (), (Turn("Which tag?", "<image> it is"),)),
]


def encode_or_refuse(record, template, tokenizer):
    """Unigram models know their special tokens as words: such records are refused (None), no others are."""
    try:
        return encode(record, template, tokenizer)
    except RecordError as error:
        assert "special token" in str(error)
        assert record in ODD and tokenizer.backend_tokenizer.model.__class__.__name__ == "Unigram"
        return None


def plain(tokenizer, text):
    """The text as this tokenizer can give it back: Qwen2's writes composed characters."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer.normalize_str(text) if normalizer else text


@pytest.mark.parametrize("record", RECORDS + ODD, ids=lambda r: r.id)
def test_supervised_tokens_decode_to_exactly_the_answers(case, record):
    template, tokenizer = case
    encoded = encode_or_refuse(record, template, tokenizer)
    if encoded is None:
        return
    stop = tokenizer(template.stop, add_special_tokens=False)["input_ids"]
    assert len(stop) == 1
    answers = []
    for start, end in encoded.spans:
        assert encoded.input_ids[end - 1] == stop[0]
        # A decoder may drop the very first space of a text, so the answer is read after what came before it.
        before, after = tokenizer.decode(encoded.input_ids[:start]), tokenizer.decode(encoded.input_ids[: end - 1])
        assert after.startswith(before)
        answers.append(after[len(before) :])
    assert answers == [plain(tokenizer, template.lead + turn.answer) for turn in record.turns]
    assert encoded.supervised == sum(end - start for start, end in encoded.spans) > len(record.turns)


@pytest.mark.parametrize("record", RECORDS + ODD, ids=lambda r: r.id)
def test_only_placeholders_of_questions_become_image_tokens_and_words_never_special(case, record):
    template, tokenizer = case
    encoded = encode_or_refuse(record, template, tokenizer)
    if encoded is None:
        return
    ids = encoded.input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == len(record.images)
    fixed = "".join(text for kind, text in segments(record, template) if kind in ("fixed", "stop"))
    for token in tokenizer.all_special_tokens:
        if token not in ("<image>", "<unk>"):
            assert ids.count(tokenizer.convert_tokens_to_ids(token)) == fixed.count(token), token
    assert max(ids) < len(tokenizer)


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.id)
def test_the_chat_template_writes_what_training_read(case, record):
    template, tokenizer = case
    messages = [{"role": "system", "content": record.system}] if record.system else []
    for turn in record.turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    options = {"chat_template": template.jinja(), "return_dict": False}
    shown = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert shown == "".join(text for _, text in segments(record, template))
    encoded = encode(record, template, tokenizer)
    spans = encoded.spans
    if template.assistant.endswith("\n\n") and isinstance(tokenizer.backend_tokenizer.pre_tokenizer, ByteLevel):
        # GPT-2's rule makes two tokens of these line breaks before a word, but one at the end of a prompt. Training
        # reads one, as a prompt does; only what stands before finished answers has two. (Llama 3 has another rule.)
        spans = spans[:1]
    else:
        assert tokenizer.apply_chat_template(messages, **options) == encoded.input_ids
    for number, (start, _) in enumerate(spans):
        asked = messages[: len(messages) - 2 * (len(record.turns) - number) + 1]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)
        assert prompt == encoded.input_ids[:start]


def test_templates_write_the_published_formats():
    record = Record("r", (), (Turn("Hello", "Hi"), Turn("And?", "No.")), system="Be brief.")
    plain = Record("r", (), record.turns)
    shown = {name: "".join(text for _, text in segments(record, TEMPLATES[name])) for name in TEMPLATES}
    default = {name: "".join(text for _, text in segments(plain, TEMPLATES[name])) for name in TEMPLATES}
    vicuna = "USER: Hello ASSISTANT: Hi</s>USER: And? ASSISTANT: No.</s>"
    # FastChat's vicuna_v1.1 and LLaVA's v1: system text, " ", "ROLE: message" with " " and "</s>" in turn after them.
    assert shown["vicuna"] == f"<s>Be brief. {vicuna}"
    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    assert default["vicuna"] == f"<s>{system}detailed, and polite answers to the user's questions. {vicuna}"
    # Meta's model card of Llama 3.
    header = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    turns = [("user", "Hello"), ("assistant", "Hi"), ("user", "And?"), ("assistant", "No.")]
    llama_3 = "".join(header.format(*turn) for turn in turns)
    assert shown["llama-3"] == "<|begin_of_text|>" + header.format("system", "Be brief.") + llama_3
    assert default["llama-3"] == "<|begin_of_text|>" + llama_3
    # ChatML as Qwen's templates write it, without their default system text.
    chatml = "".join("<|im_start|>{}\n{}<|im_end|>\n".format(*turn) for turn in turns)
    assert shown["chatml"] == "<|im_start|>system\nBe brief.<|im_end|>\n" + chatml
    # docs.mistral.ai, "Tokenization", tokenizer V3; the system text is in the first question.
    mistral = "Hello[/INST] Hi</s>[INST] And?[/INST] No.</s>"
    assert shown["mistral"] == f"<s>[INST] Be brief.\n\n{mistral}"
    assert default["mistral"] == f"<s>[INST] {mistral}"


def test_many_records_at_once_are_encoded_as_alone(case):
    template, tokenizer = case
    encoder = Encoder(template, tokenizer)
    together = encoder.encode_many(RECORDS)
    assert together == [encoder.encode(record) for record in RECORDS]
    assert len(tokenizer) == len(Encoder(template, tokenizer)._tokenizer) - 1  # the caller's tokenizer is as it was


def test_a_prompt_is_a_prefix_where_a_merge_would_reach_over_it():
    tokenizer = qwen("chatml")
    template = TEMPLATES["chatml"]
    record = Record("r", (), (Turn("Why?", "\n\nso"),))
    whole = tokenizer("assistant\n\n\nso", add_special_tokens=False)["input_ids"]
    assert tokenizer("assistant\n", add_special_tokens=False)["input_ids"] != whole[:2]  # else this shows nothing
    encoded = encode(record, template, tokenizer)
    start, stop = encoded.spans[0]
    assert tokenizer.decode(encoded.input_ids[:start]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(encoded.input_ids[start:stop]) == "\n\nso<|im_end|>"


def test_the_mark_of_encoding_cannot_be_smuggled_in(tokenizer):
    with pytest.raises(RecordError, match="reserved"):
        encode(Record("r", (), (Turn("Why?", f"so {GUARD}"),)), TEMPLATES["plain"], tokenizer)
