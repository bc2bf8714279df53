"""Frames of a video file, through PyAV."""

from pathlib import Path
from typing import Any

from PIL import Image

from haplovl.pictures import ImageError, open_file


def read_frames(path: Path, count: int) -> list[Image.Image]:
    """`count` frames (all, where there are fewer), evenly spread over the video, in order, as upright RGB pictures.

    A file whose end is missing is refused where its format (MP4, AVI) tells what should be there; others (MKV, WebM,
    GIF) are read up to there.

    Raises:
        ImageError: (a ValueError) the file is missing, no video, damaged, or PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise ImageError("reading video files needs PyAV: pip install av") from None
    with open_file(path, "video") as file:
        if not file.peek(1):
            raise ImageError("the file has 0 bytes")
        try:
            with av.open(file, metadata_errors="ignore") as container:
                cover = av.stream.Disposition.attached_pic  # a picture of a piece of music, say
                streams = [stream for stream in container.streams.video if not stream.disposition & cover]
                if not streams:
                    raise ImageError("the file holds no video")
                # The header's count saves decoding everything twice; it may be missing or wrong.
                total, frames = _take(container, streams[0], count, streams[0].frames)
                if len(frames) != min(total, count):
                    container.seek(0)
                    _, frames = _take(container, streams[0], count, total)
        except (av.FFmpegError, OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ImageError(f"no video, or truncated or damaged: {' '.join(reason.split())}") from None
    if not frames:
        raise ImageError("the video has no frames")
    return frames


def _take(container: Any, stream: Any, count: int, claimed: int) -> tuple[int, list[Image.Image]]:
    """The number of frames found, and those that are wanted if there are as many as claimed."""
    wanted, total, frames = set(spread(claimed, count)), 0, []
    for frame in container.decode(stream):
        if total in wanted:
            # Telephones write portraits sideways and say so.
            frames.append(frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True))
        total += 1
    return total, frames if total == claimed else []


def spread(total: int, count: int) -> list[int]:
    """Indices of `count` frames in the middle of equal parts of a video of `total` frames."""
    count = min(total, count)
    return [(2 * part + 1) * total // (2 * count) for part in range(count)]
