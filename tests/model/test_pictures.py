"""Every kind of picture becomes upright 8-bit RGB, once; what cannot be used is named before anything is computed."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from haplovl.pictures import ImageError, as_picture, decode_bytes, open_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(mode="RGB"):
    """16x8 pixels: red at the top left, green at the top right, blue below."""
    image = Image.new("RGB", (16, 8), BLUE)
    image.paste(RED, (0, 0, 8, 4))
    image.paste(GREEN, (8, 0, 16, 4))
    return image.convert(mode)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_gray_and_two_colours_become_gray():
    gray = Image.new("L", (4, 3), 77)
    assert decode_bytes(encoded(gray)).getpixel((0, 0)) == (77, 77, 77)
    assert decode_bytes(encoded(Image.new("1", (4, 3), 1))).getpixel((3, 2)) == WHITE


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257, 1), (32768, 128), (65535, 255)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_scaled_not_clipped(value, expected, kind):
    image = Image.fromarray(np.full((3, 5), value, dtype=np.uint16))
    assert image.mode.startswith("I")
    assert as_picture(encoded(image, kind)).getpixel((4, 2)) == (expected,) * 3


def test_transparency_shows_white():
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (*RED, 0))
    gray = Image.new("LA", (2, 1), (0, 255))
    gray.putpixel((1, 0), (0, 0))
    palette = quarters("P")
    transparent = palette.getpixel((0, 0))
    for pixels, first, last in (
        (decode_bytes(encoded(image)), RED, WHITE),
        (decode_bytes(encoded(gray)), (0, 0, 0), WHITE),
        (decode_bytes(encoded(palette, transparency=transparent)), WHITE, BLUE),
        (decode_bytes(encoded(palette, "GIF", transparency=transparent)), WHITE, BLUE),
    ):
        assert pixels.mode == "RGB"
        assert pixels.getpixel((0, 0)) == first
        assert pixels.getpixel((pixels.width - 1, pixels.height - 1)) == last


def test_half_transparent_pixels_are_mixed_with_white():
    mixed = as_picture(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    assert mixed.getpixel((0, 0)) == (127, 127, 127)


def test_print_colours_become_rgb():
    for kind in ("JPEG", "TIFF"):
        red, _, blue = decode_bytes(encoded(quarters("CMYK"), kind)).getpixel((15, 7))
        assert red < 40 and blue > 215


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_exactly_once(kind, orientation, tmp_path):
    upright = quarters().resize((64, 32), Image.Resampling.NEAREST)
    # What a camera held like this writes: the inverse of the turn that shows it upright.
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # as Image.Transpose counts
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    path.write_bytes(encoded(stored, kind, exif=exif))

    opened, lazy, loaded = open_image(path), Image.open(path), Image.open(path)
    loaded.load()
    loaded.getexif()
    for picture in (opened, lazy, loaded, loaded, opened.copy(), as_picture(opened), path, str(path)):
        pixels = np.asarray(as_picture(picture), dtype=int)
        assert pixels.shape == (32, 64, 3)
        # JPEG and WebP blur the colours; a wrong turn would miss by 255.
        for (x, y), colour in {(4, 4): RED, (60, 4): GREEN, (4, 28): BLUE, (60, 28): BLUE}.items():
            assert abs(pixels[y, x] - colour).max() < 16


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_a_moving_picture_counts(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert set(decode_bytes(data).get_flattened_data()) == {RED}


def test_pixels_as_arrays_tensors_bytes_and_paths_are_the_same_picture(tmp_path):
    picture = quarters()
    pixels, path = np.asarray(picture), tmp_path / "p.png"
    path.write_bytes(encoded(picture))
    for same in (
        pixels,
        np.asfortranarray(pixels),
        pixels[::1, ::1],
        pixels.transpose(2, 0, 1),
        torch.tensor(pixels),
        torch.tensor(pixels).permute(2, 0, 1),
        path,
        str(path),
        path.read_bytes(),
        bytearray(path.read_bytes()),
        np.dstack([pixels, np.full((8, 16), 255, dtype=np.uint8)]),
    ):
        assert np.array_equal(np.asarray(as_picture(same)), pixels)
    gray = np.asarray(picture.convert("L"))
    for same in (gray, gray[..., None], torch.tensor(gray), torch.tensor(gray)[None]):
        assert np.array_equal(np.asarray(as_picture(same)), np.stack([gray] * 3, axis=-1))


def test_thin_arrays_have_their_channels_last_and_thin_tensors_first():
    thin = np.arange(36, dtype=np.uint8).reshape(1, 12, 3)
    assert np.array_equal(np.asarray(as_picture(thin)), thin)
    assert np.array_equal(np.asarray(as_picture(torch.tensor(thin).permute(2, 0, 1))), thin)
    upright = thin.reshape(12, 1, 3)
    assert np.array_equal(np.asarray(as_picture(upright)), upright)
    assert np.array_equal(np.asarray(as_picture(torch.tensor(upright).permute(2, 0, 1))), upright)


def png_that_claims(width, height):
    """A whole PNG of a few bytes whose header names a huge picture."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bad_inputs(folder: Path):
    """Name, input and what its message must hold."""
    picture = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    files = {
        "truncated.jpg": (picture[: len(picture) // 2], "truncated or damaged"),
        "text.jpg": (b"no picture at all, just words", "not an image in a known format"),
        "empty.png": (b"", "0 bytes"),
        "bomb.png": (png_that_claims(100_000, 100_000), "more than the limit of 50000000"),
        "large.png": (png_that_claims(10_000, 9_000), r"90000000 pixels \(10000x9000\), more than the limit"),
        "drawing.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
    }
    for name, (content, words) in files.items():
        (folder / name).write_bytes(content)
        yield name, folder / name, rf"{name}: .*{words}"
        yield f"bytes of {name}", content, words
        yield f"text of {name}", str(folder / name), rf"{name}: .*{words}"
    lazy = Image.open(folder / "truncated.jpg")
    closed = Image.open(io.BytesIO(picture))
    closed.close()
    yield "lazy", lazy, "truncated or damaged"
    yield "closed", closed, "truncated or damaged"
    yield "directory", folder, "the path is not a file"
    yield "missing", folder / "none.png", "none.png: the image is missing"
    yield "missing text", "none.png", "none.png: the image is missing"
    yield "web", "https://example.org/cat.png", "cat.png: a URL is no local file"
    yield "data", "data:image/png;base64," + "A" * 5000, "a URL is no local file"
    yield "float array", np.zeros((8, 8, 3)), "8 bits .*float64"
    yield "float tensor", torch.zeros(3, 8, 8, dtype=torch.bfloat16), "8 bits .*bfloat16"
    yield "boolean array", np.zeros((8, 8), dtype=bool), "8 bits .*bool"
    yield "float picture", Image.new("F", (4, 4)), "floating-point pixels"
    yield "five channels", np.zeros((8, 8, 5), dtype=np.uint8), r"shape .*found \[8, 8, 5\]"
    yield "four axes", np.zeros((2, 8, 8, 3), dtype=np.uint8), r"shape .*found \[2, 8, 8, 3\]"
    yield "no pixels", np.zeros((0, 8, 3), dtype=np.uint8), r"no pixels \(8x0\)"
    yield "empty picture", Image.new("RGB", (0, 5)), r"no pixels \(0x5\)"
    yield "number", 42, "expected a PIL image, a file or an array of pixels, found int"
    yield "list", [[1, 2], [3, 4]], "found list"


def test_what_cannot_be_used_is_named_and_nothing_is_computed(processor, tmp_path):
    good = Image.new("RGB", (8, 8))
    for name, bad, words in bad_inputs(tmp_path):
        with pytest.raises(ImageError, match=words) as refused:
            as_picture(bad)
        assert len(str(refused.value)) < 500, name
        # A list would be read as one text's own pictures.
        pictures = [good, bad, good] if name != "list" else [[good, bad, good]]
        with pytest.raises(ValueError, match=rf"(?s)image 2 of 3: .*{words}"):
            processor(text="<image>" * 3, images=pictures, return_tensors="pt")


def test_a_truncated_picture_is_refused_at_any_length():
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        data = encoded(Image.effect_noise((32, 32), 50).convert("RGB"), kind)
        for share in (0.1, 0.5, 0.8):
            with pytest.raises(ImageError, match="truncated|damaged|known format"):
                as_picture(data[: int(len(data) * share)])
