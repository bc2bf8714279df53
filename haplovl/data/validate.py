"""`haplovl validate`: judges every record; bad ones go to data/quarantine/ with the reason, good ones are listed.

One pass over the annotation files and the images collects facts, one row per entry; the Great Expectations suite of
`suite.py` judges the table; a second pass over the annotation files writes what it decided.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haplovl.data.media import Media
from haplovl.data.sources import Collected, entries, read_sources
from haplovl.data.suite import CHECKS, judge
from haplovl.data.validated import ImageFile, ValidatedRecord, write_validated
from haplovl.data_settings import SplitShares
from haplovl.errors import UserError
from haplovl.files import METRICS, QUARANTINE, RAW, REPORTS, VALIDATED, whole_folder, write_json
from haplovl.pictures import ImageError, decode_bytes
from haplovl.records import (
    IMAGE_PLACEHOLDER,
    SPLITS,
    ConversationError,
    RawItem,
    Record,
    RecordError,
    parse_record,
    write_jsonl,
)
from haplovl.settings import Params

if TYPE_CHECKING:
    import pandas as pd

QUARANTINE_FILE = "records.jsonl"
DATA_LIMIT = 10_000
"""Characters of an entry that quarantine keeps."""
ImageName = tuple[str, str]
"""A source's name and the reference of one of its images."""
HELD_OUT = {"train": 0, "validation": 1, "test": 2}
"""How strongly a split claims an image that occurs in several: the highest keeps it."""


@dataclass(slots=True)
class Facts:
    """What is known about one entry; a row of the table that the suite judges. Errors are None where there is none."""

    row: int
    source: str
    file: str
    position: int
    id: str | None = None
    split: str | None = None
    kind: str | None = None
    turns: int = 0
    images: int = 0
    placeholders: int = 0
    entry_error: str | None = None
    conversation_error: str | None = None
    image_error: str | None = None
    surplus_placeholders: int = 0
    stray_placeholders: int = 0
    blank_messages: int = 0
    earlier_same_id: int = 0
    split_conflict: str | None = None


def validate(
    params: Params,
    raw: Path = RAW,
    validated: Path = VALIDATED,
    quarantine: Path = QUARANTINE,
    docs: Path = REPORTS / "data_docs",
    metrics: Path = METRICS / "validation.json",
) -> None:
    """Writes the validated records, the quarantine, the data docs and the metrics; `validated` comes last.

    Raises:
        UserError: there is nothing to validate, no record is good, or more than the allowed share is bad. Quarantine,
            docs and metrics are there for inspection then, `validated` is not.
    """
    shutil.rmtree(validated, ignore_errors=True)
    settings = params.validate_
    sources = read_sources(raw)
    facts, paths = _read_facts(raw, sources)
    named = {(known.source, path) for known, own in zip(facts, paths, strict=True) for path in own}
    images = inspect_images(raw, named, settings.max_image_pixels)
    _add_image_facts(facts, paths, images)
    _add_splits(facts, paths, images, _shares(sources, settings.splits))
    reasons, counts = _judge_all(facts, docs)
    with whole_folder(quarantine) as folder:
        write_jsonl(folder / QUARANTINE_FILE, _quarantined(raw, sources, facts, reasons))
    summary = _summary(facts, paths, reasons, counts)
    write_json(metrics, summary)
    _stop_if_bad(summary, settings.max_quarantined_share, quarantine / QUARANTINE_FILE)
    with whole_folder(validated) as folder:
        write_validated(folder, _accepted(raw, sources, facts, images, reasons))
    splits = ", ".join(f"{count} {name}" for name, count in summary["splits"].items())
    print(f"accepted {summary['accepted']} of {summary['records']} records ({splits}) into {validated}; ", end="")
    print(f"quarantined {summary['quarantined']} into {quarantine / QUARANTINE_FILE}")


# --- facts ---------------------------------------------------------------------------------------------------------
def _items(raw: Path, sources: list[Collected]) -> Iterator[RawItem]:
    """Every entry of every source; its number in this order is its row."""
    for source in sources:
        yield from entries(raw, source)


def _shares(sources: list[Collected], default: SplitShares) -> dict[str, SplitShares]:
    """What every source holds out of the records that name no split."""
    own = {source.name: source.settings.split for source in sources}
    return {name: split if isinstance(split, SplitShares) else default for name, split in own.items()}


