"""Parquet tables with pictures inside, from this machine or from the Hugging Face Hub.

Read as published: LLaVA-OneVision-Data (`id`, `image` of bytes and path, `conversations` of `from` and `value`,
`data_source`; rows of text have no image), The Cauldron (`images`, `texts` of `user`, `assistant`, `source`), tables of
`question` and `answer`, and of `caption` or `text`. Images are what `datasets` writes (bytes and path) or plain bytes.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from haplovl.data.media import MEDIA
from haplovl.data.sources.common import Bringing, check_folder, matching_files, media_files, unique_names
from haplovl.data.sources.conversations import as_llava, split_of
from haplovl.data_settings import EVERY, HubSource, ParquetSource
from haplovl.errors import UserError
from haplovl.pictures import ImageError
from haplovl.records import IMAGE_PLACEHOLDER, RawItem

COLUMNS = {
    "id": ("id",),
    "image": ("image", "images"),
    "conversations": ("conversations", "messages", "conversation"),
    "texts": ("texts",),
    "question": ("question",),
    "answer": ("answer",),
    "caption": ("caption", "text"),
    "split": ("split",),
}
"""What a column may be, and the names under which it is looked for."""
WAYS = ({"conversations"}, {"texts"}, {"question", "answer"}, {"caption"})
"""Roles that tell a conversation; one of these is enough."""
TEXTS = ("question", "answer", "caption")
ROWS, ROWS_WITH_BYTES = 1024, 16
"""Rows that are read at a time, without and with pictures among the columns."""


def check(settings: ParquetSource | HubSource) -> None:
    """Raises UserError where a file or folder of this machine cannot be read."""
    if isinstance(settings, ParquetSource):
        matching_files(settings.files, ".parquet", "table")
    elif settings.folder:
        check_folder(Path(settings.folder), "folder")


def bring(settings: ParquetSource | HubSource, seed: int, bringing: Bringing) -> None:
    """Brings the tables as they are; those of the Hub are streamed and numbered.

    Raises:
        UserError: the Hub cannot be reached, or has no such files at that revision.
    """
    if isinstance(settings, HubSource):
        _bring_hub(settings, bringing)
        return
    files = matching_files(settings.files, ".parquet", "table")
    for path, name in zip(files, unique_names([str(path) for path in files]), strict=True):
        bringing.link(path, f"{MEDIA}/{name}")


def _bring_hub(settings: HubSource, bringing: Bringing) -> None:
    system, root = _file_system(settings)
    try:
        found = {name: None for pattern in settings.files for name in sorted(system.glob(f"{root}/{pattern}"))}
        names = [name for name in found if name.endswith(".parquet")]
        if not names:
            raise UserError(
                f"the source {settings.name} has no Parquet file that fits {', '.join(settings.files)} (a folder of "
                "datasets' save_to_disk becomes one by load_from_disk(FOLDER).to_parquet(FILE))"
            )
        # Names inside the set alone: the folder that holds it may be called anything.
        inside = [name.removeprefix(f"{root}/") for name in names]
        if settings.files == EVERY and (held := next((name for name in inside if _held_out(name)), None)):
            raise UserError(
                f"the source {settings.name} holds {held}, which is not of a training split; "
                "name the files to take in 'files', such as ['**/train*.parquet']"
            )
        for number, name in enumerate(names):
            with system.open(name, "rb") as file:
                bringing.copy(file, f"{MEDIA}/part-{number:05d}.parquet", origin=name.removeprefix(f"{root}/"))
    # huggingface_hub and its HTTP client raise many types, all about the place and not about our disk.
    except Exception as error:
        if isinstance(error, UserError) or not settings.id:
            raise
        raise UserError(f"{settings.id} cannot be read from the Hub: {' '.join(str(error).split())}") from None


def _held_out(name: str) -> bool:
    """Whether a file's name or folder says that it is of a validation or test split, as data sets on the Hub do."""
    words = (re.split(r"[-_.]", part.lower())[0] for part in name.split("/"))
    return any(word in ("validation", "val", "valid", "dev", "test", "testdev") for word in words)


def _file_system(settings: HubSource) -> tuple[Any, str]:
    """The file system that holds the data set, and its folder there."""
    if settings.folder:
        from fsspec.implementations.local import LocalFileSystem

        return LocalFileSystem(), str(Path(settings.folder).resolve())
    from huggingface_hub import HfFileSystem

    return HfFileSystem(), f"datasets/{settings.id}@{settings.revision}"


