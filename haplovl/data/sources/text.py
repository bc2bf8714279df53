"""Text-only sets: ShareGPT and Alpaca.

Read as published: ShareGPT_V3_unfiltered_cleaned_split.json (a list of `id` and `conversations` of `from` and `value`;
long conversations were cut into `id_0`, `id_1`, …, so that many begin in the middle), alpaca_data.json (a list of
`instruction`, `input`, `output`), and Dolphin's flan1m-alpaca-uncensored.jsonl (the same fields by line; there
`instruction` is the system prompt and `input` the question).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from haplovl.data.sources.common import Bringing, annotation_files, bring_annotations, check_annotations
from haplovl.data.sources.conversations import as_llava, id_of, split_of
from haplovl.data_settings import AlpacaSource, ShareGptSource
from haplovl.pictures import ImageError
from haplovl.records import RawItem, read_items


def check(settings: AlpacaSource | ShareGptSource) -> None:
    """Raises UserError where a file of the settings cannot be read."""
    check_annotations(settings.annotations)


def bring(settings: AlpacaSource | ShareGptSource, seed: int, bringing: Bringing) -> None:
    """Copies the annotation files."""
    bring_annotations(settings.annotations, bringing)


def bring_image(settings: AlpacaSource | ShareGptSource, ref: str, bringing: Bringing) -> None:
    """Raises ImageError: there are no images in sets of text."""
    raise ImageError("a source of text names no place for images")


def entries(folder: Path, settings: AlpacaSource | ShareGptSource) -> Iterator[RawItem]:
    """The entries of all annotation files."""
    adapt = _sharegpt if settings.format == "sharegpt" else _alpaca(settings.instruction)
    for path in annotation_files(folder, settings.annotations):
        for item in read_items(path):
            media = ("image", "images", "video", "videos")
            named = next((name for name in media if isinstance(item.data, dict) and item.data.get(name)), None)
            if named:
                what, format_ = ("a video", "video") if named.startswith("video") else ("an image", "llava")
                error = (
                    f"the record names {what}, but the format {settings.format} is for text; see the format {format_}"
                )
                yield replace(item, data=None, error=error, raw=str(item.data)[:1000])
            else:
                yield adapt(item) if isinstance(item.data, dict) else item


def _sharegpt(item: RawItem) -> RawItem:
    """The conversation from its first question to its last answer: what stands around them asks or answers nothing."""
    adapted = as_llava(item)
    talk = adapted.data["conversations"]
    if not isinstance(talk, list):
        return adapted
    roles = [message.get("from") if isinstance(message, dict) else None for message in talk]
    system = [message for message, role in zip(talk, roles, strict=True) if role == "system"][:1]
    first = roles.index("human") if "human" in roles else len(roles)
    last = len(roles) - roles[::-1].index("gpt") if "gpt" in roles else 0
    kept = talk[first:last] if roles[:1] != ["system"] else system + talk[first:last]
    return replace(adapted, data={**adapted.data, "conversations": kept})


def _alpaca(instruction: str) -> Callable[[RawItem], RawItem]:
    def adapt(item: RawItem) -> RawItem:
        data = item.data
        missing = [name for name in ("instruction", "output") if not isinstance(data.get(name), str)]
        if missing or not isinstance(data.get("input", ""), str | None):
            wrong = missing[0] if missing else "input"
            return replace(item, data=None, error=f"'{wrong}' must be a string", raw=str(data)[:1000])
        talk = _talk(instruction, data["instruction"], data.get("input") or "", data["output"])
        return replace(item, data={"id": id_of(item), "conversations": talk, **split_of(data)})

    return adapt


def _talk(instruction_is: str, instruction: str, given: str, output: str) -> list[dict[str, Any]]:
    if instruction_is == "system":
        system = [{"from": "system", "value": instruction}] if instruction.strip() else []
        question = given
    else:
        system, question = [], f"{instruction}\n{given}" if given.strip() else instruction
    return [*system, {"from": "human", "value": question}, {"from": "gpt", "value": output}]
