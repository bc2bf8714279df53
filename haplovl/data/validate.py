"""`haplovl validate`: judges every record; bad ones go to data/quarantine/ with the reason, good ones are listed.

gather.py     one pass over the raw data, by many processes: facts of every entry, every picture decoded once
findings.py   what only all of them together tell, as a table of facts
suite.py      the Great Expectations suite that judges the table, and its data docs
profile.py    what the accepted data is like, and how far it is from the last accepted version
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from haplovl.data.contamination import Benchmarks, read_benchmarks
from haplovl.data.entry_facts import ReadEntries
from haplovl.data.findings import Findings, numbered
from haplovl.data.gather import gather_entries, gather_pictures
from haplovl.data.media import Media
from haplovl.data.picture_facts import ReadPictures
from haplovl.data.profile import Profile, distances
from haplovl.data.sources import Collected, entries, read_sources
from haplovl.data.suite import CHECKS, Judge
from haplovl.data.validated import FILE_NAME as VALIDATED_FILE
from haplovl.data.validated import IMAGES, SCHEMA, write_tables
from haplovl.data_settings import ValidateSettings
from haplovl.errors import UserError
from haplovl.files import (
    ACCEPTED,
    DATA_PROFILE,
    METRICS,
    QUARANTINE,
    RAW,
    REPORTS,
    VALIDATED,
    read_json,
    whole_folder,
    write_json,
)
from haplovl.records import SPLITS
from haplovl.settings import Params

QUARANTINE_FILE = "records.jsonl"
Reasons = dict[int, list[str]]
"""Why a row is bad, for every bad row."""


def validate(
    params: Params,
    raw: Path = RAW,
    validated: Path = VALIDATED,
    quarantine: Path = QUARANTINE,
    docs: Path = REPORTS / "data_docs",
    metrics: Path = METRICS / "validation.json",
    profile: Path = DATA_PROFILE,
    accepted: Path = ACCEPTED,
    processes: int | None = None,
) -> None:
    """Writes the validated records, the quarantine, the data docs, the profile and the metrics; `validated` comes last.

    The outs are the same whatever the number of processes (default: one for every core).

    Raises:
        UserError: there is nothing to validate, no record is good, more than the allowed share is bad, or the data
            drifted too far from the accepted profile. All but `validated` is there for inspection then.
    """
    shutil.rmtree(validated, ignore_errors=True)
    settings = params.validate_
    sources = read_sources(raw)
    benchmarks = read_benchmarks(settings.benchmarks, settings.benchmark_question_words, settings.max_image_pixels)
    with _work_folder(validated) as work:
        with whole_folder(docs) as site:
            findings = _gather(raw, sources, benchmarks, settings, work, processes)
            judge = Judge()
            reasons, counts = _judge_all(judge, findings)
            found = Profile()
            with whole_folder(quarantine) as folder:
                for table in write_tables(work, _divide(findings, reasons, folder / QUARANTINE_FILE)):
                    found.add(table)
            summary = _summary(findings, found, reasons, counts)
            if benchmarks.counts:
                summary["benchmarks"] = {"sets": benchmarks.counts, **findings.overlap()}
            write_json(profile, found.to_json())
            too_far = _judge_drift(judge, found, accepted, settings, summary)
            judge.write_docs(site)
        write_json(metrics, summary)
        # Only now: the docs of a bad set are there, too.
        limit, path = settings.max_quarantined_share, quarantine / QUARANTINE_FILE
        if bad := _too_bad(summary, reasons, limit, path) or too_far:
            raise UserError(bad)
        with whole_folder(validated) as folder:
            (work / VALIDATED_FILE).rename(folder / VALIDATED_FILE)
    splits = ", ".join(f"{count} {name}" for name, count in summary["splits"].items())
    print(f"accepted {summary['accepted']} of {summary['records']} records ({splits}) into {validated}; ", end="")
    print(f"quarantined {summary['quarantined']} into {quarantine / QUARANTINE_FILE}")


@contextmanager
def _work_folder(validated: Path) -> Iterator[Path]:
    """A folder beside `validated` (the same disk) for what waits to be decided on."""
    folder = validated.with_name(validated.name + ".work")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _gather(
    raw: Path,
    sources: list[Collected],
    benchmarks: Benchmarks,
    settings: ValidateSettings,
    work: Path,
    processes: int | None,
) -> Findings:
    words = settings.benchmark_question_words if benchmarks.questions else None
    read = ReadEntries(settings.max_characters, settings.degenerate_repeats, words)
    items = (item for source in sources for item in entries(raw, source))
    names, total = [source.name for source in sources], sum(source.records for source in sources)
    known = gather_entries(items, read, work / "entries.arrow", names, benchmarks.questions, total, processes)
    if not len(known.rows.readable):
        raise UserError("the sources hold no record")
    compared = frozenset(source.name for source in sources if source.settings.near_duplicates is not None)
    look = ReadPictures(Media(raw), settings.max_image_pixels, compared)
    return Findings.of(known, gather_pictures(known, look, processes), sources, benchmarks, settings)


# --- judgement -----------------------------------------------------------------------------------------------------
def _judge_all(judge: Judge, findings: Findings) -> tuple[Reasons, dict[str, int]]:
    """The reasons by row of every record that fails, and how many records fail each check."""
    reasons: Reasons = {}
    counts = {check.name: 0 for check in CHECKS}
    for table in findings.tables():
        first = int(table["row"].iloc[0])
        failed = judge.failed(table)
        for check in CHECKS:
            counts[check.name] += len(failed[check.name])
            for row in failed[check.name]:
                facts = table.iloc[row - first].to_dict()
                reasons.setdefault(row, []).append(f"{check.name}: {check.reason.format(**facts)}")
    return reasons, counts


def _judge_drift(
    judge: Judge, found: Profile, accepted: Path, settings: ValidateSettings, summary: dict[str, Any]
) -> str:
    """Compares the profile with the accepted one, notes the distances in the summary, and says what moved too far."""
    reference = read_json(accepted) if accepted.exists() else {}
    if not reference:
        return ""
    try:
        apart = distances(found.to_json(), reference)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{accepted} is no profile of data: {error}") from None
    summary["drift"] = apart
    limits = settings.drift.model_dump()
    moved = [f"{name} by {apart[name]:.3f} (limit {limits[name]})" for name in judge.too_far(apart, limits)]
    if not moved:
        return ""
    return (
        f"the data drifted from the accepted version in {accepted}: {', '.join(moved)}; "
        "'haplovl data accept' makes it the accepted version, 'validate.drift' in params.yaml holds the limits"
    )


def _summary(findings: Findings, found: Profile, reasons: Reasons, counts: dict[str, int]) -> dict[str, Any]:
    rows = len(findings.rows.readable)
    good = np.ones(rows, dtype=bool)
    good[list(reasons)] = False
    shares = found.shares
    return {
        "records": rows,
        "accepted": rows - len(reasons),
        "quarantined": len(reasons),
        "quarantined_share": round(len(reasons) / rows, 6),
        "reasons": counts,
        "sources": dict(sorted(shares["sources"].items())),
        "splits": {name: shares["splits"][name] for name in SPLITS},
        "kinds": {name: shares["kinds"][name] for name in ("instruction", "caption", "text")},
        "images": len(np.unique(findings.rows.pictures[good[findings.rows.row_of]])),
        "turns": found.turns,
        "duplicates": findings.duplicates(),
    }


def _too_bad(summary: dict[str, Any], reasons: Reasons, limit: float, path: Path) -> str:
    """Why the data cannot go on, if it cannot."""
    # Judged from the counts: the share in the summary is rounded.
    bad, records = summary["quarantined"], summary["records"]
    if not bad or (summary["accepted"] and bad / records <= limit):
        return ""
    top = max(summary["reasons"], key=summary["reasons"].__getitem__)
    first = next(reason for row in sorted(reasons) for reason in reasons[row] if reason.startswith(f"{top}: "))
    example = " ".join(first.removeprefix(f"{top}: ").split())
    why = f"most often because of '{top}' (first: {example:.200}); see {path}"
    if not summary["accepted"]:
        return f"none of the {records} records can be used, {why}"
    return (
        f"{bad} of {records} records ({bad / records:.1%}) were quarantined, more than the limit of {limit:.1%} "
        f"(validate.max_quarantined_share), {why}"
    )


# --- outputs -------------------------------------------------------------------------------------------------------
def _divide(findings: Findings, reasons: Reasons, path: Path) -> Iterator[pa.Table]:
    """Writes the bad entries to the quarantine file, and yields the good ones as tables of validated records."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for start, batch in findings.entries.batches():
            bad = [row for row in range(start, start + batch.num_rows) if row in reasons]
            file.writelines(_quarantined(batch, start, bad, reasons))
            good = np.ones(batch.num_rows, dtype=bool)
            good[[row - start for row in bad]] = False
            if good.any():
                yield _validated(findings, batch, start, good)


