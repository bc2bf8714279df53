"""MMMU val: multiple choice with up to nine options, and open questions.

lmms-eval and the official program guess at random where they find no option in an answer. We do not: such an answer is
wrong, and is counted as unparsed.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from haplovl.evaluate.benchmarks.multiple_choice import BY_LETTER
from haplovl.evaluate.benchmarks.option_letters import vlmevalkit
from haplovl.evaluate.benchmarks.rules import (
    LMMS_EVAL,
    Benchmark,
    Judgement,
    Record,
    Reference,
    Rule,
    columns,
    filled,
    hit,
    lettered,
    mean_score,
    option_lines,
    texts,
)
from haplovl.evaluate.benchmarks.short_answers import BRIEFLY

CHOICE, OPEN = "multiple-choice", "open"
DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine"),
        *("Pharmacy", "Public_Health"),
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics"),
        *("Energy_and_Power", "Materials", "Mechanical_Engineering"),
    ),
}
_ID = re.compile(r"validation_(.+?)_\d+")
_PICTURE = re.compile(r"<image (\d+)>")


# ---- multiple choice

_ENDS = (",", ".", "!", "?", ";", ":", "'")


def chosen_letter(answer: str, options: Mapping[str, str], blank_before: bool, before_period: bool) -> str | None:
    """The option in an answer: as '(A)', else 'A ', else 'A.', else (in more than five words) by its text.

    Of several the one said last counts. With `before_period` this is `parse_mmmu_multi_choice_response` of lmms-eval;
    with `blank_before`, a blank on both sides of 'A', the official `parse_multi_choice_response`. None where both would
    guess.
    """
    for mark in _ENDS:
        answer = answer.strip(mark)
    text = f" {answer} "
    forms = [("({})", "({})"), (" {} " if blank_before else "{} ", " {} ")]
    if before_period:
        forms.append(("{}.", " {} "))  # so ties between 'A.' and 'B.' go to the first: neither stands between blanks
    for form, place in forms:
        named = [letter for letter in options if form.format(letter) in text]
        if named:
            return max(named, key=lambda letter: text.rfind(place.format(letter)))
    if len(text.split()) <= 5:
        return None
    lowered = text.lower()
    named = [letter for letter, option in options.items() if option.lower() in lowered]
    return max(named, key=lambda letter: lowered.rfind(options[letter].lower()), default=None)


# ---- open questions

_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""Numbers with thousands separators, in scientific notation, and plain ones."""


def _value(text: str) -> list[str | float]:
    """A number rounded to two decimals, or the text in lower case; a single letter asks for a blank beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def _key_parts(answer: str) -> list[str]:
    """The shortest text behind a word like 'is ' in every line (and behind '=' in the last); else the whole answer."""
    whole = answer.strip().strip(".").lower()
    lines, parts = whole.split("\n"), []
    for number, line in enumerate(lines, 1):
        keys = (*_KEYS, "=") if number == len(lines) else _KEYS
        shortest = ""
        for key in keys:
            if key in line:
                tail = line.split(key)[-1].strip()
                shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in list(":,.!?;'"):
            parts.append(shortest)
    return parts or [whole]


def open_candidates(answer: str) -> list[str | float]:
    """What an open answer may have meant: its key parts and the numbers in them, each once."""
    parts = _key_parts(answer)
    found = [*parts, *(number for part in parts for form in _NUMBERS for number in form.findall(part))]
    return list(dict.fromkeys(value for text in found for value in _value(text)))


def _open(record: Record, answer: str) -> Judgement:
    """Right if a right answer's text is inside a candidate, or its number equals one."""
    candidates = open_candidates(answer)
    right = [value for gold in _golds(record) for value in _value(gold)]
    within = any(
        any(isinstance(value, str) and value in candidate for value in right)
        if isinstance(candidate, str)
        else candidate in right
        for candidate in candidates
    )
    return hit(within, [str(candidate) for candidate in candidates])


# ---- records


def options_of(record: Record) -> list[str]:
    """The options of a multiple-choice question: the published table holds them as the text of a Python list."""
    options = record.get("options")
    if not isinstance(options, str):
        return list(options or [])
    try:
        found = ast.literal_eval(options)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return list(found) if isinstance(found, list | tuple) else []


def _golds(record: Record) -> list[str]:
    answer = record["answer"]
    return [answer] if isinstance(answer, str) else list(answer)


def _is_choice(record: Record) -> bool:
    return record["question_type"] == CHOICE


def _rule(blank_before: bool, before_period: bool) -> Rule:
    def rule(record: Record, answer: str) -> Judgement:
        if not _is_choice(record):
            return _open(record, answer)
        letter = chosen_letter(answer.strip(), lettered(options_of(record)), blank_before, before_period)
        return hit(letter in _golds(record), letter)

    return rule


