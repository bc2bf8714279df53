"""Benchmarks whose answer is a word or a phrase: GQA and VQAv2."""

import string
from collections.abc import Callable, Sequence
from statistics import mean as exact_mean
from typing import Any

from haplovl.evaluate.benchmarks import vqa_text
from haplovl.evaluate.benchmarks.rules import (
    LMMS_EVAL,
    Benchmark,
    Judgement,
    Record,
    Reference,
    anything,
    columns,
    filled,
    hit,
    identity,
    mean_score,
    means_by,
)

BRIEFLY = "\nAnswer the question using a single word or phrase."
REALWORLDQA_ASKS = "Please answer directly"
"""RealWorldQA's questions end with an instruction of their own: its rows are no GQA rows with an id."""
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def asked_briefly(record: Record) -> str:
    """lmms-eval's prompt of GQA, VQAv2 and POPE."""
    return record["question"] + BRIEFLY


# ---- GQA


def bare(answer: str) -> str:
    """Lower case without ASCII punctuation, as numpy's string functions in lmms-eval do it.

    They keep the text's number of characters: where lower case is longer (İ), the rest is cut off.
    """
    return answer.lower()[: len(answer)].translate(_NO_PUNCTUATION).rstrip("\0")


def _gqa(record: Record, answer: str) -> Judgement:
    """lmms-eval's `exact_match`: the same letters and digits, in any case."""
    said = bare(answer.strip())
    return hit(said == bare(record["answer"]), said)


def _gqa_vlmevalkit(record: Record, answer: str) -> Judgement:
    """VLMEvalKit's `process_line` with the method accuracy: the same text, in any case."""
    said = answer.strip().lower()
    return hit(said == record["answer"].strip().lower(), said)


def _gqa_check(record: Record) -> str | None:
    return "a GQA question, not one of RealWorldQA" if REALWORLDQA_ASKS in record["question"] else None


def _gqa_id(value: Any) -> str | None:
    """What else has an id, a question and an answer has names for ids, such as this project's own predictions."""
    return None if identity(value) is None and str(value).strip().isdigit() else "a number, as ids of GQA are"


GQA = Benchmark(
    name="gqa",
    title="GQA",
    dataset="lmms-lab/GQA, testdev_balanced_instructions and testdev_balanced_images",
    split="testdev",
    published=12_578,
    optional={"imageId": anything},
    fields={"id": _gqa_id, "question": filled, "answer": filled},
    columns=columns(
        "id imageId image question answer fullAnswer isBalanced groups entailed equivalent types "
        "annotations semantic semanticStr"
    ),
    prompt=asked_briefly,
    references={
        LMMS_EVAL: Reference(_gqa, "lmms-eval 0.7.3 api/metrics.py exact_match (ignore_case, ignore_punctuation)"),
        "vlmevalkit": Reference(_gqa_vlmevalkit, "VLMEvalKit@e8e78f0 dataset/utils/vqa_eval.py process_line accuracy"),
    },
    aggregate=lambda records, judgements: {"exact_match": mean_score(judgements)},
    headline=("exact_match",),
    max_new_tokens=16,
    key=lambda record: str(record["id"]),
    check=_gqa_check,
)


# ---- VQAv2


def _agreement(record: Record, said: str, form: Callable[[str], str]) -> float:
    """Mean over the annotators of min(1, n/3), n being how many of the *others* say the same.

    The others are those at other places of the list. lmms-eval leaves out all entries that equal the annotator's own,
    which comes to the same while each has an `answer_id`, and would lose the agreeing ones without.
    """
    answers = [form(entry["answer"]) for entry in record["answers"]]
    agreeing = answers.count(said)
    return float(exact_mean([min(1, (agreeing - (answer == said)) / 3) for answer in answers]))


def _vqa_form(answer: str) -> str:
    return vqa_text.plain_words(vqa_text.without_punctuation(vqa_text.one_line(answer)))


def _vqa(record: Record, answer: str) -> Judgement:
    """lmms-eval's `vqav2_process_results`: answers and annotations are normalised, always."""
    said = _vqa_form(answer)
    return Judgement(_agreement(record, said, _vqa_form), said)


def _vqa_official(record: Record, answer: str) -> Judgement:
    """The official `VQAEval.evaluate` normalises only where annotators disagree: where all say 'two', '2' is wrong."""

    def form(text: str) -> str:
        punctuated = vqa_text.without_punctuation(vqa_text.one_line(text), vqa_text.THOUSANDS)
        return vqa_text.plain_words(punctuated)

    unanimous = len({vqa_text.one_line(entry["answer"]) for entry in record["answers"]}) == 1
    if unanimous:
        form = vqa_text.one_line
    said = form(answer)
    return Judgement(_agreement(record, said, form), said)


def _vqa_vlmevalkit(record: Record, answer: str) -> Judgement:
    """VLMEvalKit's `process_line` with the method vqa_score, as it scores TextVQA."""

    def form(text: str) -> str:
        plain = vqa_text.without_punctuation(
            vqa_text.one_line(text), vqa_text.THOUSANDS, vqa_text.PERIODS_BETWEEN_WORDS
        )
        return vqa_text.plain_words(plain)

    said = form(answer)
    return Judgement(_agreement(record, said, form), said)


def _annotations(value: Any) -> str | None:
    good = isinstance(value, list | tuple) and value
    good = good and all(isinstance(entry, dict) and isinstance(entry.get("answer"), str) for entry in value)
    return None if good else "a list of the annotators' answers, each an object with a string 'answer'"


def _vqa_aggregate(records: Sequence[Record], judgements: Sequence[Judgement]) -> dict[str, Any]:
    result: dict[str, Any] = {"mean": mean_score(judgements)}
    for column in ("answer_type", "question_type"):
        if all(isinstance(record.get(column), str) for record in records):
            result[column] = means_by([record[column] for record in records], judgements)
    return result


VQAV2 = Benchmark(
    name="vqav2",
    title="VQAv2",
    dataset="lmms-lab/VQAv2",
    split="validation",
    published=214_354,
    optional={"question_type": anything, "answer_type": anything},
    fields={"question_id": identity, "question": filled, "answers": _annotations},
    columns=columns("question_id question answers question_type answer_type multiple_choice_answer image_id image"),
    prompt=asked_briefly,
    references={
        LMMS_EVAL: Reference(_vqa, "lmms-eval 0.7.3 tasks/vqav2/utils.py vqav2_process_results_val"),
        "official_vqa": Reference(_vqa_official, "GT-Vision-Lab/VQA@a013f00 vqaEvaluation/vqaEval.py VQAEval.evaluate"),
        "vlmevalkit": Reference(_vqa_vlmevalkit, "VLMEvalKit@e8e78f0 dataset/utils/vqa_eval.py process_line vqa_score"),
    },
    aggregate=_vqa_aggregate,
    headline=("mean",),
    max_new_tokens=16,
    key=lambda record: str(record["question_id"]),
)
