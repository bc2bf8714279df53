"""Videos as files, arrays and frames: evenly spread, each with its own length, refused by name where they are bad."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from haplovl.model import HaploImageProcessor, HaploProcessor
from haplovl.model.videos import read_frames, spread
from haplovl.pictures import ImageError

FRAME_TOKENS = 21
"""Of the tiny processor: 4 rows of 4 patches and a newline, and the class token."""


def write_video(path, brightness, codec="libx264", size=(64, 32)):
    """A video file with one frame of plain gray per number."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=10, bit_rate=4_000_000)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for value in brightness:
            pixels = np.full((size[1], size[0], 3), value, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return path


def write_sound(path, cover=False):
    """An MP4 with sound alone, or with a picture of what is heard."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        if cover:
            shown = container.add_stream("mjpeg", rate=1)
            shown.width, shown.height, shown.pix_fmt = 16, 16, "yuvj420p"
            shown.disposition = av.stream.Disposition.attached_pic
            container.mux(shown.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), dtype=np.uint8))))
            container.mux(shown.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def seen(frames):
    """Which frame of a video of `range(0, 256, 8)` every picture is."""
    return [round(float(np.asarray(frame).mean()) / 8) for frame in frames]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Folder with files of 30 frames; frame k has the brightness 8·k."""
    folder, shades = tmp_path_factory.mktemp("clips"), range(0, 240, 8)
    for name, codec in (("a.mp4", "libx264"), ("b.mp4", "mpeg4"), ("c.mkv", "libx264"), ("d.webm", "libvpx-vp9")):
        write_video(folder / name, shades, codec)
    write_video(folder / "short.mp4", shades[:3])
    write_sound(folder / "sound.mp4")
    write_sound(folder / "cover.mp4", cover=True)
    return folder


def test_frames_are_taken_from_the_middle_of_equal_parts():
    assert spread(30, 3) == [5, 15, 25]
    assert spread(8, 8) == list(range(8))
    assert spread(5, 8) == list(range(5))
    assert spread(1, 4) == [0]
    assert spread(7, 1) == [3]
    assert spread(0, 4) == []
    for total in range(1, 60):
        for count in range(1, total + 1):
            indices = spread(total, count)
            steps = np.diff([*indices, total + indices[0]])
            assert len(set(indices)) == count and indices[0] >= 0 and indices[-1] < total
            assert steps.max() - steps.min() <= 1


@pytest.mark.parametrize("name", ["a.mp4", "b.mp4", "c.mkv", "d.webm"])
def test_a_files_frames_are_spread_evenly_whatever_its_format(clips, name):
    # MKV and WebM do not tell how many frames they hold.
    with av.open(str(clips / name)) as container:
        assert container.streams.video[0].frames == (30 if name.endswith(".mp4") else 0)
    frames = read_frames(clips / name, 6)
    assert seen(frames) == spread(30, 6) == [2, 7, 12, 17, 22, 27]
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (64, 32))}
    assert seen(read_frames(clips / name, 100)) == list(range(30))


def test_a_video_that_was_filmed_upright_is_shown_upright(tmp_path):
    # A quarter turn clockwise, as telephones note it: what is on the left of the stored frame is shown on top.
    path = tmp_path / "portrait.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(-90)
        pixels = np.zeros((32, 64, 3), dtype=np.uint8)
        pixels[:, :16] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    (frame,) = read_frames(path, 4)
    assert frame.size == (32, 64)
    assert frame.getpixel((16, 4))[0] > 200 > 50 > frame.getpixel((16, 60))[0]


def pixels_of(processor, videos, **options):
    return processor(text="<video>" * len(videos), videos=videos, return_tensors="pt", **options)


