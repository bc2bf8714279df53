"""YAML files as strict typed models: what does not fit is explained in one sentence."""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from haplovl.errors import UserError
from haplovl.redaction import with_credentials


class SettingsError(UserError):
    """A settings file that cannot be used; the message is one sentence for the user."""


class Strict(BaseModel):
    """Base of all settings: unknown keys are refused and values are not coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def load_strict(path: Path, kind: type[Strict]) -> Any:
    """A YAML file as a settings model.

    Raises:
        SettingsError: the file is missing, no YAML, or does not fit; the message names the key and the nearest one.
    """
    return validate_settings(read_settings(path), path, kind)


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping that was not checked yet.

    Raises:
        SettingsError: the file is missing, no YAML mapping, or holds credentials.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"there is no {path} here; run the command in the project's root folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise SettingsError(f"{path} must be a mapping of settings, found {type(data).__name__}")
    if secret := next(with_credentials(data), None):
        raise SettingsError(
            f"{path}: '{secret}' holds credentials in an address; settings are committed and stand in every candidate, "
            "so keep credentials in the environment"
        )
    return data


def validate_settings(data: dict[str, Any], path: Path, kind: type[Strict]) -> Any:
    """A mapping as a settings model; `path` is the file that an error is about.

    Raises:
        SettingsError: it does not fit; the message names the key and the nearest one.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        told = dict.fromkeys(_explain(path, kind, item, data) for item in error.errors())
        raise SettingsError("; ".join(told)) from None


def _explain(path: Path, kind: type[Strict], error: Any, data: dict) -> str:
    """One sentence for one pydantic error, with the nearest valid key where a key is unknown."""
    location = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden" and location[-2:-1] == ["none"]:
        return f"{path}: '{location[0]}.objective: none' takes no other keys; remove those beside it"
    if error["type"] == "extra_forbidden":
        # The parent's location leads to the settings class whose fields are the valid keys.
        names = _valid_keys(kind, location[:-1])
        near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.0)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"{path}: unknown key '{'.'.join(_without_tags(location, data))}'{hint}"
    name = ".".join(_without_tags(location, data))
    if error["type"] == "missing":
        return f"{path}: '{name}' is missing"
    if error["type"].startswith("union_tag"):
        return _wrong_tag(path, kind, location, name, error["ctx"])
    if error["type"] == "string_pattern_mismatch" and error["ctx"]["pattern"] in PATTERNS:
        return f"{path}: '{name}' must be {PATTERNS[error['ctx']['pattern']]}, found {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ")
    place = f"{path}: '{name}'" if name else str(path)  # a rule between sections names them itself
    return f"{place}: {message[0].lower()}{message[1:]}{_found(error['input'], error['type'])}"


def _found(given: Any, problem: str) -> str:
    """What stands there instead; nothing of a whole section."""
    power = POWER.fullmatch(given) if isinstance(given, str) and problem in ("float_type", "int_type") else None
    if power:
        number, sign, exponent = power.groups()
        written = f"{number}{'' if '.' in number else '.0'}e{sign or '+'}{exponent}"
        return f", found {given!r}, which YAML takes for text; write {written}"
    return "" if isinstance(given, dict) else f", found {given!r}"


def _wrong_tag(path: Path, kind: type[Strict], location: list[str], name: str, context: dict[str, Any]) -> str:
    """One sentence for a section whose kind is missing or unknown."""
    tag = f"'{name}.{context['discriminator'].strip(QUOTE)}'"
    known = context.get("expected_tags")
    if known is None:
        return f"{path}: {tag} is missing; choose {', '.join(_known_tags(kind, location))}"
    near = difflib.get_close_matches(context["tag"], [own.strip(QUOTE) for own in known.split(", ")], n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{path}: {tag} is '{context['tag']}', which is unknown; {hint}choose {known}"


def _known_tags(kind: Any, location: list[str]) -> list[str]:
    """The kinds that the section at `location` below `kind` may have."""
    for part in (part for part in location if not part.isdigit()):
        fields = {field.alias or name: field for name, field in kind.model_fields.items()}
        members = _models(fields[part].annotation)
        kind = members[0]
    return [f"'{tag}'" for member in members for tag in _tags_of(member)]


QUOTE = "'"
POWER = re.compile(r"([-+]?\d+\.?\d*)[eE]([-+]?)(\d+)")
"""A number that YAML 1.1 reads as text: it wants a point and the exponent's sign."""
PATTERNS = {
    r"^[0-9a-f]{40}$": "a full commit hash (git ls-remote https://huggingface.co/ID HEAD shows the newest)",
    r"^[a-z]([a-z0-9-]*[a-z0-9])?$": "a name of a-z, 0-9 and '-' that begins with a letter",
}
"""What patterns of the settings ask for, in words."""
TAGS = ("kind", "format", "objective")
"""Fields that tell the members of a union apart."""


def _without_tags(location: list[str], data: Any) -> list[str]:
    """Drops the tags and types that pydantic puts into the location of a union member."""
    kept = []
    for part in location:
        if "[" in part or isinstance(data, str | int | float):
            continue  # the type of a member that has no tag
        if isinstance(data, list) and part.isdigit():
            data = data[int(part)] if int(part) < len(data) else None
            kept.append(part)
            continue
        tags = [data.get(tag) for tag in TAGS] if isinstance(data, dict) else []
        if part in tags and part not in data:
            continue
        kept.append(part)
        data = data.get(part) if isinstance(data, dict) else None
    return kept


def _valid_keys(kind: Any, location: list[str]) -> list[str]:
    """The keys that the settings class at `location` below `kind` accepts."""
    fields = {field.alias or name: field for name, field in kind.model_fields.items()}
    if not location or location[0] not in fields:
        return list(fields)
    members = _models(fields[location[0]].annotation)
    rest = [part for part in location[1:] if not part.isdigit()]
    if len(members) > 1 and rest:
        tagged = [member for member in members if rest[0] in _tags_of(member)]
        members, rest = tagged or members, rest[1:] if tagged else rest
    return _valid_keys(members[0], rest) if members else []


def _models(annotation: Any) -> list[Any]:
    """The settings classes inside an annotation: of lists, unions and annotated types."""
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def _tags_of(model: Any) -> tuple[Any, ...]:
    return tuple(
        value
        for tag in TAGS
        if tag in model.model_fields
        for value in getattr(model.model_fields[tag].annotation, "__args__", ())
    )
