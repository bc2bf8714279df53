"""Prepared records, read one at a time from their shards; pictures are decoded where they are wanted."""

import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import torch

from haplovl.data.prepare import index_name, read_manifest
from haplovl.errors import UserError
from haplovl.files import PREPARED
from haplovl.model import HaploImageProcessor, HaploProcessor
from haplovl.model.layout import ImageGrid
from haplovl.pictures import ImageError

IGNORE = -100
COLUMNS = ["id", "input_ids", "spans", "images", "sizes"]
OPEN_SHARDS, FOOTERS = 32, 128
"""Shards that a thread keeps open, and shards whose footers all threads keep, about 1 MB each: reading a footer takes
longer than reading a record."""


@dataclass(frozen=True)
class Sample:
    """One record, expanded: token ids, labels (−100 where nothing is learnt), its pictures' files and their grids.

    Shapes: input_ids and labels [tokens] int64.
    """

    id: str
    input_ids: np.ndarray
    labels: np.ndarray
    pictures: list[bytes]
    image_grids: list[ImageGrid]
    image_processor: HaploImageProcessor
    shard: Path

    @property
    def tiles(self) -> int:
        """Tiles of all its pictures."""
        return sum(grid.tiles for grid in self.image_grids)

    def decode(self, pixels: np.ndarray) -> None:
        """Decodes its pictures into `pixels` [tiles, 3, s, s] float32, where a batch has room for them.

        Raises:
            UserError: a picture is damaged, or of another size than announced.
        """
        start = 0
        for number, (picture, grid) in enumerate(zip(self.pictures, self.image_grids, strict=True), 1):
            try:
                self.image_processor.write_tiles(picture, grid, pixels[start : start + grid.tiles])
            except ImageError as error:
                raise _unusable(self.id, self.shard, f"image {number} of {len(self.pictures)}: {error}") from None
            start += grid.tiles

    @property
    def pixel_values(self) -> torch.Tensor | None:
        """[tiles, 3, s, s] float32, decoded now; None without pictures."""
        return decoded([self])


class PreparedRecords:
    """Random access to the records of one split; memory holds a few numbers of each, and no pictures."""

    def __init__(self, split: str, processor: HaploProcessor, folder: Path = PREPARED) -> None:
        shards = [s for s in read_manifest(folder)["shards"] if s["split"] == split]
        if not shards:
            raise UserError(f"{folder} holds no records of the split '{split}'")
        self.processor = processor
        self._paths = [folder / shard["file"] for shard in shards]
        self._open = _OpenShards(lru_cache(maxsize=FOOTERS)(_read_footer))
        self._starts = [0]  # number of the first record of every shard, and of all records
        index = self._read_index(folder / index_name(split))
        self.kinds: list[str] = _words(index["kind"])
        self.sources: list[str] = _words(index["source"])
        self.lengths, self.images = self._count(index)
        """Tokens of every record, those of its pictures included; and its pictures."""
        for shard in shards:
            self._starts.append(self._starts[-1] + shard["records"])
        if self._starts[-1] != len(self.kinds):
            raise UserError(f"{folder} holds other records than its index; prepare the data anew")

    @staticmethod
    def _read_index(path: Path) -> pa.Table:
        with _naming(path):
            return feather.read_table(path)

    def _count(self, index: pa.Table) -> tuple[array, array]:
        """The length and the pictures of every record, each size of a picture looked at once."""
        sizes = index["sizes"].combine_chunks()
        pictures = np.diff(sizes.offsets.to_numpy()) // 2
        edges = sizes.flatten().to_numpy().astype(np.int64).reshape(-1, 2)
        different, which = np.unique(edges[:, 0] << 32 | edges[:, 1], return_inverse=True)
        extra = np.array([self.processor.image_tokens(int(s & 0xFFFFFFFF), int(s >> 32)) - 1 for s in different], int)
        before = np.concatenate([[0], np.cumsum(extra[which])]).astype(np.int64)
        ends = np.cumsum(pictures)
        lengths = index["tokens"].to_numpy() + before[ends] - before[ends - pictures]
        return array("i", lengths.astype(np.int32).tobytes()), array("i", pictures.astype(np.int32).tobytes())

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> Sample:
        """The record, its pictures not yet decoded; may be called by several threads at once.

        Raises:
            UserError: the shard cannot be read, or does not hold what its index announces.
        """
        shard = bisect_right(self._starts, index) - 1
        path = self._paths[shard]
        with _naming(path):
            row = self._open.row(path, index - self._starts[shard])
        sample = self._sample(row, path)
        if len(sample.input_ids) != self.lengths[index]:
            found = f"{len(sample.input_ids)} tokens, but the index announces {self.lengths[index]}"
            raise _unusable(sample.id, path, found)
        return sample

    def _sample(self, row: pa.Table, path: Path) -> Sample:
        name = row["id"][0].as_py()
        ids, spans, sizes = (row[column][0].values.to_numpy() for column in ("input_ids", "spans", "sizes"))
        pictures = row["images"][0].as_py()
        places = ids == self.processor.image_token_id
        found, wanted = sum(picture is not None for picture in pictures), int(places.sum())
        if not found == len(pictures) == wanted:
            raise _unusable(name, path, f"{found} pictures for {wanted} image placeholders")
        if len(sizes) != 2 * wanted:
            raise _unusable(name, path, f"{len(sizes)} edges for {wanted} pictures")
        labels = np.full(len(ids), IGNORE, dtype=np.int64)
        for start, stop in spans.reshape(-1, 2).tolist():
            labels[start:stop] = ids[start:stop]
        look = self.processor.image_processor
        grids = [look.place(height, width).grid for width, height in sizes.reshape(-1, 2).tolist()]
        # Every placeholder, and its label, is repeated once per token of its picture.
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[places] = [self.processor.grid_tokens(grid) for grid in grids]
        full_ids, full_labels = np.repeat(ids.astype(np.int64), repeats), np.repeat(labels, repeats)
        return Sample(name, full_ids, full_labels, pictures, grids, look, path)


