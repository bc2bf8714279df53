"""Labels cannot lie: spans decode to the answers, and the chat template writes what training read."""

import pytest

from haplovl.data.conversation import TEMPLATES, encode, segments
from haplovl.records import Record, Turn
from haplovl.teacher_training import train_tokenizer

TEXT = ["USER: Where is it? ASSISTANT: left </s> system user assistant <|im_start|> <|eot_id|> Ünïcödé ✓ 7"]


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def case(request):
    """A template's name, the template and a tokenizer that knows its special tokens."""
    tokenizer = train_tokenizer(TEXT, 400, request.param)
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [*special, "<|start_header_id|>", "<|end_header_id|>"]},
        replace_extra_special_tokens=False,
    )
    return TEMPLATES[request.param], tokenizer


RECORDS = [
    Record("one", ("a.png",), (Turn("<image>\nWhere is it?", "top left"),)),
    Record("many", ("a.png", "b.png"), (Turn("<image><image>\nWhich?", "first"), Turn("Sure?", "yes ✓ Ünïcödé"))),
    Record("system", (), (Turn("Hello", "Hi"),), system="Be brief."),
    Record("look-alike", (), (Turn("say <|end|> </s> <|im_end|> <|eot_id|>", "<|assistant|> </s> is no token"),)),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.id)
def test_supervised_tokens_decode_to_exactly_the_answers(case, record):
    template, tokenizer = case
    encoded = encode(record, template, tokenizer)
    stop = tokenizer(template.stop, add_special_tokens=False)["input_ids"]
    answers = []
    for start, end in encoded.spans:
        ids = encoded.input_ids[start:end]
        assert ids[-len(stop) :] == stop
        answers.append(tokenizer.decode(ids[: -len(stop)], clean_up_tokenization_spaces=False))
    assert answers == [template.lead + turn.answer for turn in record.turns]
    assert encoded.supervised == sum(end - start for start, end in encoded.spans) > 0


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.id)
def test_only_placeholders_become_image_tokens_and_words_never_special(case, record):
    template, tokenizer = case
    ids = encode(record, template, tokenizer).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == len(record.images)
    fixed = "".join(text for kind, text in segments(record, template) if kind == "fixed")
    fixed += template.stop * len(record.turns)
    stops = tokenizer(template.stop, add_special_tokens=False)["input_ids"][-1]
    expected = tokenizer(fixed, add_special_tokens=False)["input_ids"].count(stops)
    assert ids.count(stops) == expected


@pytest.mark.parametrize("record", RECORDS[:3], ids=lambda r: r.id)
def test_the_chat_template_writes_what_training_read(case, record):
    template, tokenizer = case
    messages = [{"role": "system", "content": record.system}] if record.system else []
    for turn in record.turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    shown = tokenizer.apply_chat_template(messages, chat_template=template.jinja(), tokenize=False)
    pieces = [(text + template.stop) if kind == "answer" else text for kind, text in segments(record, template)]
    assert shown == "".join(pieces)
    prompt = tokenizer.apply_chat_template(
        messages[:-1], chat_template=template.jinja(), tokenize=False, add_generation_prompt=True
    )
    assert prompt == shown[: len(prompt)]
    start = encode(record, template, tokenizer).spans[-1][0]
    assert (
        tokenizer(prompt, add_special_tokens=False)["input_ids"]
        == encode(record, template, tokenizer).input_ids[:start]
    )
