"""`haplovl train STAGE --overfit N`: can the stage learn N records by heart? If not, something is broken.

A self-test before money is spent: the stage's own data, objective and engine, at its highest learning rate all the
time, on a few records. It writes nothing: neither models/ nor the state of a real run is touched.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from haplovl.data.loader import PackedLoader, PreparedRecords, Sample
from haplovl.errors import UserError
from haplovl.progress import reporter
from haplovl.settings import BatchSettings, ComputeProfile, Params, StageMixture
from haplovl.train.checkpoint import is_main, say
from haplovl.train.engine import DTYPES, global_counts, make_engine, start_distributed, take_step
from haplovl.train.launch import adopt_slurm, launch
from haplovl.train.objectives import Distillation
from haplovl.train.optim import set_learning_rate
from haplovl.train.stage import OUTPUTS, Stage, build_stage

MOST_STEPS = 500
IN_A_ROW = 3
"""Steps in a row that must reach the aim, as a step may hold a record twice and another one not at all."""


@dataclass(frozen=True)
class Aim:
    """What counts as learnt by heart: the mean of a loss part over its tokens, below a bound."""

    part: str
    below: float
    meaning: str


AIMS = {
    "distillation": Aim("loss_vision", 0.05, "1 - cosine to the vision teacher's patches"),
    "next token": Aim("loss", 0.01, "nats per supervised token"),
}


@dataclass(frozen=True)
class Verdict:
    """How the test ended: the aimed loss at the first and the last step, and the records it was about."""

    passed: bool
    steps: int
    first: float
    last: float
    records: tuple[str, ...]


class FirstRecords:
    """The first `count` records that a stage trains on, those with pictures before those without.

    Raises:
        UserError: there are fewer.
    """

    def __init__(self, records: PreparedRecords, mixture: StageMixture, count: int) -> None:
        trained = [index for index, kind in enumerate(records.kinds) if getattr(mixture, kind) > 0]
        if count > len(trained):
            raise UserError(f"--overfit {count}: the prepared data holds only {len(trained)} records for this stage")
        chosen = sorted(sorted(trained, key=lambda index: records.kinds[index] == "text")[:count])
        self._records, self._chosen = records, chosen
        self.kinds, self.lengths, self.images = (
            [values[index] for index in chosen] for values in (records.kinds, records.lengths, records.images)
        )

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Sample:
        return self._records[self._chosen[index]]


def overfit(name: str, params: Params, compute: ComputeProfile, count: int) -> bool:
    """Runs the test on `count` records with the processes of the profile, says how it ended, returns if it passed.

    Raises:
        UserError: an unknown stage, missing inputs, or fewer records than asked for.
    """
    if name not in OUTPUTS:
        raise UserError(f"there is no training stage '{name}'; choose {' or '.join(OUTPUTS)}")
    adopt_slurm()
    if compute.processes > 1 and "RANK" not in os.environ:
        launch(["train", name, "--compute", compute.name, "--overfit", str(count)], compute.processes)
    device = start_distributed(compute)
    try:
        stage = build_stage(name, params)
        if stage.objective is None:
            raise UserError(f"this recipe trains nothing in {name} (objective: none), so there is nothing to test")
        if isinstance(stage.objective, Distillation) and "loss_vision" not in stage.objective.weights:
            raise UserError("the test looks at loss_vision, which this recipe does not learn (stage1.losses.vision: 0)")
        stage.model.set_attn_implementation({"": compute.attention, "text_config": compute.attention})
        if compute.activation_checkpointing:
            stage.model.gradient_checkpointing_enable()
        verdict = learn_by_heart(stage, compute, device, params.seed, count)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    say(in_words(name, aim_of(stage), verdict, stage.settings.optimizer.learning_rate))
    return verdict.passed


def learn_by_heart(
    stage: Stage, compute: ComputeProfile, device: torch.device, seed: int, count: int, most_steps: int = MOST_STEPS
) -> Verdict:
    """Trains the stage's model on `count` records until its aim is reached or `most_steps` are taken."""
    records = FirstRecords(PreparedRecords("train", stage.processor), stage.settings.mixture, count)
    loader = _loader(records, stage.settings.batch, compute, seed)
    if isinstance(stage.objective, Distillation):
        if not any(records.images):
            raise UserError(f"the test looks at loss_vision, and none of the {count} records has a picture")
        stage.objective.frozen_to(device, DTYPES[stage.settings.precision])
    engine = make_engine(stage.objective, stage.settings, compute, loader.micro_batches)
    set_learning_rate(engine.optimizer, stage.settings.optimizer.learning_rate)  # of every part, times its factor
    aim, names, losses = aim_of(stage), set(), []
    say(f"{stage.name}: learning {count} records by heart; aim: {aim.part} below {aim.below} ({aim.meaning})")
    with reporter(f"{stage.name} overfit", most_steps) as report:
        for batches in loader.steps(0, most_steps):
            names.update(name for batch in batches for name in batch.record_ids)
            batches = [batch.to(device) for batch in batches]
            try:
                means, norm = take_step(engine, batches, global_counts(stage.objective, batches))
            except FloatingPointError:
                losses.append(math.nan)
                break
            losses.append(means[aim.part])
            if is_main():
                report.update(len(losses), f"{aim.part} {losses[-1]:.4f} grad {norm:.3g}")
            if max(losses[-IN_A_ROW:]) < aim.below and len(losses) >= IN_A_ROW:
                return Verdict(True, len(losses), losses[0], losses[-1], tuple(sorted(names)))
    return Verdict(False, len(losses), losses[0], losses[-1], tuple(sorted(names)))


