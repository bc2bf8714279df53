"""Generation as its users know it: every way of decoding gives what the plain, uncached way gives."""

import copy
from threading import Thread

import pytest
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
)

from haplovl.model.inherit import inherit

# fp32 attention over rows of another length or with another kernel; measured worst case 5e-7 on these logits.
TOLERANCE = 2e-5
NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
DETAILED = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
INCREMENTS = [(0.0, 1.0), (1.0, 1.0), (0.0, 0.0), (0.25, 0.5)]
STATIC = {"cache_implementation": "static"}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def row(model, *parts):
    """Token ids of a row: numbers stay, "i" becomes an image, "v" a video of two frames."""
    n, ids = model.config.tokens_per_image, []
    special = {"i": [model.config.image_token_id] * n, "v": [model.config.video_token_id] * 2 * n}
    for part in parts:
        ids += special.get(part, [part])
    return ids


def padded(model, *rows):
    """Rows padded on the left: input_ids and attention_mask."""
    rows = [row(model, *parts) for parts in rows]
    longest = max(map(len, rows))
    ids = [[model.config.pad_token_id] * (longest - len(own)) + own for own in rows]
    mask = [[0] * (longest - len(own)) + [1] * len(own) for own in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def set_increments(model, increments):
    model.config.pre_config.rotary_increment, model.config.post_rotary_increment = increments


def assert_same(found, expected):
    """The same new tokens, from the same logits."""
    assert torch.equal(found.sequences[:, -NEW:], expected.sequences[:, -NEW:])
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=TOLERANCE, rtol=0)


@pytest.fixture
def batch(model):
    """Three rows of different lengths: an image and a video, two images, and text alone."""
    media = {"pixel_values": noise(3, 3, 32, 32), "pixel_values_videos": noise(1, 2, 3, 32, 32, seed=1)}
    return padded(model, (11, "i", 12, "v", 13, 14), (21, 22, "i", "i", 23), (31, 32, 33, 34)) | media


@pytest.fixture
def alone(model, batch):
    """The same three rows, one by one."""
    pictures, video = batch["pixel_values"], batch["pixel_values_videos"]
    rows = [{"pixel_values": pictures[:1], "pixel_values_videos": video}, {"pixel_values": pictures[1:]}, {}]
    for i, own in enumerate(rows):
        start = int((batch["attention_mask"][i] == 0).sum())
        own |= {"input_ids": batch["input_ids"][i : i + 1, start:]}
    return rows


@pytest.fixture
def forwards(model):
    """Counts how often the transformer is run."""
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("increments", INCREMENTS)
@pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])
def test_a_cache_changes_nothing(model, batch, increments, options):
    set_increments(model, increments)
    assert_same(model.generate(**batch, **DETAILED, **options), model.generate(**batch, **DETAILED, use_cache=False))


@pytest.mark.parametrize("options", [{}, STATIC, {"num_beams": 3}, {"num_beams": 3} | STATIC, {"use_cache": False}])
def test_rows_of_a_batch_answer_as_each_alone(model, batch, alone, options):
    together = model.generate(**batch, **GREEDY, **options)[:, -NEW:]
    for i, own in enumerate(alone):
        assert torch.equal(model.generate(**own, **GREEDY, **options)[0, -NEW:], together[i])


@pytest.mark.parametrize("kind", ["growing", "growing and configured", "static"])
def test_a_cache_of_ones_own_is_filled_and_used(model, batch, kind):
    config = model.config
    cache = {
        "growing": lambda: DynamicCache(),
        "growing and configured": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config, max_cache_len=150),
    }[kind]()
    found = model.generate(**batch, **DETAILED, past_key_values=cache)
    assert_same(found, model.generate(**batch, **DETAILED))
    assert int(cache.get_seq_length()) == found.sequences.shape[1] - 1 and found.past_key_values is cache


