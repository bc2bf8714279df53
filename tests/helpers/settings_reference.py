"""The settings that docs/settings.md must list, and the tables that it has."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from haplovl.settings import ComputeProfile, Params
from haplovl.strict import TAGS

TAG = re.compile(rf"`(?:{'|'.join(TAGS)}): [\w-]+`")
"""What the heading of a table names that is about one member of a union, such as `format: llava`."""


class Setting(NamedTuple):
    """A key with the words that the heading of its table holds; `tag` is empty outside of unions."""

    section: str
    tag: str
    key: str
    field: FieldInfo


def every_setting() -> Iterator[Setting]:
    """All keys of params.yaml and of a compute profile, each as docs/settings.md writes it."""
    for name, field in Params.model_fields.items():
        section = field.alias or name
        yield Setting("`params.yaml`", "", section, field)
        for model in _models(field.annotation):
            yield from _below(model, f"`{section}`")
    yield from _below(ComputeProfile, "A compute profile")


def _below(model: Any, section: str, tag: str = "", prefix: str = "", known: set | None = None) -> Iterator[Setting]:
    known = set() if known is None else known  # a model that stands in a section twice is explained once
    fields = model.model_fields
    tag = next((f"`{name}: {get_args(fields[name].annotation)[0]}`" for name in TAGS if name in fields), tag)
    for name, field in fields.items():
        key, is_list = prefix + (field.alias or name), get_origin(field.annotation) is list
        yield Setting(section, tag, key, field)
        inner = _models(field.annotation)
        for one in inner:
            if len(inner) > 1:  # the members of a union have tables of their own
                yield from _below(one, section, prefix="" if is_list else f"{key}.")
            elif one not in known:
                known.add(one)
                yield from _below(one, section, tag, f"{key}[]." if is_list else f"{key}.", known)


def _models(annotation: Any) -> list[Any]:
    """The settings models inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def literals(annotation: Any) -> list[Any]:
    """The values that an annotation lists."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in getattr(annotation, "__args__", ()) for value in literals(part)]


def read_tables(page: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """Default and meaning of every key, by the headings that its table stands under."""
    tables: dict[str, dict[str, tuple[str, str]]] = {}
    section = heading = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = heading = line
        elif line.startswith("### "):
            heading = f"{section} {line}"
        elif line.startswith("| `"):
            keys, default, meaning = (cell.strip() for cell in line.strip("|").split("|"))
            tables.setdefault(heading, {}).update(dict.fromkeys(re.findall("`(.+?)`", keys), (default, meaning)))
    return tables
