"""Speed of evaluation: questions per second, beside asking one at a time and beside plain batches, and whether the
answers are the same.

    python benchmarks/evaluation.py [--json FILE] [--root FOLDER] [--questions N] [--precision NAME]

Asks the trained model in models/stage2 questions of the test split, as `haplovl evaluate` does and with its settings.
One at a time means what a script would do without a care for speed: per question the picture is opened, processed, and
given to `generate` with the prompt. Plain batches are the questions in their order, padded, pictures with each of them.
All ways run in this process, on the same loaded model. Where answers differ from those given one at a time, the margin
tells how close the decision was: the difference of the two largest logits, alone, at the first token that differs.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from haplovl.data.media import Media
from haplovl.evaluate.answer import load_model, load_to_evaluate, scored_answers
from haplovl.evaluate.questions import Question, held_out_questions
from haplovl.evaluate.runner import ask_all
from haplovl.files import RAW, STAGE2, VALIDATED
from haplovl.settings import EvaluateSettings, load_params


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of one call, and what it returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def exam(root: Path, count: int) -> list[Question]:
    """So many questions as `haplovl evaluate` chooses them: balanced, and equally many of every type if there are."""
    if count < 1:
        raise SystemExit(f"error: --questions {count}: ask one or more")
    available = Counter(question.kind for question in held_out_questions(count, folder=root / VALIDATED))
    if available.total() < count:
        raise SystemExit(f"error: the test split asks {available.total()} questions, fewer than {count}")
    per_type = next(n for n in range(1, count + 1) if sum(min(n, have) for have in available.values()) >= count)
    return held_out_questions(per_type, folder=root / VALIDATED)[:count]


class Alone:
    """One question at a time: `processor`, then `generate`, and nothing kept for the next one."""

    def __init__(self, model: Any, processor: Any, media: Media, settings: EvaluateSettings) -> None:
        self.model, self.processor, self.media, self.settings = model, processor, media, settings

    def ask(self, questions: list[Question]) -> list[str]:
        """The answer to every question; equal calls are equal work."""
        return [self._decoded(self._generate(self._inputs([question])))[0] for question in questions]

    def ask_in_batches(self, questions: list[Question], batch: int) -> list[str]:
        """The same with so many questions in a batch, in their order."""
        parts = [questions[start : start + batch] for start in range(0, len(questions), batch)]
        return [text for part in parts for text in self._decoded(self._generate(self._inputs(part)))]

    def margin(self, question: Question, other: str) -> float:
        """How far the two likeliest tokens are apart where the answer first differs from another one."""
        out = self._generate(self._inputs([question]), output_scores=True, return_dict_in_generate=True)
        tokenizer = self.processor.tokenizer
        said = out.sequences[0][-len(out.scores) :].tolist()
        known = [tokenizer.decode(said[: step + 1], skip_special_tokens=True).strip() for step in range(len(said))]
        different = next((step for step, text in enumerate(known) if not other.startswith(text)), len(said) - 1)
        first, second = out.scores[different][0].topk(2).values.tolist()
        return first - second

    def _inputs(self, questions: list[Question]) -> dict[str, Any]:
        texts, pictures = [], []
        for question in questions:
            content = [{"type": "image"}] * len(question.images) + [{"type": "text", "text": question.question}]
            messages = [{"role": "user", "content": content}]
            texts.append(self.processor.apply_chat_template(messages, add_generation_prompt=True))
            pictures.append([self.media.open(question.source, image.path) for image in question.images])
        inputs = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    def _generate(self, inputs: dict[str, Any], **options: Any) -> Any:
        self._prompt = inputs["input_ids"].shape[1]
        return self.model.generate(
            **inputs, max_new_tokens=self.settings.max_new_tokens, do_sample=False, **options
        )  # fmt: skip

    def _decoded(self, output_ids: torch.Tensor) -> list[str]:
        texts = self.processor.batch_decode(output_ids[:, self._prompt :], skip_special_tokens=True)
        return [text.strip() for text in texts]


def ways_of_asking(
    model: Any, processor: Any, questions: list[Question], media: Media, settings: EvaluateSettings
) -> dict[str, Callable[[], list[str]]]:
    """What is measured, by name; all give the answers in the order of the questions."""
    texts = [question.question for question in questions]
    pictures = [[(question.source, image.path) for image in question.images] for question in questions]
    alone = Alone(model, processor, media, settings)

    def ask(names: list[list[Any]], open_picture: Callable[[Any], Any]) -> list[str]:
        limits = (settings.batch, settings.max_new_tokens)
        told = {"open_picture": open_picture, "batch_tokens": settings.batch_tokens}
        return [said.text for said in scored_answers(model, processor, texts, names, *limits, **told)]

    # As if every question had pictures of its own.
    own = [[(number, name) for name in names] for number, names in enumerate(pictures)]
    return {
        "evaluation": lambda: ask(pictures, lambda name: media.open(*name)),
        "pictures not shared": lambda: ask(own, lambda name: media.open(*name[1])),
        "plain batches": lambda: alone.ask_in_batches(questions, settings.batch),
        "one at a time": lambda: alone.ask(questions),
    }


def measure(root: Path, count: int, precision: str | None, repeats: int) -> dict[str, Any]:
    """Times of all ways of asking, and how their answers compare."""
    settings, media, questions = load_params(root / "params.yaml").evaluate, Media(root / RAW), exam(root, count)
    load = partial(load_model, dtype=precision) if precision else load_to_evaluate
    loading, (model, processor) = seconds(lambda: load(root / STAGE2))
    for work in ways_of_asking(model, processor, questions[:64], media, settings).values():
        work()  # kernels are chosen, files come into memory
    times: dict[str, list[float]] = {}
    said: dict[str, list[str]] = {}
    ways = ways_of_asking(model, processor, questions, media, settings)
    for way, work in ways.items():
        for _ in range(1 if way == "one at a time" else repeats):
            took, said[way] = seconds(work)
            times.setdefault(way, []).append(took)
    whole, _ = seconds(lambda: ask_all(model, processor, questions, media, settings))
    middle = {way: statistics.median(values) for way, values in times.items()}
    alone = Alone(model, processor, media, settings)
    expected = said["one at a time"]
    margins = {
        way: [alone.margin(q, got) for q, got, own in zip(questions, answers, expected, strict=True) if got != own]
        for way, answers in said.items()
    }
    return {
        "figures": {
            "questions_per_s": count / middle["evaluation"],
            "batched_speedup": middle["one at a time"] / middle["evaluation"],
            "seconds": middle["evaluation"],
            "one_at_a_time_questions_per_s": count / middle["one at a time"],
            "plain_batches_questions_per_s": count / middle["plain batches"],
            "pictures_not_shared_questions_per_s": count / middle["pictures not shared"],
            "with_blanked_seconds": whole,
            "load_seconds": loading,
            "same_answers_share": 1 - len(margins["evaluation"]) / count,
            "largest_margin_of_different": max(margins["evaluation"], default=0.0),
            "plain_batches_same_answers_share": 1 - len(margins["plain batches"]) / count,
        },
        "questions": count,
        "pictures": len({(q.source, image.path) for q in questions for image in q.images}),
        "seconds": times,
        "margins_of_different": margins,
        "precision": str(model.dtype).removeprefix("torch."),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }


def show(report: dict[str, Any]) -> None:
    """The report as a table."""
    machine, figures, count = report["machine"], report["figures"], report["questions"]
    table = Table(title=f"evaluation, {report['precision']}, {machine['threads']} threads, torch {machine['torch']}")
    for i, column in enumerate(("way", "seconds", "questions/s", "× one at a time", "other answers", "largest margin")):
        table.add_column(column, justify="left" if i == 0 else "right")
    slowest = statistics.median(report["seconds"]["one at a time"])
    for way, times in report["seconds"].items():
        took, margins = statistics.median(times), report["margins_of_different"][way]
        largest = f"{max(margins):.2g}" if margins else "-"
        table.add_row(
            way, f"{took:.2f}", f"{count / took:.0f}", f"{slowest / took:.1f}", f"{len(margins)} of {count}", largest
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"{count} questions about {report['pictures']} pictures; with the round on blanked pictures, as `haplovl "
        f"evaluate` asks them, {figures['with_blanked_seconds']:.2f} s; loading {figures['load_seconds']:.1f} s"
    )


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--root", type=Path, default=Path("."), help="project with model and data (default: this one)")
    parser.add_argument("--questions", type=int, default=2000, help="how many to ask (default: 2000)")
    parser.add_argument("--precision", help="as bfloat16 (default: as `haplovl evaluate` loads it)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of all ways but one at a time (default: 3)")
    options = parser.parse_args()
    report = measure(options.root, options.questions, options.precision, options.repeats)
    show(report)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