def _quarantined(batch: pa.RecordBatch, start: int, bad: Iterable[int], reasons: Reasons) -> Iterator[str]:
    for row in bad:
        facts = {name: batch[name][row - start].as_py() for name in ("source", "file", "position", "id", "raw")}
        raw = facts.pop("raw")
        # The entry is JSON already.
        yield json.dumps({**facts, "reasons": reasons[row]}, ensure_ascii=False)[:-1] + f', "data": {raw}}}\n'


def _validated(findings: Findings, batch: pa.RecordBatch, start: int, good: np.ndarray) -> pa.Table:
    chosen = np.flatnonzero(good)
    rows = findings.rows
    table = pa.Table.from_batches([batch]).take(pa.array(chosen))
    counts = np.diff(rows.starts)[start + chosen]
    numbers = np.concatenate([rows.pictures[rows.starts[row] : rows.starts[row + 1]] for row in start + chosen])
    columns = {name: table[name] for name in ("kind", "source", "system", "turns")}
    ids, added = table["id"].to_pylist(), findings.numbers[start + chosen]
    columns["id"] = pa.array([numbered(id_, n) if n else id_ for id_, n in zip(ids, added.tolist(), strict=True)])
    columns["split"] = pa.array([SPLITS[number] for number in findings.splits.split[start + chosen]])
    columns["images"] = _images(findings, counts, numbers)
    return pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)


def _images(findings: Findings, counts: np.ndarray, numbers: np.ndarray) -> pa.Array:
    """The `images` column of rows with `counts` pictures each, `numbers` in all."""
    named = findings.pictures.table.take(pa.array(numbers))
    columns = {
        "path": named["ref"].combine_chunks(),
        "sha256": pa.array([digest.hex() for digest in named["sha256"].to_pylist()], type=pa.string()),
        "width": named["width"].combine_chunks(),
        "height": named["height"].combine_chunks(),
    }
    arrays = [
        column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks) for column in columns.values()
    ]
    offsets = pa.array(np.r_[0, np.cumsum(counts)], type=pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(arrays, fields=list(IMAGES.value_type)))
