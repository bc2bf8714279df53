"""POPE: is there such a thing in the picture, yes or no."""

from collections.abc import Sequence
from typing import Any

from haplovl.evaluate.benchmarks import vqa_text
from haplovl.evaluate.benchmarks.rules import (
    LMMS_EVAL,
    Benchmark,
    Judgement,
    Record,
    Reference,
    columns,
    filled,
    hit,
    identity,
    mean_score,
    one_of,
)
from haplovl.evaluate.benchmarks.short_answers import BRIEFLY

SAMPLINGS = ("random", "popular", "adversarial")
"""How the absent things were chosen."""


def _gold(record: Record) -> str:
    return record["answer"].strip().lower()


def _pope(record: Record, answer: str) -> Judgement:
    """lmms-eval's `pope_process_results`: nothing but the word itself counts, in any case; 'Yes.' is wrong."""
    said = answer.lower().strip()
    return hit(said == _gold(record), said if said in ("yes", "no") else None)


def _pope_llava(record: Record, answer: str) -> Judgement:
    """LLaVA's `eval_pope`: no if the first sentence holds the word No, no or not; all else, even nothing, is yes."""
    first_sentence = answer.strip().split(".")[0].replace(",", "")
    said = "no" if {"No", "no", "not"} & set(first_sentence.split(" ")) else "yes"
    return hit(said == _gold(record), said)


def _pope_vlmevalkit(record: Record, answer: str) -> Judgement:
    """VLMEvalKit's `YOrN_Extraction`: the one of both words that the answer holds; with both or none it is wrong."""
    plain = vqa_text.without_punctuation(answer.lower(), vqa_text.THOUSANDS, vqa_text.PERIODS_BETWEEN_WORDS)
    held = {"yes", "no"} & set(plain.split())
    said = held.pop() if len(held) == 1 else None
    return hit(said == _gold(record), said)


def _rates(records: Sequence[Record], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """As lmms-eval counts: an answer that is neither yes nor no costs accuracy, but neither precision nor recall.

    Its `yes_ratio` is the share of right answers that are yes: a fact about the questions. What the model says is
    `predicted_yes_ratio`.
    """
    pairs = [(_gold(record), judgement.parsed) for record, judgement in zip(records, judgements, strict=True)]
    true_yes, false_yes = pairs.count(("yes", "yes")), pairs.count(("no", "yes"))
    true_no, false_no = pairs.count(("no", "no")), pairs.count(("yes", "no"))
    precision, recall = _share(true_yes, true_yes + false_yes), _share(true_yes, true_yes + false_no)
    return {
        "accuracy": mean_score(judgements),
        "precision": precision,
        "recall": recall,
        "f1_score": _share(2 * precision * recall, precision + recall),
        "yes_ratio": _share(sum(gold == "yes" for gold, _ in pairs), len(pairs)),
        "predicted_yes_ratio": _share(true_yes + false_yes, len(pairs)),
        "true_yes": true_yes,
        "false_yes": false_yes,
        "true_no": true_no,
        "false_no": false_no,
        "neither": len(pairs) - true_yes - false_yes - true_no - false_no,
        "n": len(pairs),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _aggregate(records: Sequence[Record], judgements: Sequence[Judgement]) -> dict[str, Any]:
    result = {"all": _rates(records, judgements)}
    for sampling in SAMPLINGS:
        chosen = [i for i, record in enumerate(records) if record["category"].strip().lower() == sampling]
        if chosen:
            result[sampling] = _rates([records[i] for i in chosen], [judgements[i] for i in chosen])
    return result


POPE = Benchmark(
    name="pope",
    title="POPE",
    dataset="lmms-lab/POPE, default",
    split="test",
    published=9_000,
    fields={
        "question_id": identity,
        "question": filled,
        "answer": one_of("yes", "no"),
        "category": one_of(*SAMPLINGS),
    },
    columns=columns("id question_id question answer category image_source image"),
    prompt=lambda record: record["question"].strip() + BRIEFLY,
    references={
        LMMS_EVAL: Reference(_pope, "lmms-eval 0.7.3 tasks/pope/utils.py pope_process_results"),
        "official_llava": Reference(
            _pope_llava, "haotian-liu/LLaVA@c121f04 llava/eval/eval_pope.py, as RUCAIBox/POPE@3df3ba1 evaluate.py"
        ),
        "vlmevalkit": Reference(_pope_vlmevalkit, "VLMEvalKit@e8e78f0 dataset/utils/yorn.py YOrN_Extraction"),
    },
    aggregate=_aggregate,
    headline=("all", "accuracy"),
    max_new_tokens=128,
    # The three samplings number their questions alike.
    key=lambda record: (record["category"].strip().lower(), str(record["question_id"])),
)
