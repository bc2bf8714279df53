"""WebDataset tars: files of one name without its ending are one sample.

Read as published by img2dataset and in cc3m-wds, LAION and DataComp shards: `000000000.jpg`, `.txt` with the caption
and `.json` with what is known of the picture (`caption`, `url`, …). Where the `.json` holds a conversation (`messages`
or `conversations`), the sample is that.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from haplovl.data.archives import ArchiveError, tar_members
from haplovl.data.sources.common import Bringing, matching_files, media_files, unique_names
from haplovl.data.sources.conversations import as_llava, split_of
from haplovl.data_settings import WebdatasetSource
from haplovl.records import ENTRY_LIMIT, IMAGE_PLACEHOLDER, RawItem

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
TEXTS = ("json", "txt", "caption")


def check(settings: WebdatasetSource) -> None:
    """Raises UserError where a shard cannot be read."""
    matching_files(settings.files, ".tar", "shard")


def bring(settings: WebdatasetSource, seed: int, bringing: Bringing) -> None:
    """Brings the shards with their indexes."""
    files = matching_files(settings.files, ".tar", "shard")
    for path, name in zip(files, unique_names([str(path) for path in files]), strict=True):
        bringing.archive(path, name)


def bring_image(settings: WebdatasetSource, ref: str, bringing: Bringing) -> None:
    """Raises ImageError where the archive holds the image's name more than once."""
    bringing.has_member(*ref.partition(":")[2].split("!", 1))


def entries(folder: Path, settings: WebdatasetSource) -> Iterator[RawItem]:
    """The samples of all shards, with an error where a shard is damaged."""
    for path in media_files(folder):
        position = 0
        try:
            for key, members in groupby(_files(path), key=lambda file: file[0]):
                yield _sample(RawItem(path.name, position), key, list(members), settings.prompt)
                position += 1
        except ArchiveError as error:
            yield RawItem(path.name, position, error=str(error), cut=True)


def _files(path: Path) -> Iterator[tuple[str, str, str, str | None]]:
    """Key, ending, name and text of a shard's files; the text of pictures and others is None."""
    with path.open("rb") as file:
        for member in tar_members(path):
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            if not stem or not member.isreg():
                continue
            ending, text = ending.lower(), None
            if ending in TEXTS and member.size <= ENTRY_LIMIT:
                file.seek(member.offset_data)
                text = file.read(member.size).decode("utf-8", errors="surrogateescape")
            yield f"{folder}/{stem}" if folder else stem, ending, member.name, text


def _sample(item: RawItem, key: str, members: list[tuple[str, str, str, str | None]], prompt: str) -> RawItem:
    files = {ending: (name, text) for _, ending, name, text in members}
    shown = next((files[ending][0] for ending in IMAGES if ending in files), None)
    try:
        about = json.loads(files["json"][1]) if files.get("json", ("", None))[1] is not None else {}
    except (ValueError, RecursionError) as error:
        return replace(item, error=f"{files['json'][0]} is not valid JSON: {error}", raw=files["json"][1][:1000])
    if shown is None:
        return replace(item, error=f"the sample '{key:.100}' has no picture", raw=str(sorted(files))[:1000])
    data: dict[str, Any] = {"id": f"{item.file.removesuffix('.tar')}/{key}", "image": f"tar:{item.file}!{shown}"}
    if isinstance(about, dict) and ("conversations" in about or "messages" in about):
        talk = as_llava(replace(item, data=about)).data["conversations"]
        return replace(item, data={**data, **split_of(about), "conversations": talk})
    caption = next((files[ending][1] for ending in ("txt", "caption") if ending in files), None)
    if caption is None and isinstance(about, dict):
        caption = about.get("caption")
    if not isinstance(caption, str):
        return replace(item, error=f"the sample '{key:.100}' has no caption", raw=str(sorted(files))[:1000])
    question = f"{IMAGE_PLACEHOLDER}\n{prompt}" if prompt else IMAGE_PLACEHOLDER
    talk = [{"from": "human", "value": question, "kind": "caption"}, {"from": "gpt", "value": caption.strip()}]
    return replace(item, data={**data, **split_of(about), "conversations": talk})