def test_files_arrays_tensors_and_frames_are_the_same_video(processor, clips):
    frames = read_frames(clips / "a.mp4", 8)
    array = np.stack([np.asarray(frame) for frame in frames])
    tensor = torch.tensor(array).permute(0, 3, 1, 2)
    expected = pixels_of(processor, [frames])
    assert expected["pixel_values_videos"].shape == (1, 8, 3, 32, 32)
    assert expected["input_ids"].tolist() == [[processor.video_token_id] * 8 * FRAME_TOKENS]
    for video in (clips / "a.mp4", str(clips / "a.mp4"), array, tensor, list(array), tuple(frames)):
        for given in (video, [video], [[video]]):
            if given is video or not (isinstance(video, tuple) and given == [video]):
                batch = processor(text="<video>", videos=given, return_tensors="pt")
                assert torch.equal(batch["pixel_values_videos"], expected["pixel_values_videos"])
                assert torch.equal(batch["input_ids"], expected["input_ids"])


def test_num_frames_of_the_processor_and_of_a_call(processor, clips, tokenizer):
    assert pixels_of(processor, [clips / "a.mp4"])["video_frames"].tolist() == [8]
    assert pixels_of(processor, [clips / "a.mp4"], num_frames=5)["video_frames"].tolist() == [5]
    three = HaploProcessor(processor.image_processor, tokenizer, num_frames=3)
    batch = pixels_of(three, [clips / "a.mp4"])
    assert batch["video_frames"].tolist() == [3]
    # More than there are: all of them; a list of frames is taken whole.
    assert pixels_of(processor, [clips / "short.mp4"])["video_frames"].tolist() == [3]
    frames = [Image.new("RGB", (8, 8))] * 11
    assert pixels_of(processor, [frames], num_frames=2)["video_frames"].tolist() == [11]
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"num_frames is {wrong}"):
            pixels_of(processor, [clips / "a.mp4"], num_frames=wrong)
        with pytest.raises(ValueError, match=f"num_frames is {wrong}"):
            HaploProcessor(processor.image_processor, tokenizer, num_frames=wrong)


def test_videos_of_different_lengths_and_pictures_answer_as_each_alone(processor, model, clips):
    picture = Image.new("RGB", (32, 32), "red")
    texts = ["<video>a", "<image><video>b<video>", "c", "<image>d"]
    videos = [[clips / "a.mp4"], [clips / "short.mp4", [picture] * 2], [], []]
    images = [None, [picture], None, [picture]]
    batch = processor(text=texts, images=images, videos=videos, num_frames=4, padding=True, return_tensors="pt")
    assert batch["pixel_values_videos"].shape == (3, 4, 3, 32, 32)
    assert batch["video_frames"].tolist() == [4, 3, 2]
    assert not batch["pixel_values_videos"][1, 3:].any()
    counts = [(batch["input_ids"] == token).sum(1) for token in (processor.video_token_id, processor.image_token_id)]
    assert counts[0].tolist() == [4 * FRAME_TOKENS, 5 * FRAME_TOKENS, 0, 0]
    assert counts[1].tolist() == [0, FRAME_TOKENS, 0, FRAME_TOKENS]
    flat = [clips / "a.mp4", clips / "short.mp4", [picture] * 2]
    again = processor(text=texts, images=[picture] * 2, videos=flat, num_frames=4, padding=True, return_tensors="pt")
    assert all(torch.equal(again[name], batch[name]) for name in batch)
    with torch.inference_mode():
        together = model(**batch).logits
        for row, text in enumerate(texts):
            one = processor(
                text=text, images=images[row], videos=videos[row] or None, num_frames=4, return_tensors="pt"
            )
            alone = model(**one).logits[0]
            # fp32 sums over rows of another length; measured worst case 2e-7 on this model.
            torch.testing.assert_close(together[row, -len(alone) :], alone, atol=2e-5, rtol=0)


def test_frames_of_several_tiles_are_still_one_tile_each(tokenizer, clips):
    processor = HaploProcessor(HaploImageProcessor(32, 8, max_tiles=4), tokenizer)
    batch = pixels_of(processor, [[Image.new("RGB", (200, 90))] * 2])
    assert batch["input_ids"].shape[1] == 2 * FRAME_TOKENS == processor.video_tokens(2)


