"""The loss on held-out records: by it the best checkpoint is known."""

from itertools import islice
from typing import Any

import torch

from haplovl.data.loader import PackedLoader
from haplovl.data.packing import fill_rows
from haplovl.train.engine import reduce_sum

MOST_ROWS = 256
"""Rows that are looked at: enough to compare checkpoints, few enough to cost little."""


class Validation:
    """Packed rows of held-out records, dealt to the ranks."""

    def __init__(self, loader: PackedLoader) -> None:
        """`loader` reads the held-out records in the batches of training."""
        self._loader = loader
        documents = [[index] for index in range(len(loader.records))]
        filled = fill_rows(documents, loader.records.lengths, loader.batch.row_tokens)
        rows = list(islice(filled, MOST_ROWS))
        size = loader.micro_rows * loader.world
        # Every rank takes as many batches, as under ZeRO 3 they go through the model together.
        self._rows = [
            rows[start + loader.rank * loader.micro_rows :][: loader.micro_rows]
            for start in range(0, len(rows) - size + 1, size)
        ]

    @torch.no_grad()
    def loss(self, engine: Any, objective: Any, device: torch.device) -> float | None:
        """Mean loss over the held-out tokens, all parts together; None where the rows fill no batch."""
        if not self._rows:
            return None
        engine.eval()
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for rows in self._rows:
            batch = self._loader.collate(rows)
            for name, count in objective.counts(batch).items():
                counts[name] = counts.get(name, 0.0) + count
            for name, value in engine.module(batch.to(device)).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        engine.train()
        both = torch.tensor([[sums[name], counts[name]] for name in counts], dtype=torch.float64)
        return sum(total / max(count, 1.0) for total, count in reduce_sum(both).tolist())
