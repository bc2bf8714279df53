"""What validation found out about every entry, as the table of facts that the Great Expectations suite judges."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from haplovl.data.across import NO_SPLIT, Rows, SharedPictures, Splits, assign_splits, earlier_same, shared_pictures
from haplovl.data.contamination import Benchmarks
from haplovl.data.gather import Entries, Pictures
from haplovl.data.similar import group_similar
from haplovl.data.sources import Collected
from haplovl.data_settings import SplitShares, ValidateSettings
from haplovl.records import SPLITS

if TYPE_CHECKING:
    import pandas as pd

ROWS_JUDGED = 100_000
"""Entries in one table of facts."""
COLUMNS = [
    *("source", "file", "position", "id", "entry_error", "conversation_error", "degenerate_answers"),
    *("encoding_error", "placeholders", "stray_placeholders", "blank_messages"),
]
"""Facts of single entries that the table takes over."""


@dataclass
class Findings:
    """Everything that is known; the arrays over pictures and over `rows.pictures` are explained where they are made."""

    entries: Entries
    pictures: Pictures
    shared: SharedPictures
    splits: Splits
    settings: ValidateSettings
    leaked: np.ndarray
    """Pictures that are in an evaluation set, or look like one there."""

    @classmethod
    def of(
        cls,
        entries: Entries,
        pictures: Pictures,
        sources: list[Collected],
        benchmarks: Benchmarks,
        settings: ValidateSettings,
    ) -> "Findings":
        """Compares all entries and pictures with each other and with the evaluation sets."""
        own = [source.settings for source in sources]
        limits = [-1 if each.near_duplicates is None else each.near_duplicates for each in own]
        shared, leaked = _compare(pictures, _distances(pictures, sources, limits), benchmarks, max(limits))
        shares = [each.split if isinstance(each.split, SplitShares) else settings.splits for each in own]
        broken = entries.rows.first_where(~pictures.fine[entries.rows.pictures]) >= 0
        usable = entries.rows.readable & ~broken
        splits = assign_splits(entries.rows, shared, usable, shares)
        return cls(entries, pictures, shared, splits, settings, leaked)

    @property
    def rows(self) -> Rows:
        """The short columns over all entries."""
        return self.entries.rows

    def tables(self) -> Iterator["pd.DataFrame"]:
        """The table of facts in parts of ROWS_JUDGED rows: every column that a check of the suite names."""
        import pandas as pd

        at = {name: self.rows.first_where(mask) for name, mask in self._masks().items()}
        earlier = earlier_same(self.rows.ids, self.rows.readable)
        counts, tellers = np.diff(self.rows.starts), self._tellers()
        for start, facts in _parts(self.entries.batches(COLUMNS)):
            rows = slice(start, start + facts.num_rows)
            # dtype=object keeps None: a column without any error would become a column of NaN floats.
            table = {name: pd.Series(facts[name].to_pylist(), dtype=object) for name in COLUMNS}
            zero = {name: table[name].fillna(0).astype("int64") for name in COLUMNS[-3:]}
            table |= zero | {"row": pd.Series(range(rows.start, rows.stop)), "images": pd.Series(counts[rows])}
            table["surplus_placeholders"] = table["placeholders"] - table["images"]
            table["earlier_same_id"] = pd.Series(earlier[rows])
            for name, tell in tellers.items():
                table[name] = pd.Series([None if k < 0 else tell(k) for k in at[name][rows].tolist()], dtype=object)
            table["contamination"][self._asked_only(rows)] = "a question is, word for word, in an evaluation set"
            yield pd.DataFrame(table)

    def _masks(self) -> dict[str, np.ndarray]:
        """For every check on pictures, which elements of `rows.pictures` fail it."""
        pictures, at = self.pictures, self.rows.pictures
        short, long = np.minimum(pictures.width, pictures.height), np.maximum(pictures.width, pictures.height)
        limits = self.settings
        odd = pictures.fine & ((short < limits.min_image_side) | (long > limits.max_aspect_ratio * short))
        split = self.splits.split[self.rows.row_of]
        return {
            "image_error": ~pictures.fine[at],
            "image_size_error": odd[at],
            "split_conflict": _only(len(at), self.splits.copied),
            "near_duplicate": _only(len(at), self.splits.similar),
            "contamination": self.leaked[at] & (split != SPLITS.index("test")),
        }

    def _tellers(self) -> dict[str, Any]:
        """For every check on pictures, what to say about an element of `rows.pictures` that fails it."""
        row_of = self.rows.row_of
        claimants = self._claimants()

        def name(k: int) -> str:
            return self.pictures.name(int(self.rows.pictures[k]))

        def split(k: int) -> str:
            return SPLITS[self.splits.split[row_of[k]]]

        def size(k: int) -> str:
            number = self.rows.pictures[k]
            return f"{name(k)}: {self.pictures.width[number]}x{self.pictures.height[number]} pixels"

        def similar(k: int) -> str:
            other = self.pictures.name(int(claimants[self.shared.look[self.rows.pictures[k]]]))
            return f"{name(k)} in {split(k)} looks like {other} in {SPLITS[self.splits.similar_owner[k]]}"

        return {
            "image_error": lambda k: f"{name(k)}: {self.pictures.error(int(self.rows.pictures[k]))}",
            "image_size_error": size,
            "split_conflict": lambda k: f"{name(k)} in {split(k)} is also in {SPLITS[self.splits.copied_owner[k]]}",
            "near_duplicate": similar,
            "contamination": lambda k: f"{name(k)} is, or looks like, a picture of an evaluation set",
        }

    def _claimants(self) -> np.ndarray:
        """For every group of pictures that look alike, the first one that its owning split holds."""
        split = self.splits.split[self.rows.row_of]
        at = np.flatnonzero((split == self.splits.similar_owner) & (split != NO_SPLIT))[::-1]
        first = np.full(len(self.shared.look), -1)
        first[self.shared.look[self.rows.pictures[at]]] = self.rows.pictures[at]
        return first

    def _asked_only(self, rows: slice) -> np.ndarray:
        """Entries that a question alone gives away: beside a picture, the same question may ask for something else."""
        held_out = self.splits.split[rows] == SPLITS.index("test")
        return self.entries.asked[rows] & (np.diff(self.rows.starts)[rows] == 0) & ~held_out

    def duplicates(self) -> dict[str, int]:
        """How many pictures repeat others, in all splits together: byte for byte, and beyond that by their look."""
        fine = np.flatnonzero(self.pictures.fine)
        contents, looks = (len(np.unique(groups[fine])) for groups in (self.shared.content, self.shared.look))
        return {"copied_pictures": len(fine) - contents, "similar_pictures": contents - looks}

    def overlap(self) -> dict[str, int]:
        """How many records share a picture, and a question, with an evaluation set, whatever their split."""
        pictured = self.rows.first_where(self.leaked[self.rows.pictures]) >= 0
        asked = self.entries.asked
        return {"records_with_shared_picture": int(pictured.sum()), "records_with_shared_question": int(asked.sum())}


def _distances(pictures: Pictures, sources: list[Collected], limits: list[int]) -> np.ndarray:
    """The distance within which each picture counts as the same as another, by its source; -1 for none."""
    by_name = {source.name: limit for source, limit in zip(sources, limits, strict=True)}
    coded = pa.concat_arrays(pictures.table["source"].chunks) if len(pictures.fine) else pa.array([], type=pa.string())
    coded = coded.dictionary_encode()
    known = np.array([by_name[name] for name in coded.dictionary.to_pylist()], dtype=np.int64)
    distances = known[coded.indices.to_numpy(zero_copy_only=False)] if len(known) else np.empty(0, dtype=np.int64)
    return np.where(pictures.hashed, distances, -1)


def _compare(
    pictures: Pictures, distances: np.ndarray, benchmarks: Benchmarks, widest: int
) -> tuple[SharedPictures, np.ndarray]:
    """Which pictures are the same, and which of them are in an evaluation set."""
    shared = shared_pictures(pictures.sha256, pictures.look, distances, pictures.fine)
    leaked = np.zeros(len(distances), dtype=bool)
    if benchmarks.sha256:
        leaked |= np.fromiter((row.tobytes() in benchmarks.sha256 for row in pictures.sha256), bool, len(leaked))
    looks = benchmarks.look_array()
    if widest >= 0 and len(looks):
        # Grouped together with the evaluation sets' pictures: a group with one of them is theirs.
        both = np.r_[pictures.look, looks], np.r_[distances, np.full(len(looks), widest)]
        groups = group_similar(*both)
        leaked |= np.isin(groups[: len(leaked)], groups[len(leaked) :])
    return shared, leaked


def _only(count: int, chosen: np.ndarray) -> np.ndarray:
    """A mask of `count` elements, true at the chosen indices; -1 chooses nothing."""
    mask = np.zeros(count, dtype=bool)
    mask[chosen[chosen >= 0]] = True
    return mask


def _parts(batches: Iterator[tuple[int, pa.RecordBatch]]) -> Iterator[tuple[int, pa.Table]]:
    """The batches joined to tables of about ROWS_JUDGED rows, each with the row that it starts at."""
    waiting: list[pa.RecordBatch] = []
    begin = rows = 0
    for start, batch in batches:
        if not waiting:
            begin, rows = start, 0
        waiting.append(batch)
        rows += batch.num_rows
        if rows >= ROWS_JUDGED:
            yield begin, pa.Table.from_batches(waiting)
            waiting = []
    if waiting:
        yield begin, pa.Table.from_batches(waiting)
