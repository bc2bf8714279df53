"""What a benchmark is here: the fields of its records, its prompt, its scoring rules and its aggregate."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]
Check = Callable[[Any], str | None]
"""Tells what a value must be if it is not that, as the end of the sentence 'the field x must be …'; else None."""

LMMS_EVAL = "lmms_eval"
"""The reference that decides: lmms-eval 0.7.3."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Judgement:
    """What a rule makes of one answer.

    `score` is 0…1; None where the reference defines no score for this record. `parsed` is what the rule read in the
    answer (an option's letter, yes or no, the normalised text), None where it found nothing to compare: an unparsed
    answer is a wrong one.
    """

    score: float | None
    parsed: Any = None


Rule = Callable[[Record, str], Judgement]


@dataclass(frozen=True)
class Reference:
    """A public scorer whose rule is followed; `source` names its repository, version and function."""

    rule: Rule
    source: str


def _row_alone(records: Sequence[Record], judgements: Sequence[Judgement]) -> list[Judgement]:
    return list(judgements)


@dataclass(frozen=True)
class Benchmark:
    """One published benchmark.

    Its data: `dataset` on the Hugging Face hub and its `split`; `keeps` tells which of its rows belong here, and
    `published` how many these are. `fields` are the columns that a record must have, `optional` others that are used
    where present, and `columns` all that the published data set has. `tabled` are those of `optional` that its tables
    hold for every row, where a record alone may leave out what it has not. `check` looks at a record as a whole and
    ends a sentence like a field's check; `check_all` looks at all of them. `key` is what no two records may share
    (None: they have no id). `group` joins records that only count together. `pictures` names the columns of a record's
    pictures in the order they are shown.

    Its rules: `references` by name, `settle` turns the judgements of single rows into those of the questions they
    belong to, and `headline` is where in the aggregate the figure is that people quote. `max_new_tokens` is lmms-eval's
    limit of an answer, or 128 where its task sets none or 1024: the right answers are single letters there.
    """

    name: str
    title: str
    dataset: str
    split: str
    published: int
    fields: Mapping[str, Check]
    columns: frozenset[str]
    prompt: Callable[[Record], str]
    references: Mapping[str, Reference]
    aggregate: Callable[[Sequence[Record], Sequence[Judgement]], dict[str, Any]]
    headline: tuple[str, ...]
    max_new_tokens: int
    key: Callable[[Record], Hashable]
    check: Callable[[Record], str | None] = lambda record: None
    check_all: Callable[[Sequence[Record]], str | None] = lambda records: None
    group: Callable[[Record], Hashable] | None = None
    settle: Callable[[Sequence[Record], Sequence[Judgement]], list[Judgement]] = _row_alone
    optional: Mapping[str, Check] = field(default_factory=dict)
    tabled: tuple[str, ...] = ()
    pictures: Callable[[Record], tuple[str, ...]] = lambda record: ("image",)
    keeps: Callable[[Record], bool] = lambda record: True


def columns(names: str) -> frozenset[str]:
    """Column names from a text with blanks between them."""
    return frozenset(names.split())


def text(value: Any) -> str | None:
    """A string; it may be empty."""
    return None if isinstance(value, str) else "a string"


def filled(value: Any) -> str | None:
    """A string that is not blank."""
    return None if isinstance(value, str) and value.strip() else "a non-empty string"


def one_of(*allowed: str) -> Check:
    """One of a few strings, blanks at the ends and case aside."""
    names = {name.lower() for name in allowed}
    asked = " or ".join((", ".join(allowed[:-1]), allowed[-1])) if len(allowed) > 1 else allowed[0]
    return lambda value: None if isinstance(value, str) and value.strip().lower() in names else asked


def number(value: Any) -> str | None:
    """A whole number; True and False are none."""
    return None if isinstance(value, int) and not isinstance(value, bool) else "a whole number"


def identity(value: Any) -> str | None:
    """An id: a whole number or a string that is not blank."""
    return None if number(value) is None or filled(value) is None else "a whole number or a string"


def texts(value: Any) -> str | None:
    """A list of strings, not empty."""
    good = isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value)
    return None if good else "a list of strings"


def choices(value: Any) -> str | None:
    """A list of strings, not empty, with a letter for each."""
    return None if texts(value) is None and len(value) <= len(LETTERS) else "a list of 1 to 26 strings"


def anything(value: Any) -> str | None:
    """Whatever it is."""
    return None


def maybe(check: Check) -> Check:
    """What a check asks for, or null."""

    def wanted(value: Any) -> str | None:
        asked = None if value is None else check(value)
        return asked and f"{asked}, or null"

    return wanted


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return sum(values) / len(values) if values else None


def defined(judgements: Sequence[Judgement]) -> list[float]:
    """The scores that the reference defines."""
    return [judgement.score for judgement in judgements if judgement.score is not None]


def mean_score(judgements: Sequence[Judgement]) -> float | None:
    """The mean of all defined scores: every record counts once."""
    return mean(defined(judgements))


def by(names: Sequence[Any], judgements: Sequence[Judgement]) -> dict[str, list[Judgement]]:
    """The judgements of every name, in the order in which the names first come."""
    groups: dict[str, list[Judgement]] = {}
    for name, judgement in zip(names, judgements, strict=True):
        groups.setdefault(str(name), []).append(judgement)
    return groups


def means_by(names: Sequence[Any], judgements: Sequence[Judgement]) -> dict[str, float | None]:
    """The mean score of every name, in alphabetical order."""
    return {name: mean_score(group) for name, group in sorted(by(names, judgements).items())}


def hit(right: bool, parsed: Any = None) -> Judgement:
    """A judgement of right or wrong."""
    return Judgement(float(right), parsed)


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Options under the letters A, B, C …"""
    return dict(zip(LETTERS, options, strict=False))


def option_lines(options: Sequence[str]) -> str:
    """Options as lines `A. …`, the form in which lmms-eval asks nearly all multiple-choice questions."""
    return "\n".join(f"{letter}. {option}" for letter, option in lettered(options).items())
