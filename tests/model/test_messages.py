"""Texts, pictures and conversations become tokens as meant; what does not fit is named before any computation."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

RED, BLUE = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
TOKENS = 21
"""Of a picture of the tiny processor, and of a frame."""


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def image(picture):
    return {"type": "image", "image": picture}


def text(words):
    return {"type": "text", "text": words}


def test_pictures_come_before_texts_in_order_and_both_go_by_name(processor):
    by_place = processor([RED], "<image>a", return_tensors="pt")
    by_name = processor(text="<image>a", images=[RED], return_tensors="pt")
    assert all(torch.equal(by_place[name], by_name[name]) for name in by_name)
    with pytest.raises(ValueError, match="text must be a string"):
        processor("<image>a", [RED])
    with pytest.raises(ValueError, match="text is missing"):
        processor("<image>a")


@pytest.mark.parametrize(
    ("texts", "images", "reds"),
    [
        ("<image>", RED, [True]),
        (["<image>", "<image>"], [RED, BLUE], [True, False]),
        (["<image><image>", "a"], [BLUE, RED], [False, True]),
        (["<image><image>", "a"], [[BLUE, RED], []], [False, True]),
        (["a", "<image><image>"], [None, [BLUE, RED]], [False, True]),
        (["a", "<image>", "b"], [None, RED, None], [True]),
        (("<image>", "a"), ([RED, None], None), [True]),
        (["a", "<image>"], [[], (RED,)], [True]),
        (["<image>", "<image>"], [None, RED, None, BLUE], [True, False]),
    ],
)
def test_lists_of_pictures(processor, texts, images, reds):
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    assert (batch["pixel_values"][:, 0, 0].mean(dim=(-1, -2)) > 0).tolist() == reds
    rows = [texts] if isinstance(texts, str) else texts
    counts = (batch["input_ids"] == processor.image_token_id).sum(dim=1)
    assert counts.tolist() == [TOKENS * row.count("<image>") for row in rows]


@pytest.mark.parametrize("images", [None, [], [None], [[]], [None, None], [[], []], [[], None]])
def test_no_pictures_at_all(processor, images):
    texts = ["a", "b"] if images and len(images) == 2 else ["a"]
    assert sorted(processor(text=texts, images=images)) == ["attention_mask", "input_ids"]


@pytest.mark.parametrize(
    ("texts", "images", "words"),
    [
        ("What is '<image>'?", None, "the texts hold 1 '<image>' placeholders, but 0 images were given"),
        ("<image> and '<image>'", [RED], "hold 2 '<image>' placeholders, but 1 images"),
        ("<image>", [RED, BLUE], "hold 1 '<image>' placeholders, but 2 images"),
        (["<image>", "a"], [None, RED], r"hold \[1, 0\] '<image>' placeholders, but \[0, 1\] images"),
        (["<image>", "a"], [[], [RED]], r"hold \[1, 0\] '<image>' placeholders, but \[0, 1\] images"),
        (["<image>", "<image>"], [[RED, BLUE]], r"hold \[1, 1\] '<image>' placeholders, but \[2\] images"),
        (["<image>"], [RED, [BLUE]], "hold 1 '<image>' placeholders, but 2 images"),
        (["<image><image>"], [RED, [BLUE]], "image 2 of 2: expected a PIL image, .* found list"),
        ([], None, "a list of strings, at least one"),
        (["a", None], None, "a list of strings"),
        ([["a"]], None, "a list of strings"),
    ],
)
def test_texts_and_pictures_that_do_not_match_are_refused(processor, texts, images, words):
    with pytest.raises(ValueError, match=words):
        processor(text=texts, images=images, return_tensors="pt")


def test_an_empty_list_is_no_batch_of_pictures(processor):
    with pytest.raises(ValueError, match="no picture was given"):
        processor.image_processor([])
    with pytest.raises(ValueError, match="no video was given"):
        processor.image_processor.preprocess_videos([])


def test_lists_arrays_and_tensors_hold_the_same(processor):
    inputs = {"text": ["<image>a", "b c"], "images": [RED], "padding": True}
    lists, arrays, tensors = (processor(**inputs, return_tensors=kind) for kind in (None, "np", "pt"))
    assert isinstance(lists["input_ids"], list) and isinstance(lists["input_ids"][0], list)
    for name in tensors:
        assert isinstance(tensors[name], torch.Tensor) and isinstance(arrays[name], np.ndarray)
        assert np.array_equal(arrays[name], tensors[name].numpy())
        assert np.array_equal(np.asarray(lists[name]), arrays[name])


def test_padding_is_on_the_left_unless_told_otherwise(processor):
    pad = processor.tokenizer.pad_token_id
    left = processor(text=["a b c", "a"], padding=True)
    assert left["input_ids"][1][0] == pad and left["attention_mask"][1][0] == 0
    right = processor(text=["a b c", "a"], padding=True, padding_side="right")
    assert right["input_ids"][1][-1] == pad and right["attention_mask"][1][-1] == 0
    fixed = processor(text="a<image>", images=RED, padding="max_length", max_length=40, return_tensors="pt")
    assert fixed["input_ids"].shape == (1, 40)


def test_truncation_never_cuts_a_picture(processor):
    words = "Where is the red digit? " * 20
    whole = processor(text="<image>" + words, images=RED, truncation=True, max_length=TOKENS + 5)
    assert whole["input_ids"][0].count(processor.image_token_id) == TOKENS
    assert len(whole["input_ids"][0]) == TOKENS + 5
    for row in ("<image>" + words, words + "<image>"):
        with pytest.raises(ValueError, match="text 2 of 2 needs 21 '<image>' tokens, but .* are left .* never cut"):
            processor(text=["a", row], images=RED, truncation=True, max_length=TOKENS - 1)
    with pytest.raises(ValueError, match="needs 42 '<video>' tokens, but 30 are left"):
        processor(text="<video>", videos=[[RED, BLUE]], truncation=True, max_length=30)
    with pytest.raises(ValueError, match="1 texts gave 3 rows"):
        options = {"truncation": True, "max_length": 8, "return_overflowing_tokens": True}
        processor(text="<image>", images=RED, **options)
    assert len(processor(text=words, truncation=True, max_length=7)["input_ids"][0]) == 7


def test_pairs_of_texts(processor):
    pair = processor(text="<image>a", text_pair=" b", images=RED)
    assert pair["input_ids"] == processor(text="<image>a b", images=RED)["input_ids"]
    assert processor(text=["a", "b"], text_pair=["c", "d"])["input_ids"] == processor(text=["ac", "bd"])["input_ids"]
    for inputs in ({"text": "a"}, {"text": "<image>", "images": RED}):
        with pytest.raises(ValueError, match="no '<image>' in a text_pair"):
            processor(**inputs, text_pair="<image>")


def test_one_conversation_with_files_in_its_messages(processor, tmp_path):
    RED.save(tmp_path / "red.png")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(RED))))
        container.mux(stream.encode())
    messages = [
        *user(image(BLUE), {"type": "image", "path": str(tmp_path / "red.png")}, text("a")),
        {"role": "assistant", "content": "b"},
        *user({"type": "video", "path": str(tmp_path / "clip.mp4")}, text("c"), {"type": "video", "video": [RED] * 2}),
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == (
        "<|user|><image><image>\na<|assistant|> b<|end|><|user|><video><video>\nc<|assistant|>"
    )  # media first, then the words
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    batch = processor.apply_chat_template(messages, return_tensors="pt", num_frames=5, **options)
    expected = processor(
        text=prompt, images=[BLUE, RED], videos=[tmp_path / "clip.mp4", [RED] * 2], num_frames=5, return_tensors="pt"
    )
    assert sorted(batch) == sorted(expected)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert batch["video_frames"].tolist() == [5, 2]
    by_hand = {"processor_kwargs": {"num_frames": 5, "return_tensors": "pt"}}
    again = processor.apply_chat_template(messages, **by_hand, **options)
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    lists = processor.apply_chat_template(messages, return_tensors=None, num_frames=5, **options)
    assert lists["input_ids"] == expected["input_ids"].tolist()
    assert (
        processor.apply_chat_template(messages, tokenize=True, num_frames=5)
        == processor.apply_chat_template(messages, tokenize=True, num_frames=5, return_dict=True)["input_ids"]
    )
    assert [part["type"] for part in messages[0]["content"]] == ["image", "image", "text"]  # the caller's own stay
    assert messages[0]["content"][0]["image"] is BLUE


def test_a_batch_of_conversations(processor):
    batch = processor.apply_chat_template(
        [user(text("a")), user(image(RED), text("b")), [{"role": "system", "content": "c"}, *user(image(BLUE))]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    counts = (batch["input_ids"] == processor.image_token_id).sum(dim=1)
    assert counts.tolist() == [0, TOKENS, TOKENS]
    assert (batch["pixel_values"][:, 0, 0].mean(dim=(-1, -2)) > 0).tolist() == [True, False]
    assert batch["attention_mask"][0, 0] == 0


def test_pictures_of_a_plain_text_conversation_come_as_processor_kwargs(processor):
    messages = [{"role": "user", "content": "<image>a"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template(messages, processor_kwargs={"images": [RED]}, **options)
    assert batch["pixel_values"].shape[0] == 1
    with pytest.raises(ValueError, match="hold 1 '<image>' placeholders, but 0 images"):
        processor.apply_chat_template(messages, **options)
    with pytest.raises(ValueError, match=r"hold \[2\] '<image>' placeholders, but \[1\] images"):
        processor.apply_chat_template(user(image(RED), text("what is '<image>'?")), **options)


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize(
    ("conversation", "words"),
    [
        (None, "expected a list of messages"),
        ([], "expected a list of messages"),
        ("hi", "expected a list of messages"),
        ({"role": "user", "content": "a"}, "expected a list of messages"),
        ([user(text("a")), []], "expected a list of messages"),
        ([*user(text("a")), "hi"], "message 2 must be a dictionary with 'role' and 'content'"),
        ([{"role": "user"}], "message 1 must be a dictionary with 'role' and 'content'"),
        ([{"role": "robot", "content": "a"}], "message 1 has an unknown role 'robot'; expected one of system, user"),
        ([{"role": ["user"], "content": "a"}], "message 1 has an unknown role"),
        ([{"role": "user", "content": None}], "content of message 1 must be a text or a list of parts, found NoneType"),
        ([{"role": "user", "content": 42}], "content of message 1 .* found int"),
        ([{"role": "user", "content": text("a")}], "content of message 1 .* found dict"),
        (user("a"), "part 1 of message 1 must be a dictionary with a 'type'"),
        (user(text("a"), {"text": "b"}), "part 2 of message 1 must be a dictionary with a 'type'"),
        (user({"type": "audio", "path": "a.wav"}), "a 'type' of image, video, text, found .*audio"),
        (user({"type": "text"}), "part 1 of message 1 is a text, but its 'text' is None"),
        (user(text(7)), "part 1 of message 1 is a text, but its 'text' is 7"),
    ],
)
def test_messages_of_a_wrong_shape_are_refused(processor, conversation, words, tokenize):
    with pytest.raises(ValueError, match=words):
        processor.apply_chat_template(conversation, tokenize=tokenize)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image"}, "a part of type 'image' names no image"),
        ({"type": "video"}, "a part of type 'video' names no video"),
        ({"type": "image", "url": "https://example.org/a.png"}, "image 1 of 1: https://.*a URL is no local file"),
        ({"type": "video", "url": "http://example.org/a.mp4"}, "video 1 of 1: http://.*a URL is no local file"),
        ({"type": "image", "image": "data:image/png;base64,AAAA"}, "image 1 of 1: data:.*a URL is no local file"),
        ({"type": "image", "path": "none.png"}, "image 1 of 1: none.png: the image is missing"),
        ({"type": "video", "path": "none.mp4"}, "video 1 of 1: none.mp4: the video is missing"),
    ],
)
def test_a_part_without_a_file_that_can_be_read_is_refused(processor, part, words):
    with pytest.raises(ValueError, match=words):
        processor.apply_chat_template(user(part), tokenize=True, return_dict=True)


def test_a_mask_of_answers_is_refused_rather_than_left_out(processor):
    with pytest.raises(ValueError, match="return_assistant_tokens_mask is not supported"):
        processor.apply_chat_template(user(text("a")), tokenize=True, return_assistant_tokens_mask=True)
