"""The profile of a validated data set, and how far two profiles are apart (drift)."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from haplovl.files import ACCEPTED, DATA_PROFILE, read_json, require, write_json

LENGTHS = ("question_characters", "answer_characters", "turns", "images")
SIZES = ("image_width", "image_height")
WORDS_KEPT = 1000
"""Most frequent answer words that a profile lists; the rest is one number."""
WORDS_COUNTED = 200_000
"""Words that are counted exactly at a time: beyond twice as many, the rarest are forgotten."""
STEPS = 4
"""Bins per doubling of a length or size."""


class Profile:
    """Counts what a data set is like, batch by batch; the same batches in the same order give the same profile."""

    def __init__(self) -> None:
        self.shares: dict[str, Counter[str]] = {"sources": Counter(), "splits": Counter(), "kinds": Counter()}
        self.bins: dict[str, Counter[int]] = {name: Counter() for name in (*LENGTHS, *SIZES)}
        self.words: Counter[str] = Counter()
        self.word_total = 0
        self.records = self.turns = 0

    def add(self, batch: pa.Table) -> None:
        """Takes in rows of the validated table."""
        self.records += batch.num_rows
        for name, column in (("sources", "source"), ("splits", "split"), ("kinds", "kind")):
            self.shares[name].update(_counts(batch[column]))
        turns, images = batch["turns"], batch["images"]
        inner = pc.list_flatten(turns)
        answers = pc.struct_field(inner, "answer")
        self.turns += len(inner)
        self._measure("turns", pc.list_value_length(turns))
        self._measure("images", pc.list_value_length(images))
        self._measure("question_characters", pc.utf8_length(pc.struct_field(inner, "question")))
        self._measure("answer_characters", pc.utf8_length(answers))
        flat = pc.list_flatten(images)
        self._measure("image_width", pc.struct_field(flat, "width"))
        self._measure("image_height", pc.struct_field(flat, "height"))
        self._count_words(answers)

    def to_json(self) -> dict[str, Any]:
        """The profile as `haplovl data accept` keeps it."""
        listed = sorted(self.words.items(), key=lambda item: (-item[1], item[0]))[:WORDS_KEPT]
        return {
            "records": self.records,
            **{name: dict(sorted(counts.items())) for name, counts in self.shares.items()},
            "bins_per_doubling": STEPS,
            **{name: {str(edge): count for edge, count in sorted(c.items())} for name, c in self.bins.items()},
            "answer_words": {"total": self.word_total, "most_frequent": dict(listed)},
        }

    def _measure(self, name: str, values: pa.ChunkedArray) -> None:
        numbers = values.to_numpy()
        # Bin 0 holds 0; bin k holds what lies from 2 ** ((k - 1) / STEPS) on.
        bins = np.where(numbers > 0, 1 + np.floor(STEPS * np.log2(np.maximum(numbers, 1))), 0).astype(np.int64)
        edges, counts = np.unique(bins, return_counts=True)
        self.bins[name].update(dict(zip(edges.tolist(), counts.tolist(), strict=True)))

    def _count_words(self, answers: pa.ChunkedArray) -> None:
        words = pc.list_flatten(pc.split_pattern_regex(pc.utf8_lower(answers), r"[^\pL\pM\pN]+"))
        found = _counts(words)
        found.pop("", None)
        self.word_total += sum(found.values())
        self.words.update(found)
        if len(self.words) > 2 * WORDS_COUNTED:
            kept = sorted(self.words.items(), key=lambda item: (-item[1], item[0]))[:WORDS_COUNTED]
            self.words = Counter(dict(kept))


def _counts(values: pa.ChunkedArray) -> dict[str, int]:
    return {row["values"]: row["counts"] for row in pc.value_counts(values).to_pylist()}


def distances(profile: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """How far two profiles are apart, 0 (alike) to 1 (nothing in common), by what is compared.

    The total variation distance: half the sum of the differences of shares, which is the share of records (turns,
    pictures, words) that would have to change for the two to be alike. Of lengths and sizes the largest is told.
    """
    return {
        "sources": _apart(profile["sources"], reference["sources"]),
        "kinds": _apart(profile["kinds"], reference["kinds"]),
        "lengths": max(_apart(profile[name], reference[name]) for name in LENGTHS),
        "image_sizes": max(_apart(profile[name], reference[name]) for name in SIZES),
        "vocabulary": _apart(*(_word_shares(each["answer_words"]) for each in (profile, reference))),
    }


def _apart(one: dict[str, float], other: dict[str, float]) -> float:
    totals = sum(one.values()), sum(other.values())
    if not all(totals):
        return float(any(totals))
    names = sorted({*one, *other})
    return round(sum(abs(one.get(n, 0) / totals[0] - other.get(n, 0) / totals[1]) for n in names) / 2, 6)


def _word_shares(words: dict[str, Any]) -> dict[str, float]:
    """Counts of the listed words, and under the empty name of all others."""
    listed = words["most_frequent"]
    return {**listed, "": words["total"] - sum(listed.values())}


def accept(profile: Path = DATA_PROFILE, accepted: Path = ACCEPTED) -> None:
    """Keeps the profile that `validate` wrote last as the accepted one, which later data is compared with.

    Raises:
        UserError: nothing was validated yet.
    """
    found = read_json(require(profile, made_by="validate"))
    write_json(accepted, found)
    print(f"accepted {found['records']} records as they are: {accepted}, which belongs into git")