def _vlmevalkit_options(record: Record) -> dict[str, str]:
    """VLMEvalKit turns an open question into one with two options: the right answer and 'Other Answers'."""
    if _is_choice(record):
        return lettered(options_of(record))
    answer = record["answer"]
    return {"A": answer if isinstance(answer, str) else str(list(answer)), "B": "Other Answers"}


def _vlmevalkit_gold(record: Record) -> str:
    return record["answer"] if _is_choice(record) and isinstance(record["answer"], str) else "A"


def _aggregate(records: Sequence[Record], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Accuracy of all questions, by type, by domain and subject; `parsed_only` leaves the unparsed answers out.

    `parsed_only` is what remains of the references' numbers when their random guesses are taken away.
    """
    everything = list(range(len(records)))
    kinds = {"all": everything} | {
        kind: [i for i in everything if _is_choice(records[i]) == (kind == CHOICE)] for kind in (CHOICE, OPEN)
    }

    def shares(chosen: list[int]) -> dict[str, Any]:
        found = [judgements[i] for i in chosen]
        return {"acc": mean_score(found), "n": len(found), "unparsed": sum(row.parsed is None for row in found)}

    def parsed(chosen: list[int]) -> dict[str, Any]:
        found = [judgements[i] for i in chosen if judgements[i].parsed is not None]
        return {"acc": mean_score(found), "n": len(found)}

    subjects: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        subjects.setdefault(_subject(record), []).append(i)
    domains = {name: [i for part in parts for i in subjects.get(part, [])] for name, parts in DOMAINS.items()}
    return {
        **{kind: shares(chosen) for kind, chosen in kinds.items() if chosen},
        "parsed_only": {kind: parsed(chosen) for kind, chosen in kinds.items() if chosen},
        "domains": {name: shares(chosen) for name, chosen in domains.items() if chosen},
        "subjects": {name: shares(subjects[name]) for name in sorted(subjects)},
    }


def _subject(record: Record) -> str:
    found = _ID.fullmatch(record["id"])
    return found[1] if found else ""


def _prompt(record: Record) -> str:
    if _is_choice(record):
        return f"{record['question']}\n{option_lines(options_of(record))}\n\n{BY_LETTER}"
    return f"{record['question']}\n{BRIEFLY}"


def _pictures(record: Record) -> tuple[str, ...]:
    """The columns of the pictures that question and options name, in order."""
    named = _PICTURE.findall(_prompt(record))
    return tuple(sorted({f"image_{number}" for number in named}))


def _check(record: Record) -> str | None:
    if not any(_subject(record) in subjects for subjects in DOMAINS.values()):
        return "a question of the validation split, with an id like validation_Art_1 and one of MMMU's subjects"
    if not _is_choice(record):
        return None
    options = options_of(record)
    if texts(options) is not None:
        return "a multiple-choice question with options: a list of strings, or the text of one"
    if not set(_golds(record)) <= set(lettered(options)):
        return f"a question whose answer is one of its options ({', '.join(lettered(options))})"
    return None


def _answer(value: Any) -> str | None:
    return None if filled(value) is None or texts(value) is None else "a string or a list of strings"


MMMU_VAL = Benchmark(
    name="mmmu_val",
    title="MMMU val",
    dataset="lmms-lab/MMMU",
    split="validation",
    published=900,
    fields={
        "id": filled,
        "question": filled,
        "options": lambda value: None if isinstance(value, str | list | tuple) else "a list, or the text of one",
        "answer": _answer,
        "question_type": lambda value: None if value in (CHOICE, OPEN) else f"{CHOICE} or {OPEN}",
    },
    columns=columns(
        "id question options explanation answer question_type img_type topic_difficulty subfield "
        "image_1 image_2 image_3 image_4 image_5 image_6 image_7"
    ),
    prompt=_prompt,
    references={
        LMMS_EVAL: Reference(
            _rule(blank_before=False, before_period=True),
            "lmms-eval 0.7.3 tasks/mmmu/utils.py mmmu_process_results, evaluate_mmmu; no random guess",
        ),
        "official_mmmu": Reference(
            _rule(blank_before=True, before_period=False),
            "MMMU-Benchmark/MMMU@44b45b5 eval/eval_utils.py parse_multi_choice_response, eval_open; no random guess",
        ),
        "vlmevalkit": vlmevalkit(_vlmevalkit_options, _vlmevalkit_gold),
    },
    aggregate=_aggregate,
    headline=("all", "acc"),
    max_new_tokens=128,
    key=lambda record: record["id"],
    check=_check,
    pictures=_pictures,
)
