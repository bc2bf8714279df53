"""Videos with LLaVA-style annotations: a video is shown as frames, evenly spread over it.

Read as published: LLaVA-Video-178K (`id`, `conversations` with `<image>` in the place of the video, `data_source`,
`video`) and Video-ChatGPT (`id`, `video`, `conversations` with `<video>`).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from haplovl.data.sources.common import (
    Bringing,
    annotation_files,
    bring_annotations,
    check_annotations,
    check_folder,
    link_into,
)
from haplovl.data.sources.conversations import as_llava
from haplovl.data_settings import VideoSource
from haplovl.pictures import open_file, resolve_inside
from haplovl.records import IMAGE_PLACEHOLDER, RawItem, read_items

VIDEO_PLACEHOLDER = "<video>"


def check(settings: VideoSource) -> None:
    """Raises UserError where a file or folder of the settings cannot be read."""
    check_annotations(settings.annotations)
    check_folder(Path(settings.videos), "video folder")


def bring(settings: VideoSource, seed: int, bringing: Bringing) -> None:
    """Copies the annotation files."""
    bring_annotations(settings.annotations, bringing)


def bring_image(settings: VideoSource, ref: str, bringing: Bringing) -> None:
    """Brings the video of a frame, once for all its frames.

    Raises:
        ImageError: it is missing, leaves the folder, is no regular file or cannot be read.
    """
    name, frame, _ = ref.removeprefix("video:").rsplit("!", 2)
    if frame != "0":
        return
    real = resolve_inside(Path(settings.videos), name)
    with open_file(real, "video"):
        pass
    link_into(real, bringing.media, name)


def entries(folder: Path, settings: VideoSource) -> Iterator[RawItem]:
    """The entries of all annotation files, every video as its frames."""
    for path in annotation_files(folder, settings.annotations):
        for item in read_items(path):
            if item.error or not isinstance(item.data, dict):
                yield item
                continue
            name = item.data.get("video")
            if not isinstance(name, str) or not name:
                yield replace(item, data=None, error="'video' must be a path", raw=str(item.data)[:1000])
                continue
            adapted = as_llava(item).data
            adapted["image"] = [f"video:{name}!{i}!{settings.frames}" for i in range(settings.frames)]
            adapted["conversations"] = _shown(adapted["conversations"], settings.frames)
            yield replace(item, data=adapted)


def _shown(talk: Any, frames: int) -> Any:
    """The conversation with the frames' placeholders in the place of the video's; before it all where it has none."""
    if not isinstance(talk, list):
        return talk
    for mark in (VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER, ""):
        for i, message in enumerate(talk):
            text = message.get("value") if isinstance(message, dict) and message.get("from") == "human" else None
            if isinstance(text, str) and mark in text:
                placeholders = IMAGE_PLACEHOLDER * frames + ("" if mark else "\n")
                return [*talk[:i], {**message, "value": text.replace(mark, placeholders, 1)}, *talk[i + 1 :]]
    return talk
