"""The loss on held-out records: by it the best checkpoint is known."""

import math
from itertools import islice
from typing import Any

import torch

from haplovl.data.loader import PackedLoader
from haplovl.data.packing import fill_rows
from haplovl.errors import UserError
from haplovl.train.engine import reduce_sum

MOST_ROWS = 256
"""Rows that are looked at: enough to compare checkpoints, few enough to cost little."""


class Validation:
    """Packed rows of held-out records, dealt to the ranks."""

    def __init__(self, loader: PackedLoader) -> None:
        """`loader` reads the held-out records in the batches of training."""
        self._loader = loader
        records, batch = loader.records, loader.batch
        documents = [[index] for index in range(len(records))]
        try:
            filled = fill_rows(
                documents, records.lengths, batch.row_tokens, batch.lookahead, records.images, batch.row_images
            )
        except ValueError as error:
            raise UserError(f"the held-out records do not fit: {error}") from None
        rows = list(islice(filled, MOST_ROWS))
        size = loader.micro_rows * loader.world
        # Every rank takes as many batches, as under ZeRO 3 they go through the model together; where the rows do not
        # suffice for all ranks, the others go along with a row that does not count.
        starts = range(loader.rank * loader.micro_rows, loader.rank * loader.micro_rows + len(rows), size)
        rounds = math.ceil(len(rows) / size)
        own = [rows[start : start + loader.micro_rows] for start in list(starts)[:rounds]]
        own += [[]] * (rounds - len(own))
        self._rounds = [(chosen or rows[:1], bool(chosen)) for chosen in own]

    @torch.no_grad()
    def loss(self, engine: Any, objective: Any, device: torch.device) -> float | None:
        """Weighted sum of the loss parts' means over the held-out tokens; None where there are none."""
        if not self._rounds:
            return None
        engine.eval()
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for rows, counted in self._rounds:
            batch = self._loader.collate(rows)
            for name, count in objective.counts(batch).items():
                counts[name] = counts.get(name, 0.0) + count * counted
            for name, value in engine.module(batch.to(device)).items():
                sums[name] = sums.get(name, 0.0) + float(value) * counted
        engine.train()
        both = reduce_sum(torch.tensor([[sums[name], counts[name]] for name in counts], dtype=torch.float64)).tolist()
        weights = objective.weights
        return sum(
            weights.get(name, 1.0) * total / max(count, 1.0) for name, (total, count) in zip(counts, both, strict=True)
        )
