"""Reads prepared shards and yields packed training batches; the position is the number of steps taken."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from haplovl.data.packing import draw_documents, fill_rows, shortest
from haplovl.data.prepare import read_manifest
from haplovl.errors import UserError
from haplovl.files import PREPARED
from haplovl.model import HaploProcessor
from haplovl.model.layout import ImageGrid
from haplovl.model.media import read_grids
from haplovl.settings import BatchSettings, CurriculumPhase, StageMixture

IGNORE = -100


@dataclass
class Batch:
    """Packed rows for one forward pass.

    Shapes: input_ids, labels, document_ids [rows, row tokens] (padding: label −100 and documents of its own);
    pixel_values [tiles, C, H, W] in the order of the image blocks, or None, with the grid of every picture; record_ids
    of everything inside.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    document_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grids: list[ImageGrid]
    record_ids: list[str]

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


@dataclass(frozen=True)
class Sample:
    """One record, expanded: token ids, labels (−100 where nothing is learnt), its pictures' tiles and their grids."""

    id: str
    input_ids: list[int]
    labels: list[int]
    pixel_values: torch.Tensor | None
    image_grids: list[ImageGrid]


class PreparedRecords:
    """Random access to the records of one split; shards are opened when first needed."""

    def __init__(self, split: str, processor: HaploProcessor, folder: Path = PREPARED) -> None:
        shards = [s for s in read_manifest(folder)["shards"] if s["split"] == split]
        if not shards:
            raise UserError(f"{folder} holds no records of the split '{split}'")
        self.processor = processor
        self._paths = [folder / shard["file"] for shard in shards]
        self._open = lru_cache(maxsize=64)(lambda shard: pq.read_table(self._paths[shard], memory_map=True))
        self._picture_tokens = lru_cache(maxsize=None)(processor.image_tokens)
        self._place: list[tuple[int, int]] = []
        self.kinds: list[str] = []
        self.lengths: list[int] = []
        for number, path in enumerate(self._paths):
            table = pq.read_table(path, columns=["kind", "tokens", "sizes"])
            self._add(number, table)

    def _add(self, number: int, table: pa.Table) -> None:
        columns = (table[name].to_pylist() for name in ("kind", "tokens", "sizes"))
        for row, (kind, tokens, sizes) in enumerate(zip(*columns, strict=True)):
            self._place.append((number, row))
            self.kinds.append(kind)
            counts = [self._picture_tokens(h, w) for w, h in zip(sizes[0::2], sizes[1::2], strict=True)]
            self.lengths.append(tokens + sum(counts) - len(counts))

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, index: int) -> Sample:
        shard, row = self._place[index]
        data = self._open(shard).slice(row, 1).to_pylist()[0]
        ids, spans = data["input_ids"], data["spans"]
        labels = [IGNORE] * len(ids)
        for start, stop in zip(spans[0::2], spans[1::2], strict=True):
            labels[start:stop] = ids[start:stop]
        pixels, grids = None, []
        if data["images"]:
            seen = self.processor.image_processor(data["images"], return_tensors="pt")
            grids = read_grids(seen["image_grids"])
            tiles = zip(seen["pixel_values"], grids, strict=True)
            pixels = torch.cat([picture[: grid.tiles] for picture, grid in tiles])
        counts = [self.processor.grid_tokens(grid) for grid in grids]
        full_ids, full_labels = _expanded(ids, labels, self.processor.image_token_id, counts)
        return Sample(data["id"], full_ids, full_labels, pixels, grids)


def _expanded(ids: list[int], labels: list[int], image_id: int, counts: list[int]) -> tuple[list[int], list[int]]:
    """Repeats every image placeholder, and its label, once per token of its picture."""
    remaining = iter(counts)
    repeats = [next(remaining) if token == image_id else 1 for token in ids]
    full_ids = [token for token, times in zip(ids, repeats, strict=True) for _ in range(times)]
    return full_ids, [label for label, times in zip(labels, repeats, strict=True) for _ in range(times)]