def decoded(samples: Sequence[Sample]) -> torch.Tensor | None:
    """The pixels of all pictures [tiles, 3, s, s], each decoded into its place; None without pictures."""
    tiles = list(accumulate((sample.tiles for sample in samples), initial=0))
    if not tiles[-1]:
        return None
    side = samples[0].image_processor.tile_side
    pixels = torch.empty((tiles[-1], 3, side, side))
    for sample, start, stop in zip(samples, tiles, tiles[1:], strict=False):
        sample.decode(pixels.numpy()[start:stop])
    return pixels


def _unusable(record: str, shard: Path, reason: str) -> UserError:
    return UserError(f"record '{record}' in {shard}: {reason}; prepare the data anew")


def _words(column: pa.ChunkedArray) -> list[str]:
    """A column of few different words as a list that holds each of them once."""
    coded = column.combine_chunks().dictionary_encode()
    return np.array([*coded.dictionary.to_pylist(), ""], dtype=object)[coded.indices.to_numpy()].tolist()


class _OpenShards(threading.local):
    """A few open shards of each thread, since a Parquet reader serves one thread at a time; all share `footers`."""

    def __init__(self, footers: Callable[[Path], "_Footer"]) -> None:
        self._footers = footers
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._opened)

    def row(self, path: Path, row: int) -> pa.Table:
        """One row of what a sample needs; only the row group that holds it is read."""
        file, starts = self._open(path)
        group = bisect_right(starts, row) - 1
        return file.read_row_group(group, columns=COLUMNS, use_threads=False).slice(row - starts[group], 1)

    def _opened(self, path: Path) -> tuple[pq.ParquetFile, list[int]]:
        footer, starts = self._footers(path)
        # With pre-buffering, each open file keeps what it read last.
        return pq.ParquetFile(path, metadata=footer, pre_buffer=False), starts


_Footer = tuple[pq.FileMetaData, list[int]]
"""What a shard's end says about its row groups, and the number of the first row of each."""


def _read_footer(path: Path) -> _Footer:
    footer = pq.read_metadata(path)
    counts = (footer.row_group(group).num_rows for group in range(footer.num_row_groups))
    return footer, list(accumulate(counts, initial=0))[:-1]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what pyarrow says about an unreadable file into one sentence that names it."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"the file {path} cannot be read: {error}; prepare the data anew") from None