def _read_facts(raw: Path, sources: list[Collected]) -> tuple[list[Facts], list[tuple[str, ...]]]:
    """The facts that need no image, and the image paths of every entry."""
    facts, paths = [], []
    seen: Counter[str] = Counter()
    for row, item in enumerate(_items(raw, sources)):
        known = Facts(row, item.source, item.file, item.position, id=_id_of(item))
        record = _parse(item, known)
        if record is not None:
            _add_text_facts(known, record)
            known.earlier_same_id = seen[record.id]
            seen[record.id] += 1
        facts.append(known)
        paths.append(record.images if record else ())
    return facts, paths


def _parse(item: RawItem, known: Facts) -> Record | None:
    if item.error:
        known.entry_error = item.error
        return None
    try:
        return parse_record(item.data)
    except ConversationError as error:
        known.conversation_error = str(error)
    except RecordError as error:
        known.entry_error = str(error)
    return None


def _id_of(item: RawItem) -> str | None:
    """The entry's id as far as it can be told, so that quarantine can name even what cannot be read."""
    if item.error:
        found = re.match(r'\s*\{\s*"id"\s*:\s*"?([^",}\s]+)', item.raw)
        return found[1] if found else None
    id_ = item.data.get("id") if isinstance(item.data, dict) else None
    return str(id_) if isinstance(id_, str | int) else None


def _add_text_facts(known: Facts, record: Record) -> None:
    outside = [record.system, *(turn.answer for turn in record.turns)]
    known.id, known.split, known.kind = record.id, record.split or None, record.kind
    known.turns, known.images, known.placeholders = len(record.turns), len(record.images), record.placeholders
    known.surplus_placeholders = record.placeholders - len(record.images)
    known.stray_placeholders = sum(text.count(IMAGE_PLACEHOLDER) for text in outside)
    # A question may be the image alone (caption data); an answer needs text of its own.
    known.blank_messages = sum(
        (not turn.question.strip()) + (not turn.answer.replace(IMAGE_PLACEHOLDER, "").strip()) for turn in record.turns
    )


def inspect_images(raw: Path, named: Iterable[ImageName], max_pixels: int) -> dict[ImageName, ImageFile | str]:
    """Decodes every image once: (source, reference) → what it is, or why it cannot be used."""
    media = Media(raw)

    def inspect(name: ImageName) -> ImageFile | str:
        try:
            data = media.read(*name)
            width, height = decode_bytes(data, max_pixels).size
        except ImageError as error:
            return str(error)
        return ImageFile(name[1], hashlib.sha256(data).hexdigest(), width, height)

    ordered = sorted(named)
    # Threads suffice: Pillow's decoders and the hash work outside the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(ordered, pool.map(inspect, ordered), strict=True))


def _add_image_facts(
    facts: list[Facts], paths: list[tuple[str, ...]], images: dict[ImageName, ImageFile | str]
) -> None:
    for known, own in zip(facts, paths, strict=True):
        found = ((path, images[known.source, path]) for path in own)
        known.image_error = next((f"{path}: {why}" for path, why in found if isinstance(why, str)), None)


# --- splits --------------------------------------------------------------------------------------------------------
def split_of(key: str, shares: SplitShares) -> str:
    """The split that a hex sha256 falls into: its place in 0…1, test first, then validation, then train."""
    place = int(key[:16], 16) / 2**64
    if place < shares.test:
        return "test"
    return "validation" if place < shares.test + shares.validation else "train"


def _add_splits(
    facts: list[Facts],
    paths: list[tuple[str, ...]],
    images: dict[ImageName, ImageFile | str],
    shares: dict[str, SplitShares],
) -> None:
    """Gives a split to records that name none, and marks those whose image a more strongly held-out split owns."""
    usable = [known.kind is not None and known.image_error is None for known in facts]
    owner: dict[str, str] = {}
    for known, own, fine in zip(facts, paths, usable, strict=True):
        if not fine:
            continue
        # By content, so that all questions about one image land in one split, whatever the file is called.
        key = images[known.source, own[0]].sha256 if own else hashlib.sha256(known.id.encode()).hexdigest()
        known.split = known.split or split_of(key, shares[known.source])
        for path in own:
            sha256 = images[known.source, path].sha256
            owner[sha256] = max(known.split, owner.get(sha256, known.split), key=HELD_OUT.__getitem__)
    for known, own, fine in zip(facts, paths, usable, strict=True):
        owners = ((path, owner[images[known.source, path].sha256]) for path in own if fine)
        lost = next(((path, split) for path, split in owners if split != known.split), None)
        if lost is not None:
            known.split_conflict = f"{lost[0]} in {known.split} is also in {lost[1]}"