class PackedLoader:
    """Yields the micro-batches of every optimiser step for one rank, from any step on.

    Order and packing follow from the seed and the epoch alone, so step s always holds the same records, whatever the
    number of ranks: the rows of a step are dealt to ranks in contiguous blocks.
    """

    def __init__(
        self,
        records: PreparedRecords,
        batch: BatchSettings,
        mixture: StageMixture,
        seed: int,
        micro_batch_rows: int,
        rank: int = 0,
        world: int = 1,
        curriculum: Sequence[CurriculumPhase] = (),
    ) -> None:
        micro = min(micro_batch_rows, batch.rows // world) if batch.rows >= world else 0
        if not micro or batch.rows % (micro * world):
            raise UserError(
                f"a step of {batch.rows} rows cannot be split over {world} processes in micro-batches of "
                f"{micro_batch_rows} rows"
            )
        self.records, self.batch, self.mixture, self.seed = records, batch, mixture, seed
        self.rank, self.world = rank, world
        self._shares = [phase.share for phase in curriculum for _ in range(phase.epochs)]
        self.micro_batches = batch.rows // (micro * world)
        """Micro-batches per step and rank: the gradient accumulation steps."""
        self.micro_rows = micro
        self._epoch = (-1, [])
        self._first_steps = [0]  # first step of every epoch seen so far, and of the one after

    def rows_of_step(self, step: int) -> list[list[list[int]]]:
        """All rows of a step (counted from 0), over all ranks: rows of documents of record indices."""
        while step >= self._first_steps[-1]:
            rows = self._rows_of_epoch(len(self._first_steps) - 1)
            self._first_steps.append(self._first_steps[-1] + len(rows) // self.batch.rows)
        epoch = bisect_right(self._first_steps, step) - 1
        start = (step - self._first_steps[epoch]) * self.batch.rows
        return self._rows_of_epoch(epoch)[start : start + self.batch.rows]

    def _rows_of_epoch(self, epoch: int) -> list[list[list[int]]]:
        """The epoch's rows, cut to whole steps."""
        if self._epoch[0] != epoch:
            records, limit = self.records, self.batch.row_tokens
            allowed = shortest(records.lengths, self._shares[epoch]) if epoch < len(self._shares) else None
            documents = draw_documents(records.kinds, records.lengths, self.mixture, limit, self.seed, epoch, allowed)
            try:
                rows = fill_rows(documents, records.lengths, limit)
            except ValueError as error:
                raise UserError(f"{error}; raise batch.row_tokens or lower prepare.max_tokens") from None
            whole = len(rows) // self.batch.rows * self.batch.rows
            if not whole:
                raise UserError(f"one epoch fills {len(rows)} rows, fewer than the {self.batch.rows} of one step")
            self._epoch = (epoch, rows[:whole])
        return self._epoch[1]

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        per_rank = self.batch.rows // self.world
        rows = self.rows_of_step(step)[self.rank * per_rank : (self.rank + 1) * per_rank]
        return [self.collate(rows[i : i + self.micro_rows]) for i in range(0, per_rank, self.micro_rows)]

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yields steps start … stop − 1; the next one is decoded beside the caller's work."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            upcoming = pool.submit(self.step, start) if start < stop else None
            for number in range(start, stop):
                ready = upcoming.result()
                upcoming = pool.submit(self.step, number + 1) if number + 1 < stop else None
                yield ready

    def collate(self, rows: list[list[list[int]]]) -> Batch:
        """One micro-batch of rows."""
        shape = (len(rows), self.batch.row_tokens)
        input_ids = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE)
        document_ids = torch.full(shape, -1)
        pixels, grids, names = [], [], []
        for r, row in enumerate(rows):
            position = 0
            for number, document in enumerate(row):
                first = position
                for sample in (self.records[index] for index in document):
                    stop = position + len(sample.input_ids)
                    input_ids[r, position:stop] = torch.tensor(sample.input_ids)
                    labels[r, position:stop] = torch.tensor(sample.labels)
                    document_ids[r, position:stop] = number
                    names.append(sample.id)
                    if sample.pixel_values is not None:
                        pixels.append(sample.pixel_values)
                        grids += sample.image_grids
                    position = stop
                # The first token of a document must not be predicted from the document before it.
                labels[r, first] = IGNORE
        return Batch(input_ids, labels, document_ids, torch.cat(pixels) if pixels else None, grids, names)
