"""Pictures of unknown origin: safe opening of image files, and every kind of pixel as 8-bit RGB."""

import io
import os
import re
import stat
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 50_000_000
MAX_FILE_BYTES = 1 << 30
# Pillow knows some 40 formats; several run other programs (EPS) or hold images of a second size (ICO, ICNS).
# JPEG stands for MPO (several JPEGs in one file, as cameras write) as well.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels: white, the page that most transparent graphics were drawn for."""

_URL = re.compile(r"[a-z][a-z0-9+]+://|data:", re.IGNORECASE)
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's own guard only warns up to twice its limit; ours refuses, so the warning would say it twice.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(ValueError):
    """An image that cannot be used; the message is the reason that quarantine shows."""


def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as 8-bit RGB, fully decoded, upright by its EXIF orientation, transparency over white, first frame.

    Raises:
        ImageError: missing, no regular file, unreadable, and all that `decode_bytes` refuses.
    """
    return decode_bytes(read_image_file(path), max_pixels)


def decode_bytes(data: bytes, max_pixels: int = MAX_PIXELS, keep_hidden: bool = False) -> Image.Image:
    """The content of an image file as `open_image` gives it; `keep_hidden` as in `to_rgb`.

    Raises:
        ImageError: 0 bytes, not an image of a known format, more than `max_pixels` by its header (decided before any
            pixel is allocated), without pixels, truncated or damaged, or of a pixel type without a defined range.
    """
    with _read_header(data, max_pixels) as image:
        rgb = _decoded(image, max_pixels, keep_hidden)
    rgb.info.clear()
    return rgb


def to_rgb(image: Image.Image, max_pixels: int = MAX_PIXELS, keep_hidden: bool = False) -> Image.Image:
    """A Pillow image, opened but perhaps not yet decoded, as 8-bit RGB: upright, first frame, alpha over white.

    `keep_hidden` shows the colours below transparent pixels instead of white.

    Raises:
        ImageError: as `decode_bytes`.
    """
    rgb = _decoded(image, max_pixels, keep_hidden)
    if rgb is image:
        rgb = image.copy()
    rgb.info.clear()  # an orientation left in it would turn the image once more where it is opened again
    return rgb


def _decoded(image: Image.Image, max_pixels: int, keep_hidden: bool) -> Image.Image:
    """As `to_rgb`, but perhaps the image itself."""
    _check_size(image.size, max_pixels)
    try:
        image.load()
        return _eight_bit_rgb(_upright(image), keep_hidden)
    except (ImageError, MemoryError):
        raise
    # Pillow's decoders raise almost any type on damaged data: OSError, SyntaxError, struct.error, IndexError, …
    except Exception as error:
        raise ImageError(f"the image is truncated or damaged: {_one_line(error)}") from None


def as_picture(picture: Any, max_pixels: int = MAX_PIXELS, keep_hidden: bool = False) -> Image.Image:
    """Whatever a caller means by a picture, as `to_rgb` gives it.

    `picture` is a Pillow image, the path of a file, a file's bytes, or an array or tensor of 8-bit pixels: [H, W],
    [H, W, 1 | 3 | 4] or [1 | 3 | 4, H, W]. Where both could be meant, arrays have their channels last, tensors first.

    Raises:
        ImageError: something else, or all that `open_image` refuses.
    """
    if isinstance(picture, (str, Path)):
        try:
            return as_picture(read_image_file(local_path(picture)), max_pixels, keep_hidden)
        except ImageError as error:
            raise ImageError(f"{str(picture):.200}: {error}") from None
    if isinstance(picture, (bytes, bytearray)):
        return decode_bytes(bytes(picture), max_pixels, keep_hidden)
    if not isinstance(picture, Image.Image):
        picture = _from_array(picture)
    return to_rgb(picture, max_pixels, keep_hidden)


def local_path(name: str | Path) -> Path:
    """The path of a file on this machine.

    Raises:
        ImageError: a URL, which nothing here ever opens.
    """
    if isinstance(name, str) and _URL.match(name):
        raise ImageError("a URL is no local file; download it and give its path")
    return Path(name)


def _from_array(values: Any) -> Image.Image:
    if not hasattr(values, "__array__"):
        raise ImageError(f"expected a PIL image, a file or an array of pixels, found {type(values).__name__}")
    is_tensor = hasattr(values, "detach")
    kind = str(getattr(values, "dtype", "unknown type")).removeprefix("torch.")
    if kind != "uint8":
        raise ImageError(f"expected pixels of 8 bits (uint8), found an array of {kind}")
    pixels = np.asarray(values.detach().cpu() if is_tensor else values)
    found, channels = list(pixels.shape), (1, 3, 4)
    first, last = (pixels.ndim == 3 and pixels.shape[axis] in channels for axis in (0, 2))
    if first and (is_tensor or not last):
        pixels = pixels.transpose(1, 2, 0)
    elif pixels.ndim != 2 and not last:
        raise ImageError(f"expected pixels of shape [H, W], [H, W, 3] or [3, H, W], found {found}")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if not pixels.size:
        raise ImageError(f"the image has no pixels ({pixels.shape[1]}x{pixels.shape[0]})")
    return Image.fromarray(np.ascontiguousarray(pixels))


def read_image_file(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageError: as `open_file`, or the file is larger than MAX_FILE_BYTES.
    """
    with open_file(path) as file:
        # read(n) would allocate n bytes at once, so the size is asked for first.
        if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
            raise ImageError(f"the file is larger than {MAX_FILE_BYTES} bytes")
        return file.read()


