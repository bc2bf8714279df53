"""Ways to take one training step of stage 2 on the same records: ours, ours in plain torch, and what today's code does.

Used by training.py, which runs every way in a process of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from inference import CONFIGURATIONS, DTYPES, IMAGE_TOKEN
from lengths import PICTURE_TOKENS, draw
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig

from haplovl.data.loader import IGNORE, Batch
from haplovl.data.packing import fill_rows
from haplovl.model import HaploConfig, HaploForConditionalGeneration, HaploPreDecoderConfig
from haplovl.model.layout import single_tile
from haplovl.settings import BatchSettings, ComputeProfile, OptimizerSettings, StageSettings
from haplovl.train.engine import global_counts, make_engine, start_distributed, take_step
from haplovl.train.flops import StepFlops, Work
from haplovl.train.objectives import NextToken
from haplovl.train.optim import make_optimizer

ROW_TOKENS, ROWS = 3072, 2
"""A step: this mix fills rows of 3072 tokens to 99.8 % (look-ahead 4096), and longer ones cost memory."""
RECORDS = 512
"""Records that the steps are drawn from."""
MICRO_BATCH = 4
"""Records that the baseline pads to the longest of them: those of the public reference."""
BEFORE_PICTURE = 20
"""Tokens of a record before its picture."""
ATTENTION = {"fp32": "documents", "bf16": "documents"}
OPTIMIZER = OptimizerSettings(learning_rate=1e-4)


def build(vocabulary: int, image_token: int = IMAGE_TOKEN, size: str = "65M") -> HaploForConditionalGeneration:
    """A model with random float32 weights, the same for the same arguments."""
    shape = CONFIGURATIONS[size]

    def decoder(part: str) -> dict[str, int]:
        width, layers, mlp = shape[part]
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": mlp}
        return sizes | {"num_attention_heads": width // 64}

    text = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=8192, **decoder("post"))
    config = HaploConfig(HaploPreDecoderConfig(**decoder("pre")), text, image_token_id=image_token, image_size=336)
    torch.manual_seed(0)
    return HaploForConditionalGeneration(config).train()


# --- records ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Record:
    """Token ids and labels of one record, [L] each, and its picture [1, 3, 336, 336] if it has one."""

    ids: torch.Tensor
    labels: torch.Tensor
    picture: torch.Tensor | None


def steps_of_records(config: HaploConfig, row_tokens: int = ROW_TOKENS, rows: int = ROWS) -> Iterator[list[Any]]:
    """The records of every step, as the packed rows hold them: [rows][records in a row]."""
    samples, block = draw(RECORDS), config.tokens_per_image
    lengths = [sample.length + sample.images * (block - PICTURE_TOKENS) for sample in samples]
    filled = fill_rows([[index] for index in range(RECORDS)], lengths, row_tokens)
    while len(step := list(islice(filled, rows))) == rows:
        yield [[_record(config, samples[i], lengths[i], i) for (i,) in row] for row in step]


def _record(config: HaploConfig, sample: Any, length: int, seed: int) -> Record:
    """Random words and pixels; the last tokens are supervised."""
    noise = torch.Generator().manual_seed(seed)
    image, block = config.image_token_id, config.tokens_per_image
    ids = torch.randint(1, min(image, config.text_config.vocab_size), (length,), generator=noise)
    picture = None
    if sample.images:
        ids[BEFORE_PICTURE : BEFORE_PICTURE + block] = image
        picture = torch.randn(1, 3, config.image_size, config.image_size, generator=noise)
    labels = torch.full_like(ids, IGNORE)
    labels[length - sample.supervised :] = ids[length - sample.supervised :]
    return Record(ids, labels, picture)


def packed(config: HaploConfig, rows: list[list[Record]], row_tokens: int, dtype: torch.dtype) -> Batch:
    """Rows of documents side by side."""
    return _batch(config, [_row(row, row_tokens) for row in rows], [r for row in rows for r in row], dtype)


def padded(config: HaploConfig, records: list[Record], dtype: torch.dtype) -> Batch:
    """One record in a row, all as long as the longest."""
    longest = max(len(record.ids) for record in records)
    return _batch(config, [_row([record], longest) for record in records], records, dtype)


def _row(records: list[Record], length: int) -> tuple[torch.Tensor, ...]:
    documents = [torch.full_like(record.ids, number) for number, record in enumerate(records)]
    labels = [functional.pad(record.labels[1:], (1, 0), value=IGNORE) for record in records]
    parts = (([r.ids for r in records], 0), (labels, IGNORE), (documents, -1))
    rows = ((torch.cat(own), filler) for own, filler in parts)
    return tuple(functional.pad(own, (0, length - len(own)), value=filler) for own, filler in rows)


def _batch(config: HaploConfig, rows: list[Any], records: list[Record], dtype: torch.dtype) -> Batch:
    pictures = [record.picture for record in records if record.picture is not None]
    side = config.image_size // config.pre_config.patch_size
    grids = [single_tile(side, side)] * len(pictures)
    pixels = torch.cat(pictures).to(dtype) if pictures else None
    return Batch(*(torch.stack(own) for own in zip(*rows, strict=True)), pixels, grids, [""] * len(records))


# --- ways ------------------------------------------------------------------------------------------------------------
class Way(ABC):
    """A model under training: `step` takes an optimiser step over some records and returns the mean loss."""

    def __init__(self, precision: str, vocabulary: int) -> None:
        self.dtype, self.precision, self.model = DTYPES[precision], precision, build(vocabulary)
        self.config = self.model.config
        self.flops = StepFlops.stage2(self.model)

    def batches(self, rows: list[list[Record]]) -> list[Batch]:
        """The micro-batches of a step: one packed row each."""
        return [packed(self.config, [row], ROW_TOKENS, self.dtype) for row in rows]

    @abstractmethod
    def step(self, batches: list[Batch]) -> float:
        """Takes an optimiser step and returns the mean loss."""

    def work(self, batches: list[Batch]) -> int:
        """Floating-point operations that the step needs."""
        return self.flops.of(sum((Work.of(batch, self.config) for batch in batches), Work())).model


class Ours(Way):
    """The trainer's own step: packed rows, documents isolated, DeepSpeed at stage 0."""

    def __init__(self, precision: str, vocabulary: int, checkpointing: bool = False) -> None:
        super().__init__(precision, vocabulary)
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        backend = ATTENTION[precision]
        self.model.set_attn_implementation({"": backend, "text_config": backend})
        compute = ComputeProfile(name="benchmark", micro_batch_rows=1)
        start_distributed(compute)
        batch = BatchSettings(rows=ROWS, row_tokens=ROW_TOKENS)
        settings = StageSettings(steps=1, precision=precision, batch=batch, optimizer=OPTIMIZER)
        self.objective = NextToken(self.model)
        self.engine = make_engine(self.objective, settings, compute, ROWS)

    def step(self, batches: list[Batch]) -> float:
        means, _ = take_step(self.engine, batches, global_counts(self.objective, batches))
        return means["loss"]