@pytest.mark.parametrize("options", [{"num_return_sequences": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_samples_repeat_with_their_seed_and_keep_their_pictures(model, batch, options):
    sampled = {"do_sample": True, "temperature": 2.0, "top_k": 0}
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(model.generate(**batch, **DETAILED | sampled, **options))
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    own = options["num_return_sequences"]
    assert len(runs[0].sequences) == 3 * own and not torch.equal(runs[0].sequences[0], runs[0].sequences[1])
    first = model.generate(**batch, **DETAILED).logits[0].repeat_interleave(own, dim=0)
    torch.testing.assert_close(runs[0].logits[0], first, atol=TOLERANCE, rtol=0)


def test_scores_and_logits_of_every_token_are_returned(model, batch):
    out = model.generate(**batch, **DETAILED, output_scores=True, output_hidden_states=True)
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == NEW
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        assert torch.equal(scores.argmax(-1), out.sequences[:, step - NEW])
        allowed = scores > -torch.inf
        assert torch.equal(scores[allowed], logits[allowed])


def test_placeholders_are_never_generated(model, alone):
    placeholders = [model.config.image_token_id, model.config.video_token_id]
    with torch.no_grad():  # the head prefers them by far
        model.lm_head.weight[placeholders] = 100 * model.lm_head.weight.mean(0)
    free = [model.generate(**own, **GREEDY, suppress_tokens=None)[0, -NEW:] for own in alone]
    assert torch.isin(torch.cat(free), torch.tensor(placeholders)).any()
    kept = [model.generate(**own, **GREEDY)[0, -NEW:] for own in alone]
    assert not torch.isin(torch.cat(kept), torch.tensor(placeholders)).any()


# --- drafts and streams


@pytest.fixture
def assistant(vision, language, model_settings, processor):
    """A smaller HaploVL of the same vocabulary, with rotary increments of its own."""
    torch.manual_seed(4)
    settings = model_settings.model_copy(update={"pre_decoder_layers": 1, "pre_rotary_increment": 0.5})
    ids = processor.image_token_id, len(processor.tokenizer), processor.video_token_id
    return inherit(vision, language, settings, *ids).eval()


def test_drafts_of_an_assistant_change_nothing(model, assistant, alone):
    for helper in (assistant, copy.deepcopy(model)):  # one that is often wrong, one that is always right
        for own in alone:
            drafted = model.generate(**own, **DETAILED, assistant_model=helper)
            assert_same(drafted, model.generate(**own, **DETAILED))


def test_an_assistant_reads_the_prompt_at_its_own_positions(model, assistant, alone):
    seen = []
    assistant.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["position_ids"]), with_kwargs=True)
    model.generate(**alone[1], **GREEDY, assistant_model=assistant)
    inside = torch.arange(model.config.tokens_per_image) / 2
    first, second = 2 + inside, 2 + inside[-1] + 1 + inside
    assert seen[0][0, 0].tolist() == [0, 1, *first, *second, second[-1] + 1]


def test_drafts_looked_up_in_the_prompt_never_hold_placeholders(model):
    ids = torch.tensor([row(model, 11, 12, "i", 13, 14, 11, 12)])  # what followed 11 and 12 before was an image
    prompt = {"input_ids": ids, "pixel_values": noise(1, 3, 32, 32)}
    assert_same(model.generate(**prompt, **DETAILED, prompt_lookup_num_tokens=4), model.generate(**prompt, **DETAILED))


@pytest.mark.parametrize("words", ["LlamaForCausalLM", "class_token True and False", "early_exit", "empty cache"])
def test_drafts_that_cannot_work_are_refused_before_anything_runs(words, request, model, alone, forwards):
    options = {"assistant_model": request.getfixturevalue("assistant")}
    if words == "LlamaForCausalLM":
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=model.config.text_config.vocab_size, **sizes)
        options["assistant_model"] = LlamaForCausalLM(config)
    elif words == "class_token True and False":
        options["assistant_model"].config.pre_config.class_token = False
    elif words == "early_exit":
        options = {"assistant_early_exit": 1}
    else:
        first = model.generate(**alone[0], **DETAILED)
        options |= {"past_key_values": first.past_key_values}
        alone[0]["input_ids"] = first.sequences
    forwards.clear()
    with pytest.raises(ValueError, match=words):
        model.generate(**alone[0], **GREEDY, **options)
    assert not forwards


def test_streams_hold_what_generate_returns(model, processor, alone, capsys):
    ids = model.generate(**alone[0], **GREEDY)
    text = processor.batch_decode(ids[:, -NEW:], skip_special_tokens=True)[0]
    options = {"skip_prompt": True, "skip_special_tokens": True}
    capsys.readouterr()
    model.generate(**alone[0], **GREEDY, streamer=TextStreamer(processor.tokenizer, **options))
    assert capsys.readouterr().out == text + "\n"
    stream = TextIteratorStreamer(processor.tokenizer, timeout=60, **options)
    thread = Thread(target=model.generate, kwargs=alone[0] | GREEDY | {"streamer": stream})
    thread.start()
    assert "".join(stream) == text
    thread.join()


@pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])
def test_a_prompt_of_text_is_read_in_chunks(model, options):
    batch = padded(model, range(40, 51), (31, 32, 33, 34))
    chunked = model.generate(**batch, **DETAILED, prefill_chunk_size=3, **options)
    assert_same(chunked, model.generate(**batch, **DETAILED))


@pytest.mark.slow  # 40 s of compilation
def test_a_compiled_static_cache_changes_nothing(model, batch):
    compiled = CompileConfig()
    compiled._compile_all_devices = True  # as transformers does on a GPU without being asked
    found = model.generate(**batch, **DETAILED, **STATIC, compile_config=compiled)
    assert_same(found, model.generate(**batch, **DETAILED))


# --- later turns


@pytest.fixture
def turns(model, request):
    """A first turn with its filled cache, and a second one with new images and a video: left-padded in the middle."""
    set_increments(model, getattr(request, "param", INCREMENTS[0]))
    pictures, video = noise(3, 3, 32, 32), {"pixel_values_videos": noise(1, 2, 3, 32, 32, seed=1)}
    first = padded(model, (11, 12, "i", 13, 14), (21, 22, 23)) | {"pixel_values": pictures[:1]}
    done = model.generate(**first, **DETAILED)
    later = padded(model, (31, "i", 32, "i"), (41, "v", 42, 43))
    mask = torch.cat([first["attention_mask"], torch.ones(2, NEW).long(), later["attention_mask"]], dim=1)
    whole = {"input_ids": torch.cat([done.sequences, later["input_ids"]], dim=1), "attention_mask": mask}
    return done, whole, {"pixel_values": pictures} | video, {"pixel_values": pictures[1:]} | video


def uncached(model, whole, media):
    return model.generate(**whole, **media, **DETAILED, use_cache=False)


def by_hand(model, inputs, mask, cache):
    """Greedy decoding without generate: (new tokens, logits of every step)."""
    steps, new = [], []
    with torch.no_grad():
        for _ in range(NEW):
            out = model(**inputs, attention_mask=mask, past_key_values=cache, use_cache=True)
            steps.append(out.logits[:, -1])
            scores = steps[-1].clone()
            scores[:, model.generation_config.suppress_tokens] = -torch.inf
            new.append(scores.argmax(-1, keepdim=True))
            inputs, mask = {"input_ids": new[-1]}, torch.cat([mask, torch.ones_like(new[-1])], dim=1)
    return torch.cat(new, dim=1), torch.stack(steps)


@pytest.mark.parametrize("turns", INCREMENTS, indirect=True)
@pytest.mark.parametrize("given", ["all and all images", "all and new images", "new and new images"])
def test_a_later_turn_goes_on_from_the_cache(model, turns, given):
    first, whole, images, new_images = turns
    expected = uncached(model, whole, images)
    inputs = dict(whole)
    if given.startswith("new"):
        inputs["input_ids"] = whole["input_ids"][:, first.past_key_values.get_seq_length() :]
    media = images if given.endswith("all images") else new_images
    assert_same(model.generate(**inputs, **media, **DETAILED, past_key_values=first.past_key_values), expected)


@pytest.mark.parametrize("turns", INCREMENTS, indirect=True)
def test_a_later_turn_goes_on_by_hand_without_positions(model, turns):
    first, whole, images, new_images = turns
    cache = first.past_key_values
    inputs = {"input_ids": whole["input_ids"][:, cache.get_seq_length() :]} | new_images
    tokens, logits = by_hand(model, inputs, whole["attention_mask"], cache)
    expected = uncached(model, whole, images)
    assert torch.equal(tokens, expected.sequences[:, -NEW:])
    torch.testing.assert_close(logits, torch.stack(expected.logits), atol=TOLERANCE, rtol=0)