def bad_videos(clips, folder):
    """Name, video and what its message must hold."""
    whole, start = (clips / "a.mp4").read_bytes(), (clips / "a.mp4").read_bytes().find(b"mdat")
    damaged = bytearray(whole)
    damaged[start + 900 : start + 1200] = bytes(300)
    files = {
        "header.mp4": (whole[:100], "no video"),
        "half.mp4": (whole[: start + (len(whole) - start) // 2], "truncated or damaged"),
        "nearly.mp4": (whole[:-10], "truncated or damaged"),
        "damaged.mp4": (bytes(damaged), "truncated or damaged"),
        "words.mp4": (b"no video at all, just words", "no video, or truncated or damaged"),
        "empty.mp4": (b"", "0 bytes"),
    }
    for name, (content, words) in files.items():
        (folder / name).write_bytes(content)
        yield folder / name, rf"{name}: .*{words}"
    yield clips / "sound.mp4", "sound.mp4: the file holds no video"
    yield clips / "cover.mp4", "cover.mp4: the file holds no video"
    yield clips / "none.mp4", "none.mp4: the video is missing"
    yield str(clips / "none.mp4"), "none.mp4: the video is missing"
    yield clips, "the path is not a file"
    yield "https://example.org/cat.mp4", "cat.mp4: a URL is no local file"
    yield np.zeros((0, 8, 8, 3), dtype=np.uint8), "has no frames"
    yield np.zeros((4, 8, 8, 3)), "frame 1: expected pixels of 8 bits .*float64"
    yield [Image.new("RGB", (8, 8)), clips / "a.mp4"], "frame 2: .*a.mp4: not an image in a known format"


def test_what_is_no_video_is_named_and_nothing_is_computed(processor, clips, tmp_path):
    good = [Image.new("RGB", (8, 8))] * 2
    for bad, words in bad_videos(clips, tmp_path):
        with pytest.raises(ImageError, match=rf"video 2 of 3.*{words}") as refused:
            processor(text="<video>" * 3, videos=[good, bad, good], return_tensors="pt")
        assert "Errno" not in str(refused.value)


@pytest.mark.parametrize("bad", [Image.new("RGB", (8, 8)), np.zeros((8, 8, 3), dtype=np.uint8), 42])
def test_what_is_one_picture_is_no_video(processor, bad):
    with pytest.raises(ValueError, match=r"video 1 of 1: expected a list of frames, an array \[F, H, W, 3\]"):
        processor(text="<video>", videos=bad)


@pytest.mark.parametrize(
    ("text", "videos", "words"),
    [
        ("<video>", None, "hold 1 '<video>' placeholders, but 0 videos"),
        ("<video>", [], "hold 1 '<video>' placeholders, but 0 videos"),
        ("<video>", [[]], r"hold \[1\] '<video>' placeholders, but \[0\] videos"),
        ("none", ["a.mp4"], "hold 0 '<video>' placeholders, but 1 videos"),
        ("<video><video>", ["a.mp4"], "hold 2 '<video>' placeholders, but 1 videos"),
        (["<video>", ""], [[], ["a.mp4"]], r"hold \[1, 0\] .* but \[0, 1\] videos"),
        (["<video>", ""], [None, "a.mp4"], r"hold \[1, 0\] .* but \[0, 1\] videos"),
    ],
)
def test_placeholders_and_videos_must_match(processor, text, videos, words):
    with pytest.raises(ValueError, match=words):
        processor(text=text, videos=videos)


def test_a_tokenizer_without_a_video_token_takes_no_videos(processor):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="has no '<image>' token"):
        HaploProcessor(processor.image_processor, tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    blind = HaploProcessor(processor.image_processor, tokenizer)
    assert blind.video_token_id is None
    with pytest.raises(ValueError, match="no '<video>' token"):
        blind(text="<video>", videos=[[Image.new("RGB", (8, 8))]])
    assert blind(text="<image>", images=Image.new("RGB", (8, 8)))["input_ids"][0] == [1] * FRAME_TOKENS
