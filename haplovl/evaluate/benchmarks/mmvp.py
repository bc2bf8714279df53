"""MMVP: pairs of pictures that look alike to CLIP; a pair counts if both of its questions are answered rightly."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from haplovl.evaluate.benchmarks.multiple_choice import BY_LETTER
from haplovl.evaluate.benchmarks.option_letters import vlmevalkit
from haplovl.evaluate.benchmarks.rules import (
    LMMS_EVAL,
    Benchmark,
    Judgement,
    Record,
    Reference,
    filled,
    hit,
    lettered,
    mean_score,
    number,
    one_of,
    option_lines,
)

_OPTION = re.compile(r"\([a-z]\)\s*([^(]+?)(?=\s*\([a-z]\)|$)", re.IGNORECASE)
_FORMS = tuple(
    re.compile(form, re.IGNORECASE)
    for form in (
        r"^\s*\(?([AB])\)?\.?\s*$",  # the letter alone
        r"^\s*\(?([AB])\)?[\.\s]",  # at the start, before a period or a blank
        r"answer\s+is\s+\(?([AB])\)?",
        r"option\s+\(?([AB])\)?",
        r"\(?([AB])\)?(?:\s|$)",  # at the end of any word: 'Zebra' says A
    )
)


def options_of(record: Record) -> list[str]:
    """The texts of '(a) Left (b) Right'."""
    return [option.strip() for option in _OPTION.findall(record["Options"])]


def _letter(answer: str) -> str | None:
    """lmms-eval's `_extract_answer_letter`: the first form that fits; else the first character, if it is A or B."""
    said = answer.strip()
    for form in _FORMS:
        found = form.search(said)
        if found:
            return found[1].upper()
    return said[0].upper() if said and said[0].upper() in ("A", "B") else None


def _gold(record: Record) -> str:
    return record["Correct Answer"].strip().strip("()").upper()


def _mmvp(record: Record, answer: str) -> Judgement:
    letter = _letter(answer)
    return hit(letter == _gold(record), letter)


def _pair(record: Record) -> int:
    return (record["Index"] - 1) // 2


def _aggregate(records: Sequence[Record], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """`pair_accuracy` is over whole pairs, None without any; questions without partner count only in `accuracy`."""
    pairs: dict[int, list[bool]] = defaultdict(list)
    for record, judgement in zip(records, judgements, strict=True):
        pairs[_pair(record)].append(judgement.score == 1.0)
    whole = [all(pair) for pair in pairs.values() if len(pair) == 2]
    return {
        "accuracy": mean_score(judgements),
        "pair_accuracy": sum(whole) / len(whole) if whole else None,
        "pairs": len(whole),
        "questions_without_partner": len(records) - 2 * len(whole),
    }


MMVP = Benchmark(
    name="mmvp",
    title="MMVP",
    dataset="lmms-lab-eval/MMVP",
    split="train",
    published=300,
    fields={
        "Index": lambda value: None if number(value) is None and value >= 1 else "a whole number from 1",
        "Question": filled,
        "Options": filled,
        "Correct Answer": one_of("(a)", "(b)", "a", "b"),
    },
    columns=frozenset({"Index", "Question", "Options", "Correct Answer", "image", "image_path"}),
    prompt=lambda record: f"{record['Question']}\n{option_lines(options_of(record))}\n{BY_LETTER}",
    references={
        LMMS_EVAL: Reference(_mmvp, "lmms-eval 0.7.3 tasks/mmvp/utils.py mmvp_process_results"),
        "vlmevalkit": vlmevalkit(lambda record: lettered(options_of(record)), _gold),
    },
    aggregate=_aggregate,
    headline=("pair_accuracy",),
    max_new_tokens=16,
    key=lambda record: record["Index"],
    check=lambda record: None if len(options_of(record)) == 2 else "a question with the Options '(a) … (b) …'",
    group=_pair,
)
