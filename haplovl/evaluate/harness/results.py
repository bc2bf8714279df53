"""What lmms-eval wrote → metrics/benchmarks/NAME.json and reports/benchmarks/NAME.jsonl, free of paths and dates."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from haplovl.errors import UserError
from haplovl.evaluate.benchmarks.catalogue import result_name
from haplovl.evaluate.harness.environment import VERSION, Environment, task_sha256
from haplovl.evaluate.harness.folders import Folder
from haplovl.files import METRICS, REPORTS, sha256_of, write_json, write_whole

BENCHMARKS = "benchmarks"


@dataclass(frozen=True)
class Run:
    """What all benchmarks of one command have in common."""

    model: Path
    model_sha256: str
    processes: int
    limit: int | None
    batch: int
    environment: Environment
    facts: dict[str, Any]
    """Device, number of GPUs and versions, see `probe`."""

    seeds: str = "0,1234,1234,1234"
    """lmms-eval's own: of Python's random numbers (MMMU's guesses), numpy, torch (sampling) and few-shot examples."""

    def asked(self, folder: Folder) -> int:
        """The number of questions that are asked of a benchmark."""
        return folder.questions if self.limit is None else min(self.limit, folder.questions)

    def name(self, folder: Folder) -> str:
        """The name of a benchmark's files."""
        return result_name(folder.task.name, self.limit)


def collect(run: Run, folder: Folder, output: Path) -> dict[str, Any]:
    """Writes the metrics and the answers of one benchmark; returns the metrics.

    Raises:
        UserError: lmms-eval did not answer every question once.
    """
    task, name = folder.task, run.name(folder)
    found = json.loads(next(iter(output.rglob("*_results.json"))).read_text(encoding="utf-8"))
    samples = _samples(output, task.local)
    if [sample["doc_id"] for sample in samples] != list(range(run.asked(folder))):
        raise UserError(f"lmms-eval answered {len(samples)} questions of {task.title}, not {run.asked(folder)}")
    results = {key: value for key, value in found["results"][task.local].items() if _is_figure(key, value)}
    if task.metric not in results:
        raise UserError(f"lmms-eval gave no {task.metric.split(',')[0]} for {task.title}")
    answers = REPORTS / BENCHMARKS / f"{name}.jsonl"
    lines = [_line(task.metric, row, sample) for row, sample in zip(folder.rows(), samples, strict=False)]
    write_whole(answers, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    metrics = {
        "benchmark": task.name,
        "title": task.title,
        "metric": task.metric.split(",")[0],
        "score": round(results[task.metric] / task.scale, 6),
        "questions": len(samples),
        "published_questions": task.published,
        "limit": run.limit,
        "results": results,
        "harness": {"name": "lmms-eval", "version": VERSION, "task": task.stock, "source": task.source},
        "task_sha256": task_sha256(task, run.environment.tasks),
        "data_sha256": folder.sha256,
        "model_sha256": run.model_sha256,
        "answers": {"file": answers.as_posix(), "sha256": sha256_of(answers)},
        "prompt": _prompt(run.model, samples[0]["input"]),
        "generation": found["configs"][task.local]["generation_kwargs"],
        "seeds": run.seeds,
        "batch_size": run.batch,
        "processes": run.processes,
        "precision": _precision(output.parent / "log.txt"),
        **run.facts,
    }
    write_json(METRICS / BENCHMARKS / f"{name}.json", metrics)
    return metrics


def summary_table(written: Sequence[dict[str, Any]]) -> Table:
    """The figures for the terminal."""
    table = Table(title=f"Published benchmarks, lmms-eval {VERSION}")
    table.add_column("benchmark")
    table.add_column("metric")
    for name in ("score", "questions", "published"):
        table.add_column(name, justify="right")
    for one in written:
        score = f"{one['score']:.4f}"
        table.add_row(one["title"], one["metric"], score, str(one["questions"]), str(one["published_questions"]))
    return table


def _samples(output: Path, task: str) -> list[dict[str, Any]]:
    path = next(iter(output.rglob(f"*_samples_{task}.jsonl")), None)
    lines = [] if path is None else path.read_text(encoding="utf-8").split("\n")
    samples = [json.loads(line) for line in lines if line]
    return sorted(samples, key=lambda sample: sample["doc_id"])


def _line(metric: str, record: dict[str, Any], sample: dict[str, Any]) -> dict[str, Any]:
    """One question: its record without pictures, the prompt, the raw answer, and how lmms-eval judged it."""
    filtered = _only(sample["filtered_resps"])
    judged = sample.get(metric.split(",")[0])
    if isinstance(judged, dict):  # without what the record says already
        judged = {key: value for key, value in judged.items() if key not in record or record[key] != value}
    tokens = _only(sample.get("token_counts")) or {}
    return {
        "number": sample["doc_id"],
        "record": record,
        "prompt": sample["input"],
        "prediction": _only(sample.get("resps", filtered)),
        "filtered": filtered,
        "target": sample["target"],
        "judged": judged,
        "tokens_in": tokens.get("input_tokens"),
        "tokens_out": tokens.get("output_tokens"),
    }


def _precision(log: Path) -> str:
    """The type of the numbers that the adapter computed with, as it said."""
    found = re.search(r"haplovl computes in (\w+)", log.read_text(encoding="utf-8"))
    return found[1] if found else "unknown"


def _is_figure(key: str, value: Any) -> bool:
    """Standard errors are left out: lmms-eval gives F1, precision and recall those of the accuracy."""
    return isinstance(value, (int, float)) and "_stderr" not in key


def _only(value: Any) -> Any:
    """What lists of one hold."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value


def _prompt(folder: Path, text: str) -> dict[str, str]:
    """Which chat template every prompt was put into, and the first prompt as the model read it."""
    from haplovl.evaluate.harness.answering import rendered_with_pictures
    from haplovl.model import HaploProcessor

    processor = HaploProcessor.from_pretrained(folder)
    return {
        "chat_template_sha256": hashlib.sha256(processor.chat_template.encode()).hexdigest(),
        "first": rendered_with_pictures(processor, text),
    }