def bring_image(settings: ParquetSource | HubSource, ref: str, bringing: Bringing) -> None:
    """The pictures came with the tables."""
    if not ref.startswith("parquet:"):
        raise ImageError("only pictures inside the table are read")


def entries(folder: Path, settings: ParquetSource | HubSource) -> Iterator[RawItem]:
    """The rows of all tables, pictures unread, with an error where a table is damaged."""
    for path in media_files(folder):
        position = 0
        try:
            for item in _rows(path, settings):
                position = item.position + 1
                yield item
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            yield RawItem(path.name, position, error=f"the table is damaged: {' '.join(str(error).split())}", cut=True)


def _rows(path: Path, settings: ParquetSource | HubSource) -> Iterator[RawItem]:
    with pq.ParquetFile(path, memory_map=True) as file:
        present = set(file.schema_arrow.names)
        names = _columns(present, settings.columns)
        lacking = sorted(set(settings.columns.values()) - present)
        if lacking or not names.keys() & {"conversations", "texts", "answer", "caption"}:
            what = f"no column '{lacking[0]}'" if lacking else "no conversation, answer or caption"
            yield RawItem(
                path.name, 0, error=f"the table has {what}; its columns: {', '.join(sorted(present))}", cut=True
            )
            return
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        light = [leaf for leaf in leaves if leaf.startswith(f"{names.get('image')}.") and not leaf.endswith(".bytes")]
        wanted = [name for role, name in names.items() if role != "image"] + light
        wanted += [names["image"]] if "image" in names and not light else []
        size = ROWS if light or "image" not in names else ROWS_WITH_BYTES
        position = 0
        for batch in file.iter_batches(size, columns=wanted):
            for row in batch.to_pylist():
                item = RawItem(path.name, position)
                yield _adapt(item, {role: row.get(name) for role, name in names.items()}, names, settings.prompt)
                position += 1


def _columns(present: set[str], chosen: dict[str, str]) -> dict[str, str]:
    """The column of every role that the table has: the chosen one, else one of a usual name."""
    names = dict(chosen)
    wanted = [way for way in WAYS if way & chosen.keys()]
    others = set().union(*WAYS).difference(*wanted) if wanted else set()  # who names a caption wants no answer
    for role, usual in COLUMNS.items():
        if role in others:
            continue
        found = next((name for name in usual if name in present), None)
        if role not in names and found is not None and found not in names.values():
            names[role] = found
    return names


def _adapt(item: RawItem, row: dict[str, Any], names: dict[str, str], prompt: str) -> RawItem:
    data: dict[str, Any] = {} if row.get("id") is None else {"id": row["id"]}
    data |= split_of(row)
    image = row.get("image")
    if image is not None:
        ref = f"parquet:{item.file}!{item.position}!{names['image']}"
        data["image"] = [f"{ref}!{i}" for i in range(len(image))] if isinstance(image, list) else [ref]
    odd = [role for role in TEXTS if not isinstance(row.get(role), str | None)]
    if odd:
        found = type(row[odd[0]]).__name__
        error = f"the column '{names[odd[0]]}' must hold text as {odd[0]}, found {found}"
        return replace(item, error=error, raw=str(names))
    talk = row.get("conversations")
    if isinstance(talk, str):
        try:
            talk = json.loads(talk)
        except (ValueError, RecursionError) as error:
            return replace(item, error=f"'{names['conversations']}' is not valid JSON: {error}", raw=talk[:1000])
    if talk is None:
        talk = _talk(row, prompt, "<image>" * len(data.get("image", [])))
    return as_llava(replace(item, data={**data, "conversations": talk}))


def _talk(row: dict[str, Any], prompt: str, shown: str) -> list[dict[str, Any]]:
    """A conversation of the other columns; the pictures come first."""
    if row.get("texts") is not None:
        texts = row["texts"] if isinstance(row["texts"], list) else []
        turns = [turn if isinstance(turn, dict) else {} for turn in texts]
        pairs = [(turn.get("user"), turn.get("assistant"), "") for turn in turns]
    elif "answer" in row:
        pairs = [(row.get("question") or "", row["answer"], "")]
    else:
        pairs = [(prompt, row.get("caption"), "caption" if shown else "")]
    talk = []
    for question, answer, kind in pairs:
        if shown and isinstance(question, str) and IMAGE_PLACEHOLDER not in question:
            question = f"{shown}\n{question}" if question else shown
        talk += [{"from": "human", "value": question, "kind": kind}, {"from": "gpt", "value": answer}]
        shown = ""
    return talk
