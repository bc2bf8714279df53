"""LLaVA-style annotations and the images that they name.

Read as published: LLaVA-Pretrain (blip_laion_cc_sbu_558k.json: a list of `id`, `image`, `conversations`), LLaVA-1.5's
llava_v1_5_mix665k.json (the same; its text-only records have `model` and no `image`), ShareGPT4V's lists, M4-Instruct
(`sample_id`, a list in `image`, `metadata`), and JSON or JSONL with `messages` of `role` and `content`.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from haplovl.data.sources.common import (
    Bringing,
    ImagePlaces,
    annotation_files,
    bring_annotations,
    check_annotations,
    with_refs,
)
from haplovl.data.sources.conversations import as_llava, mark_caption
from haplovl.data_settings import LlavaSource
from haplovl.records import RawItem, read_items


def check(settings: LlavaSource) -> None:
    """Raises UserError where a file or folder of the settings cannot be read."""
    check_annotations(settings.annotations)
    ImagePlaces(settings.images).check()


def bring(settings: LlavaSource, seed: int, bringing: Bringing) -> None:
    """Copies the annotation files and brings the archives."""
    bring_annotations(settings.annotations, bringing)
    bringing.places = ImagePlaces(settings.images)
    bringing.places.bring(bringing)


def bring_image(settings: LlavaSource, ref: str, bringing: Bringing) -> None:
    """Brings the image that `ref` names; raises ImageError where that is not possible."""
    bringing.places.bring_image(ref, bringing)


def entries(folder: Path, settings: LlavaSource) -> Iterator[RawItem]:
    """The entries of all annotation files."""
    places = ImagePlaces(settings.images)
    for path in annotation_files(folder, settings.annotations):
        for item in read_items(path):
            if isinstance(item.data, dict) and _shows_a_video_alone(item.data):
                error = "the record names a video, but the format llava is for pictures; see the format video"
                yield replace(item, data=None, error=error, raw=str(item.data)[:1000])
                continue
            adapted = with_refs(as_llava(item), places.ref)
            yield mark_caption(adapted) if settings.captions else adapted


def _shows_a_video_alone(data: dict[str, Any]) -> bool:
    """Without its video such a record would teach answers to what is not shown."""
    return any(data.get(name) for name in ("video", "videos")) and not any(data.get(n) for n in ("image", "images"))
