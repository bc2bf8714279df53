"""MMBench-EN dev: a question may be asked several times with its options rotated, and is right if all its rows are.

The rotated copies of row 7 have the indexes 1000007, 2000007 … The rule is that of lmms-eval's task
`mmbench_en_dev_static`, the one without a GPT judge.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from haplovl.evaluate.benchmarks.multiple_choice import ABCD, BY_LETTER
from haplovl.evaluate.benchmarks.option_letters import last_marked_letter, vlmevalkit
from haplovl.evaluate.benchmarks.rules import (
    LETTERS,
    LMMS_EVAL,
    Benchmark,
    Judgement,
    Record,
    Reference,
    columns,
    filled,
    hit,
    mean,
    mean_score,
    means_by,
    number,
    one_of,
)

ROTATION = 1_000_000
"""What lies between the indexes of a row and its next rotated copy."""
ABSENT = "nan"
"""What the published table holds where a question has no such option, or no hint."""
SHARED = ("question", "category", "L2-category")
"""What the rotated copies of a question have in common."""
_FIVE = LETTERS[:5]
_WRAPPED = ("{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
"""A letter as a word of its own: bare, then in the brackets and punctuation that lmms-eval tries, in its order."""


def _is_missing(value: Any) -> bool:
    return value is None or value != value  # NaN is the only value that is not itself


def options_of(record: Record) -> dict[str, str]:
    """The options that a question really has."""
    found = {letter: record.get(letter) for letter in _FIVE}
    return {
        letter: option for letter, option in found.items() if not _is_missing(option) and option not in ("", ABSENT)
    }


def _row(record: Record, answer: str) -> Judgement:
    """lmms-eval's `prefetch_answer`, then its `extract_mcq_answer`: a word, else an option's text, else any letter."""
    said = answer.strip()
    # The text 'nan' of an absent option is compared like any other: so does lmms-eval, on 'banana' too.
    options = {letter: record.get(letter, ABSENT) for letter in ABCD}
    options = {letter: option for letter, option in options.items() if not _is_missing(option)}
    letter = _by_word(said) or _by_text(said, options) or last_marked_letter(said, list(options))
    return hit(letter == _gold(record), letter)


def _by_word(answer: str) -> str | None:
    if "Failed to obtain answer via API" in answer:
        return None
    words = answer.split()
    for form in _WRAPPED:
        named = [letter for letter in _FIVE if form.format(letter) in words]
        # A bare A in a longer answer might be an article.
        if len(named) == 1 and not (form == "{}" and named == ["A"] and len(words) > 3):
            return named[0]
    return None


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    inside = [letter for letter, option in options.items() if option.lower() in answer.lower()]
    return inside[0] if len(inside) == 1 else None


def _gold(record: Record) -> str:
    return record["answer"].strip().upper()


def _question(record: Record) -> int:
    return record["index"] % ROTATION


def _all_rows(records: Sequence[Record], judgements: Sequence[Judgement]) -> list[Judgement]:
    wrong = {_question(record) for record, row in zip(records, judgements, strict=True) if row.score != 1.0}
    return [
        Judgement(float(_question(record) not in wrong), row.parsed)
        for record, row in zip(records, judgements, strict=True)
    ]


def _aggregate(records: Sequence[Record], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Shares of questions; `vanilla` are those asked once, `circular` those asked with rotated options as well.

    `rows` is the looser count: the share of rows answered rightly, each for itself.
    """
    asked = Counter(map(_question, records))
    main = [i for i, record in enumerate(records) if record["index"] < ROTATION]

    def shares(chosen: list[int]) -> dict[str, Any]:
        found = [judgements[i] for i in chosen]
        result: dict[str, Any] = {"overall": mean_score(found)}
        for name, column in (("category", "category"), ("l2", "L2-category")):
            result[name] = means_by([records[i][column] for i in chosen], found)
        return {**result, "n": len(chosen)}

    result = shares(main)
    rows = [float(row.parsed == _gold(record)) for record, row in zip(records, judgements, strict=True)]
    result |= {"rows": mean(rows), "n_rows": len(rows)}
    for name, chosen in (
        ("vanilla", [i for i in main if asked[_question(records[i])] == 1]),
        ("circular", [i for i in main if asked[_question(records[i])] > 1]),
    ):
        if chosen:
            result[name] = shares(chosen)
    return result


def _option(value: Any) -> str | None:
    return None if _is_missing(value) or isinstance(value, str) else "a string, or null where there is none"


def _check(record: Record) -> str | None:
    options = options_of(record)
    return None if _gold(record) in options else f"a question whose answer is one of its options ({', '.join(options)})"


def _check_all(records: Sequence[Record]) -> str | None:
    main = {record["index"]: record for record in records if record["index"] < ROTATION}
    for record in records:
        copied = f"row {record['index']} is a rotated copy of row {_question(record)}"
        first = main.get(_question(record))
        if first is None:
            return f"{copied}, which is missing"
        other = next((column for column in SHARED if record[column].split() != first[column].split()), None)
        if other:
            return f"{copied}, but its {other!r} is another"
    return None


def _prompt(record: Record) -> str:
    hint = record.get("hint")
    asked = record["question"] if _is_missing(hint) or hint == ABSENT else f"{hint} {record['question']}"
    lines = [f"{letter}. {option}" for letter, option in options_of(record).items()]
    return "\n".join([f"{asked} There are several options:", *lines, "", BY_LETTER])


MMBENCH_EN_DEV = Benchmark(
    name="mmbench_en_dev",
    title="MMBench-EN dev",
    dataset="lmms-lab/MMBench, en",
    split="dev",
    published=4_329,
    optional=dict.fromkeys(("hint", "C", "D", "E"), _option),
    tabled=("hint", "C", "D"),
    fields={
        "index": lambda value: None if number(value) is None and value >= 0 else "a whole number from 0",
        "question": filled,
        "A": _option,
        "B": _option,
        "answer": one_of(*_FIVE),
        "category": filled,
        "L2-category": filled,
    },
    columns=columns("index question hint answer A B C D E category image source L2-category comment split"),
    prompt=_prompt,
    references={
        LMMS_EVAL: Reference(
            _row, "lmms-eval 0.7.3 tasks/mmbench/mmbench_evals.py MMBench_Evaluator.eval_result (eval_method='static')"
        ),
        "vlmevalkit": vlmevalkit(options_of, _gold),
    },
    aggregate=_aggregate,
    headline=("overall",),
    max_new_tokens=128,
    key=lambda record: record["index"],
    check=_check,
    check_all=_check_all,
    group=_question,
    settle=_all_rows,
)
