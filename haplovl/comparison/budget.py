"""Equal terms: how many steps of stage 2 spend as much compute, or see as many records, as the reference recipe.

Compute is floating-point operations as haplovl.train.flops counts them, for all recipes alike: matrix products of
forward and backward pass that the result needs, and the forward passes of frozen teachers. They are counted on steps
spread over the stage that the loader really draws; what a run spent in the end is in its training log.
"""

from dataclasses import dataclass
from statistics import mean

from haplovl.data.loader import PackedLoader, PreparedRecords
from haplovl.settings import NoStageSettings, Params
from haplovl.train.flops import Work
from haplovl.train.stage import Stage, build_stage

SAMPLED_STEPS = 12
"""Steps of a stage that are counted; the mean over them is within about a percent of the mean over all."""


@dataclass(frozen=True)
class StageCost:
    """What a stage costs: operations and records, for each step, and its steps."""

    steps: int
    flops_per_step: float
    records_per_step: float

    @property
    def flops(self) -> float:
        """Of the whole stage."""
        return self.steps * self.flops_per_step

    @property
    def records(self) -> float:
        """Seen in the whole stage, repeats included."""
        return self.steps * self.records_per_step


def stage_cost(stage: Stage, seed: int) -> StageCost:
    """Counts a stage that was built; one that the recipe leaves out costs nothing."""
    settings = stage.settings
    if isinstance(settings, NoStageSettings):
        return StageCost(0, 0.0, 0.0)
    records = PreparedRecords("train", stage.processor)
    batch, mixture, phases = settings.batch, settings.mixture, settings.curriculum
    loader = PackedLoader(records, batch, mixture, seed, batch.rows, curriculum=phases)
    chosen = sorted({round(i * (settings.steps - 1) / (SAMPLED_STEPS - 1)) for i in range(SAMPLED_STEPS)})
    flops, seen = [], []
    for step in chosen:
        batches = loader.step(step)
        work = sum((Work.of(one, stage.model.config) for one in batches), Work())
        counted = stage.flops.of(work)
        flops.append(counted.model + counted.teachers)
        seen.append(sum(len(one.record_ids) for one in batches))
    return StageCost(settings.steps, mean(flops), mean(seen))


def costs(params: Params) -> dict[str, StageCost]:
    """Both stages of a recipe.

    Stage 2 is counted on the model that stage 1 starts from: weights decide nothing here.
    """
    first = build_stage("stage1", params)
    second = build_stage("stage2", params, from_teachers=True)
    return {"stage1": stage_cost(first, params.seed), "stage2": stage_cost(second, params.seed)}


def matched(params: Params, reference: Params, view: str) -> Params:
    """The recipe with as many steps of stage 2 as spend what is left of the reference's budget.

    `view` is `compute` (floating-point operations) or `samples` (records). Stage 1 stays as the recipe says.

    Raises:
        ValueError: stage 1 alone spends the whole budget.
    """
    quantity = {"compute": ("flops", "flops_per_step"), "samples": ("records", "records_per_step")}[view]
    own, given = costs(params), costs(reference)
    budget = sum(getattr(cost, quantity[0]) for cost in given.values())
    left = budget - getattr(own["stage1"], quantity[0])
    steps = round(left / getattr(own["stage2"], quantity[1]))
    if steps < 1:
        raise ValueError(f"stage 1 of '{params.recipe}' alone spends the whole budget of '{reference.recipe}'")
    return params.model_copy(update={"stage2": params.stage2.model_copy(update={"steps": steps})})