def open_file(path: Path, what: str = "image") -> BinaryIO:
    """Opens a regular file for reading; a pipe or a device could keep the reader for ever.

    Raises:
        ImageError: it is missing, no regular file, or cannot be opened; `what` names it in the message.
    """
    try:
        if not path.exists():
            raise ImageError(f"the {what} is missing")
        if not path.is_file():
            raise ImageError("the path is not a file")
        return path.open("rb")
    except OSError as error:
        raise ImageError(f"the {what} cannot be read: {error.strerror}") from None


def resolve_inside(root: Path, relative: str) -> Path:
    """The path of `relative` below `root`; the real one where it holds symbolic links.

    Raises:
        ImageError: the path is absolute, holds `..` or a NUL, cannot be a file name, or a link leads out of `root`.
    """
    if "\0" in relative:
        raise ImageError("the path holds a NUL character")
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts:
        raise ImageError("the path leaves the image folder")
    try:
        if not _has_link(root, path):
            return root / path
        base, real = root.resolve(), (root / path).resolve()
    # Names that are too long or no valid Unicode, and (RuntimeError) links that lead in a circle.
    except (OSError, ValueError, RuntimeError) as error:
        raise ImageError(f"the path cannot be used: {_one_line(error)}") from None
    if not real.is_relative_to(base):
        raise ImageError("the path leaves the image folder through a symbolic link")
    return real


def _has_link(root: Path, relative: Path) -> bool:
    """Whether a part of `relative` is a symbolic link; most have none, and resolving asks for every folder above."""
    path = str(root)
    for part in relative.parts:
        path = os.path.join(path, part)
        try:
            if stat.S_ISLNK(os.lstat(path).st_mode):
                return True
        except (FileNotFoundError, NotADirectoryError):
            return False
    return False


def _read_header(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise ImageError("the file has 0 bytes")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(f"not an image in a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        raise ImageError(f"{found[0] if found else 'far'} pixels, more than the limit of {max_pixels}") from None
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(f"the image's header is damaged: {_one_line(error)}") from None


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"the image has no pixels ({width}x{height})")
    if width * height > max_pixels:
        raise ImageError(f"{width * height} pixels ({width}x{height}), more than the limit of {max_pixels}")


def _upright(image: Image.Image) -> Image.Image:
    """Turns the image by its EXIF orientation; Pillow's exif_transpose also rewrites the EXIF and fails on odd ones."""
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    return image if turn is None else image.transpose(turn)


def _eight_bit_rgb(image: Image.Image, keep_hidden: bool) -> Image.Image:
    if image.mode == "F":
        raise ImageError("floating-point pixels have no defined range")
    # 16-bit gray: Pillow would clip it at 255 instead of scaling it.
    if image.mode.startswith("I"):
        gray = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    if image.has_transparency_data and not keep_hidden:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(page, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
