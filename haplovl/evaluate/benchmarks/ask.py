"""A model's answers to a benchmark, asked in this process with lmms-eval's prompts, and their scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from haplovl.evaluate.answer import Answer, load_to_evaluate, scored_answers
from haplovl.evaluate.benchmarks.catalogue import find, result_name
from haplovl.evaluate.benchmarks.data import PictureReader, Row, data_digest, picture_digests, read_rows
from haplovl.evaluate.benchmarks.rules import Benchmark
from haplovl.evaluate.benchmarks.scoring import score_records
from haplovl.files import REPORTS, require_writable, sha256_of_folder, write_json
from haplovl.pictures import decode_bytes
from haplovl.progress import reporter

ROWS_AT_A_TIME = 512
"""Rows whose encoded pictures are held in memory; within them, questions of equal length share a batch."""


def run_benchmark(
    name: str, data: Path, folder: Path, limit: int | None, output: Path | None, batch: int, max_new_tokens: int | None
) -> None:
    """Asks the model of a folder, writes answers and scores to a file, and prints the aggregate.

    The file is `output`, or else in reports/benchmarks/, where a limit is part of its name.

    Raises:
        UserError: as `evaluate_benchmark`, there is no such model, or the file cannot be written.
    """
    benchmark = find(name)
    output = output or REPORTS / "benchmarks" / f"{result_name(name, limit)}.json"
    require_writable(output, "--output")
    rows = read_rows(benchmark, data, limit)
    digests = picture_digests(rows)
    model, processor = load_to_evaluate(folder)
    result = evaluate_rows(model, processor, benchmark, rows, digests, batch, max_new_tokens)
    records = result.pop("records")
    result["data"] |= {"path": str(data), "limit": limit}
    result["model"] = {"path": str(folder), "sha256": sha256_of_folder(folder)}
    write_json(output, {**result, "records": records})
    print(summary(benchmark, result))
    print(f"Answers and scores are in {output}")


def evaluate_benchmark(
    model: Any,
    processor: Any,
    name: str,
    data: Path,
    limit: int | None = None,
    batch: int = 64,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """The result of a loaded model on a benchmark, as `evaluate_rows` gives it: for use beside training.

    Raises:
        UserError: as `read_rows` and `picture_digests`.
    """
    benchmark = find(name)
    rows = read_rows(benchmark, data, limit)
    return evaluate_rows(model, processor, benchmark, rows, picture_digests(rows), batch, max_new_tokens)


def evaluate_rows(
    model: Any,
    processor: Any,
    benchmark: Benchmark,
    rows: Sequence[Row],
    digests: Sequence[tuple[str, ...]],
    batch: int,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Asks all questions and scores the answers.

    Returns what `score_records` does, without its lists; `prompts` (whose they are), `max_new_tokens` (default: the
    benchmark's), the `data`'s sha256, and `records` with record, prompt, pictures, prediction, confidence (mean
    log-probability of its tokens), score and parsed answer.

    Raises:
        UserError: a picture went missing since its digest was taken.
    """
    tokens = max_new_tokens or benchmark.max_new_tokens
    prompts = [benchmark.prompt(row.record) for row in rows]
    answers = _ask(model, processor, rows, digests, prompts, batch, tokens)
    records = [
        {
            "record": row.record,
            "prompt": prompt,
            "pictures": list(names),
            "prediction": answer.text,
            "confidence": round(answer.confidence, 3),
        }
        for row, prompt, names, answer in zip(rows, prompts, digests, answers, strict=True)
    ]
    result = score_records(benchmark.name, records)
    for record, score, parsed in zip(records, result.pop("scores"), result.pop("parsed"), strict=True):
        record.update(score=score, parsed=parsed)
    return {
        **result,
        "prompts": "lmms-eval 0.7.3",
        "max_new_tokens": tokens,
        "data": {"sha256": data_digest(rows, digests)},
        "records": records,
    }


def _ask(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    digests: Sequence[tuple[str, ...]],
    prompts: Sequence[str],
    batch: int,
    max_new_tokens: int,
) -> list[Answer]:
    reader, answers = PictureReader(), []
    with reporter("questions", len(rows)) as report:
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            span = slice(start, start + ROWS_AT_A_TIME)
            # Pictures go by their digest: what several questions share has one name, and is held once.
            contents: dict[str, bytes] = {}
            for row, names in zip(rows[span], digests[span], strict=True):
                contents.update(zip(names, reader.read_row(row), strict=True))
            answers += scored_answers(
                model,
                processor,
                prompts[span],
                digests[span],
                batch,
                max_new_tokens,
                open_picture=lambda name, contents=contents: decode_bytes(contents[name]),
                progress=lambda done, start=start: report.update(start + done),
            )
    return answers


def summary(benchmark: Benchmark, result: dict[str, Any]) -> str:
    """The figures for a terminal, a line for each part of the aggregate."""
    head, beside = result["headline"], result["beside"]
    others = [f"{name} {_figure(found['value'])}" for name, found in beside.items()]
    lines = [
        f"{benchmark.title}: {head['metric']} {_figure(head['value'])} over {result['n']} answers "
        f"({result['published']} questions are published), {result['unparsed']} of them unparsed",
        f"  by other references: {', '.join(others)}",
    ]
    for name, value in result["aggregate"].items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        lines.append(f"  {name}: " + ", ".join(f"{part} {_figure(found)}".strip() for part, found in parts))
    return "\n".join(lines)


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_figure(found)}" for name, found in value.items()) + ")"
    if value is None:
        return "undefined"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
