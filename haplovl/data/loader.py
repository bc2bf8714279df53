"""Reads prepared shards and yields packed training batches; the position is the number of steps taken."""

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np
import torch

from haplovl.data.packing import Row, draw_documents, fill_rows, shortest
from haplovl.data.plans import LEAST_RECORDS, PLANS, Plan, plan_key
from haplovl.data.prepared import IGNORE, PreparedRecords, Sample, decoded
from haplovl.errors import UserError
from haplovl.model.layout import ImageGrid
from haplovl.settings import BatchSettings, CurriculumPhase, StageMixture

ROWS_AHEAD = 512
"""Rows that are packed beside every step, beyond those that it needs; meanwhile decoders wait for the interpreter."""
PLANS_IN_MEMORY = 2


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


class PackedLoader:
    """Yields the micro-batches of every optimiser step for one rank, from any step on.

    Order and packing follow from the seed and the epoch alone, so step s always holds the same records, whatever the
    number of ranks and workers: the rows of a step are dealt to ranks in contiguous blocks.
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
        workers: int = 1,
    ) -> None:
        micro = min(micro_batch_rows, batch.rows // world) if batch.rows >= world else 0
        if not micro or batch.rows % (micro * world):
            raise UserError(
                f"a step of {batch.rows} rows cannot be split over {world} processes in micro-batches of "
                f"{micro_batch_rows} rows"
            )
        self.records, self.batch, self.mixture, self.seed = records, batch, mixture, seed
        self.rank, self.world, self.workers = rank, world, workers
        self._first_epochs = [phase for phase in curriculum for _ in range(phase.epochs)]
        self.micro_batches = batch.rows // (micro * world)
        """Micro-batches per step and rank: the gradient accumulation steps."""
        self.micro_rows = micro
        self.waited = 0.0
        """Seconds that the latest step of `steps` kept its caller waiting."""
        self._phases = [*(phase.epochs for phase in curriculum), None]  # epochs of each; the last one goes on
        self._plans: dict[int, Plan] = {}
        self._steps: dict[int, int] = {}
        """Steps of the epochs that begin a phase, as far as they were counted."""

    def rows_of_step(self, step: int) -> list[Row]:
        """All rows of a step (counted from 0), over all ranks.

        Takes the same time at every position: at most one epoch of every phase that began, and the step's own, are
        packed, and those that were packed before, now or in an earlier run, are only read.
        """
        epoch, number = self._place(step)
        plan, rows = self._plan(epoch), self.batch.rows
        first = number * rows
        # An epoch with fewer rows than the first one of its phase ends with its own first rows.
        return [plan.row(row if plan.has(row + 1) else row % len(plan)) for row in range(first, first + rows)]

    def _place(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and which of its steps it is.

        All epochs of a phase have as many steps as its first one, whose last rows are dropped if they make no step:
        so earlier epochs need not be counted.
        """
        epoch = 0
        for epochs in self._phases:
            if epoch not in self._steps and self._plan(epoch).has((step + 1) * self.batch.rows):
                return epoch, step
            steps = self._count(epoch)
            if epochs is None or step < steps * epochs:
                return epoch + step // steps, step % steps
            epoch, step = epoch + epochs, step - steps * epochs
        raise AssertionError("the last phase goes on")

    def _count(self, epoch: int) -> int:
        if epoch not in self._steps:
            plan = self._plan(epoch)
            plan.has(sys.maxsize)
            if len(plan) < self.batch.rows:
                raise UserError(f"one epoch fills {len(plan)} rows, fewer than the {self.batch.rows} of one step")
            self._steps[epoch] = len(plan) // self.batch.rows
        return self._steps[epoch]

    def _pack_ahead(self) -> None:
        """Packs more of the newest epoch than is needed yet: soon all of it is kept, where a killed run finds it."""
        plan = self._plans[max(self._plans)]
        plan.has(len(plan) + ROWS_AHEAD)

    def _plan(self, epoch: int) -> Plan:
        if epoch not in self._plans:
            for old in sorted(self._plans)[: 1 - PLANS_IN_MEMORY or None]:
                self._plans.pop(old).has(sys.maxsize)  # whole epochs are kept for the next run, others are not
            path = PLANS / self._key / f"{epoch}.npy" if len(self.records) >= LEAST_RECORDS else None
            self._plans[epoch] = Plan(lambda: self._rows_of_epoch(epoch), path)
        return self._plans[epoch]

    @cached_property
    def _key(self) -> str:
        records, batch = self.records, self.batch
        columns = (records.kinds, records.lengths, records.images, getattr(records, "sources", ()))
        phases = [phase.model_dump() for phase in self._first_epochs]
        settings = (batch.row_tokens, batch.row_images, batch.lookahead, self.mixture.model_dump(), phases)
        return plan_key(columns, [self.seed, *settings])

    def _rows_of_epoch(self, epoch: int) -> Iterator[Row]:
        records, tokens, images = self.records, self.batch.row_tokens, self.batch.row_images
        kinds, lengths, pictures = records.kinds, records.lengths, records.images
        phase = self._first_epochs[epoch] if epoch < len(self._first_epochs) else None
        allowed = shortest(lengths, phase.share) if phase else None
        mixture = phase.mixture if phase and phase.mixture else self.mixture
        drawn_by = (mixture, tokens, self.seed, epoch, allowed)
        sources = getattr(records, "sources", None)
        documents = draw_documents(kinds, lengths, *drawn_by, pictures, images, sources)
        try:
            return fill_rows(documents, lengths, tokens, self.batch.lookahead, pictures, images)
        except ValueError as error:
            raise UserError(str(error)) from None

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        rows = self.rows_of_step(step)
        return [self._micro_batch(rows, number) for number in range(self.micro_batches)]

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yields steps start … stop − 1; `workers` threads decode the next ones beside the caller's work.

        One step and one micro-batch per worker are ready or in work ahead of the caller. `waited` tells how long each
        step kept the caller waiting. The threads end with the iterator.

        Raises:
            UserError: what went wrong in a worker, when its step is due.
        """
        packer, decoders = ThreadPoolExecutor(1, "packer"), ThreadPoolExecutor(self.workers, "decoder")
        ahead: deque[Future[Batch]] = deque()

        def submit() -> Iterator[Future[Batch]]:
            for step in range(start, stop):
                # One thread packs, in order: an epoch's rows follow from those before.
                rows = packer.submit(self.rows_of_step, step)
                packer.submit(self._pack_ahead)
                for number in range(self.micro_batches):
                    yield decoders.submit(lambda rows=rows, number=number: self._micro_batch(rows.result(), number))

        submitted = submit()
        try:
            ahead.extend(islice(submitted, self.micro_batches + self.workers))
            for _ in range(start, stop):
                began = time.perf_counter()
                ready = [ahead.popleft().result() for _ in range(self.micro_batches)]
                self.waited = time.perf_counter() - began
                ahead.extend(islice(submitted, self.micro_batches))
                yield ready
        finally:
            packer.shutdown(cancel_futures=True)
            decoders.shutdown(cancel_futures=True)

    def _micro_batch(self, rows: list[Row], number: int) -> Batch:
        """Micro-batch `number` of this rank out of all rows of a step."""
        first = self.rank * (self.batch.rows // self.world) + number * self.micro_rows
        return self.collate(rows[first : first + self.micro_rows])

    def collate(self, rows: list[Row]) -> Batch:
        """One micro-batch of rows."""
        shape = (len(rows), self.batch.row_tokens)
        input_ids = np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, IGNORE)
        document_ids = np.full(shape, -1)
        samples: list[Sample] = []
        for r, row in enumerate(rows):
            position = 0
            for number, document in enumerate(row):
                first = position
                for sample in (self.records[index] for index in document):
                    stop = position + len(sample.input_ids)
                    input_ids[r, position:stop] = sample.input_ids
                    labels[r, position:stop] = sample.labels
                    document_ids[r, position:stop] = number
                    samples.append(sample)
                    position = stop
                # The first token of a document must not be predicted from the document before it.
                labels[r, first] = IGNORE
        tensors = map(torch.from_numpy, (input_ids, labels, document_ids))
        grids = [grid for sample in samples for grid in sample.image_grids]
        return Batch(*tensors, decoded(samples), grids, [sample.id for sample in samples])