class PlainTorch(Way):
    """The same objective, accumulation, clipping and fused AdamW in a plain loop; bf16 with float32 master weights."""

    def __init__(self, precision: str, vocabulary: int) -> None:
        super().__init__(precision, vocabulary)
        backend = ATTENTION[precision]
        self.model.set_attn_implementation({"": backend, "text_config": backend})
        self.objective = NextToken(self.model.to(self.dtype))
        self.weights = [p for p in self.objective.parameters() if p.requires_grad]
        self.masters = nn.ParameterList(p.detach().float() if self.dtype != torch.float32 else p for p in self.weights)
        self.optimizer = make_optimizer(self.masters, OPTIMIZER)

    def step(self, batches: list[Batch]) -> float:
        count, total = self.objective.counts, 0.0
        supervised = sum(count(batch)["loss"] for batch in batches)
        for batch in batches:
            loss = self.objective(batch)["loss"] / supervised
            loss.backward()
            total += float(loss.detach())
            if self.dtype != torch.float32:
                self._add_to_masters()
        nn.utils.clip_grad_norm_(self.masters, OPTIMIZER.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.dtype != torch.float32:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, list(self.masters))
        return total

    def _add_to_masters(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
            weight.grad = None


class Baseline(Way):
    """What today's code does: pads to the longest record of a micro-batch, gives the dense 4-D mask to SDPA, computes
    float32 logits for all positions, and steps with torch's AdamW as it is, in the precision of the weights."""

    def __init__(self, precision: str, vocabulary: int, masters: bool = False) -> None:
        super().__init__(precision, vocabulary)
        self.model.set_attn_implementation({"": "sdpa", "text_config": "sdpa"})
        self.model.to(self.dtype)
        # What DeepSpeed and others hold beside bf16 weights; without it, float32 is not needed and bf16 learns less.
        self.weights = list(self.model.parameters())
        self.masters = [nn.Parameter(p.detach().float()) for p in self.weights] if masters else self.weights
        self.optimizer = torch.optim.AdamW(self.masters, lr=OPTIMIZER.learning_rate, betas=OPTIMIZER.betas)

    def batches(self, rows: list[list[Record]]) -> list[Batch]:
        records = [record for row in rows for record in row]
        parts = (records[i : i + MICRO_BATCH] for i in range(0, len(records), MICRO_BATCH))
        return [padded(self.config, part, self.dtype) for part in parts]

    def step(self, batches: list[Batch]) -> float:
        supervised, total = sum(int((batch.labels[:, 1:] != IGNORE).sum()) for batch in batches), 0.0
        for batch in batches:
            # As a document of its own, padding needs no rows of the mask that see nothing, which only SDPA's slow
            # kernel may compute.
            out = self.model(
                batch.input_ids, batch.pixel_values, batch.image_grids, document_ids=batch.document_ids
            )  # fmt: skip
            targets = functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORE)
            logits = out.logits.float().flatten(0, 1)
            loss = functional.cross_entropy(logits, targets.flatten(), reduction="sum") / supervised
            del out, logits
            loss.backward()
            total += float(loss.detach())
        if self.masters is not self.weights:
            for weight, master in zip(self.weights, self.masters, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, OPTIMIZER.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters is not self.weights:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
        return total


WAYS: dict[str, Callable[[str, int], Way]] = {
    "ours": Ours,
    "ours, checkpointed": lambda precision, vocabulary: Ours(precision, vocabulary, checkpointing=True),
    "plain torch": PlainTorch,
    "baseline": Baseline,
    "baseline, master weights": lambda precision, vocabulary: Baseline(precision, vocabulary, masters=True),
}