def test_a_loop_by_hand_gives_what_generate_gives(model, batch):
    expected = model.generate(**batch, **DETAILED)
    for cache in (None, StaticCache(model.config, max_cache_len=150)):
        inputs = {name: value for name, value in batch.items() if name != "attention_mask"}
        cache = DynamicCache() if cache is None else cache
        tokens, logits = by_hand(model, inputs, batch["attention_mask"], cache)
        assert torch.equal(tokens, expected.sequences[:, -NEW:])
        torch.testing.assert_close(logits, torch.stack(expected.logits), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("turns", INCREMENTS, indirect=True)
def test_a_static_cache_holds_several_turns(model, turns):
    first, whole, images, new_images = turns
    cache, length = StaticCache(model.config, max_cache_len=200), first.sequences.shape[1] - NEW
    prompt = {name: value[:, :length] for name, value in whole.items()} | {"pixel_values": images["pixel_values"][:1]}
    model.generate(**prompt, **GREEDY, past_key_values=cache)
    later = model.generate(**whole, **new_images, **DETAILED, past_key_values=cache)
    assert_same(later, uncached(model, whole, images))


@pytest.mark.parametrize("turns", INCREMENTS, indirect=True)
def test_a_cropped_cache_goes_on_from_where_it_was_cut(model, turns):
    first, whole, images, _ = turns
    cache = first.past_key_values
    past = cache.get_seq_length()
    cache.crop(-3)
    cut = {name: torch.cat([value[:, : past - 3], value[:, past:]], dim=1) for name, value in whole.items()}
    assert_same(model.generate(**cut, **images, **DETAILED, past_key_values=cache), uncached(model, cut, images))


def test_rows_of_a_cache_can_be_chosen_and_repeated(model, turns):
    first, whole, images, _ = turns
    rows = torch.tensor([1, 0, 1])
    whole = {name: value[rows] for name, value in whole.items()}
    images["pixel_values_videos"] = images["pixel_values_videos"][[0, 0]]
    cache = first.past_key_values
    cache.batch_select_indices(rows)
    found = model.generate(**whole, **images, **DETAILED, past_key_values=cache)
    assert_same(found, uncached(model, whole, images))


def test_what_a_row_was_filled_up_with_after_its_end_does_not_count(model, turns):
    first, whole, images, new_images = turns
    end = first.sequences.shape[1]
    whole["attention_mask"][0, end - 3 : end] = 0  # the answer of row 0 was shorter than that of row 1
    found = model.generate(**whole, **new_images, **DETAILED, past_key_values=first.past_key_values)
    assert_same(found, uncached(model, whole, images))


# --- what cannot work


def refused(model, words, **inputs):
    with pytest.raises(ValueError, match=words):
        model.generate(**GREEDY | inputs)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("not used by the model: .'pixel_value'", {"pixel_value": noise(1, 3, 32, 32)}),
        ("not used by the model: .'inputs_embeds'", {"inputs_embeds": noise(1, 3, 32)}),
        ("cannot split the raw multimodal inputs", {"prefill_chunk_size": 10}),
        ("no continuous batching", {"cache_implementation": "paged"}),
        ("offloaded DynamicCache", {"cache_implementation": "offloaded"}),
        ("offloaded StaticCache", {"cache_implementation": "offloaded_static"}),
        ("EncoderDecoderCache", {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}),
        ("room for 63 image tokens, but 1 images", {"pixel_values": noise(1, 3, 32, 32)}),
        ("assisted generate is only supported for batch_size = 1", {"prompt_lookup_num_tokens": 2}),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(model, batch, forwards, words, options):
    refused(model, words, **batch | options)
    assert not forwards


def test_prompts_that_are_padded_on_the_right_are_refused(model, forwards):
    ids = torch.tensor([[21, 22, model.config.pad_token_id], [21, 22, 23]])
    refused(model, "padding_side='left'", input_ids=ids)
    refused(model, "padding_side='left'", input_ids=ids, attention_mask=(ids != model.config.pad_token_id).long())
    assert not forwards


def test_a_filled_cache_that_does_not_fit_is_refused(model, turns, forwards):
    first, whole, images, _ = turns
    cache = first.past_key_values
    forwards.clear()
    few = whole["input_ids"][:, -5:]
    refused(model, "cache holds 30 tokens, but input_ids only 5", input_ids=few, past_key_values=cache)
    refused(model, "without beams", **whole, **images, past_key_values=cache, num_beams=2)
    wider = {name: value[[0, 1, 1]] for name, value in whole.items()}
    doubled = images | {"pixel_values_videos": images["pixel_values_videos"][[0, 0]]}
    refused(model, "cache holds 2 rows, but 3", **wider, **doubled, past_key_values=cache)
    cache.crop(-14)
    refused(model, "ends inside an image", **whole, **images, past_key_values=cache)
    assert not forwards


def test_a_cache_that_something_else_filled_is_refused(model):
    cache = DynamicCache()
    model.model.language_model(inputs_embeds=noise(1, 3, 48), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="only continue what it filled itself"):
        model(torch.tensor([[11]]), past_key_values=cache)