def _loader(records: FirstRecords, batch: BatchSettings, compute: ComputeProfile, seed: int) -> PackedLoader:
    """Full rows of these records alone: as many as hold each of them about once per step."""
    world = dist.get_world_size()
    needed = math.ceil(sum(records.lengths) / batch.row_tokens)
    micro = min(compute.micro_batch_rows, math.ceil(needed / world))
    rows = micro * world * math.ceil(needed / (micro * world))
    # An epoch that repeats the records often enough to fill two steps.
    times = float(math.ceil(2 * rows * batch.row_tokens / sum(records.lengths)))
    often = StageMixture(instruction=times, caption=times, text=times)
    one = batch.model_copy(update={"rows": rows})
    ranks = {"rank": dist.get_rank(), "world": world}
    return PackedLoader(records, one, often, seed, micro, **ranks, workers=compute.loader_workers)


def aim_of(stage: Stage) -> Aim:
    """What the stage's objective aims at."""
    return AIMS["distillation" if isinstance(stage.objective, Distillation) else "next token"]


def in_words(name: str, aim: Aim, verdict: Verdict, rate: float) -> str:
    """The verdict, and what to look at where it is a bad one."""
    count = len(verdict.records)
    reached = f"{aim.part} went from {verdict.first:.3g} to {verdict.last:.3g} in {verdict.steps} steps"
    if verdict.passed:
        return (
            f"passed: {name} knows {count} records by heart; {reached} (aim: below {aim.below}). Data, labels, mask, "
            "gradients and optimiser work together. What the model makes of other records, this does not tell."
        )
    return "\n".join([f"failed: {name} did not learn {count} records by heart; {reached} (aim: below {aim.below}).",
                      *(f"- {line}" for line in _reasons(name, verdict, rate)),
                      f"The records: {_some(verdict.records)}"])  # fmt: skip


def _reasons(name: str, verdict: Verdict, rate: float) -> list[str]:
    if math.isnan(verdict.last):
        return [
            f"The loss or its gradient is no finite number: lower {name}.optimizer.learning_rate (now {rate:g}), or "
            "try precision: fp32."
        ]
    if not verdict.last < 0.9 * verdict.first:
        return [
            f"The loss hardly fell: the gradient does not reach the weights, or {name}.optimizer.learning_rate "
            f"({rate:g}) is far too low or too high.",
            "The labels may not stand where the answers stand: look at a record's supervised tokens.",
        ]
    return [
        f"If the loss was still falling, {name}.optimizer.learning_rate ({rate:g}) is low for this test.",
        "If it stood still at a level, something that the answers need does not reach them: pictures (are two of these "
        "questions alike, with different answers?), weights that are frozen, a mask that hides the question.",
    ]


def _some(names: Sequence[str], most: int = 16) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