# --- judgement -----------------------------------------------------------------------------------------------------
def _judge_all(facts: list[Facts], docs: Path) -> tuple[dict[int, list[str]], dict[str, int]]:
    """The reasons by row of every record that fails, and how many records fail each check."""
    if not facts:
        raise UserError("the annotation files hold no record")
    with whole_folder(docs) as folder:
        failed = judge(_table(facts), folder)
    reasons: dict[int, list[str]] = {}
    for check in CHECKS:
        for row in failed[check.name]:
            reasons.setdefault(row, []).append(f"{check.name}: {check.reason.format(**asdict(facts[row]))}")
    good = [known for known in facts if known.row not in reasons]
    if good and any(judge(_table(good)).values()):
        raise RuntimeError("accepted records fail the suite that accepted them; this is a bug in haplovl.data.validate")
    return reasons, {name: len(rows) for name, rows in failed.items()}


def _table(facts: list[Facts]) -> "pd.DataFrame":
    import pandas as pd

    # dtype=object keeps None: a column without any error would become a column of NaN floats.
    return pd.DataFrame({f.name: pd.Series([getattr(k, f.name) for k in facts], dtype=object) for f in fields(Facts)})


def _summary(
    facts: list[Facts], paths: list[tuple[str, ...]], reasons: dict[int, list[str]], counts: dict[str, int]
) -> dict[str, Any]:
    good = [known for known in facts if known.row not in reasons]
    splits, kinds = (Counter(getattr(known, name) for known in good) for name in ("split", "kind"))
    return {
        "records": len(facts),
        "accepted": len(good),
        "quarantined": len(reasons),
        "quarantined_share": round(len(reasons) / len(facts), 6),
        "reasons": counts,
        "splits": {name: splits[name] for name in SPLITS},
        "kinds": {name: kinds[name] for name in ("instruction", "caption", "text")},
        "images": len({(known.source, path) for known in good for path in paths[known.row]}),
        "turns": sum(known.turns for known in good),
    }


def _stop_if_bad(summary: dict[str, Any], limit: float, path: Path) -> None:
    # Judged from the counts: the share in the summary is rounded.
    bad, records = summary["quarantined"], summary["records"]
    top = max(summary["reasons"], key=summary["reasons"].__getitem__)
    if not summary["accepted"]:
        raise UserError(f"none of the {records} records can be used, most often because of '{top}'; see {path}")
    if bad / records > limit:
        raise UserError(
            f"{bad} of {records} records ({bad / records:.1%}) were quarantined, more than the limit of {limit:.1%} "
            f"(validate.max_quarantined_share), most often because of '{top}'; see {path}"
        )


# --- outputs -------------------------------------------------------------------------------------------------------
def _quarantined(
    raw: Path, sources: list[Collected], facts: list[Facts], reasons: dict[int, list[str]]
) -> Iterator[dict[str, Any]]:
    for known, item in zip(facts, _items(raw, sources), strict=True):
        if known.row in reasons:
            place = {"source": known.source, "file": known.file, "position": known.position, "id": known.id}
            yield {**place, "reasons": reasons[known.row], "data": _bounded(item)}


def _bounded(item: RawItem) -> Any:
    """The entry as it came, or the beginning of its text where it is long or could not be read."""
    if item.error:
        return item.raw[:DATA_LIMIT]
    text = json.dumps(item.data, ensure_ascii=False)
    return item.data if len(text) <= DATA_LIMIT else text[:DATA_LIMIT]


def _accepted(
    raw: Path,
    sources: list[Collected],
    facts: list[Facts],
    images: dict[ImageName, ImageFile | str],
    reasons: dict[int, list[str]],
) -> Iterator[ValidatedRecord]:
    for known, item in zip(facts, _items(raw, sources), strict=True):
        if known.row not in reasons:
            record = replace(parse_record(item.data), split=known.split)
            yield ValidatedRecord(record, tuple(images[known.source, path] for path in record.images), known.source)
