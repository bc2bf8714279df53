"""Equal terms: how many steps of stage 2 spend as much compute, or see as many records, as the reference recipe.

Compute is floating-point operations as haplovl.train.flops counts them, for all recipes alike: matrix products of
forward and backward pass that the result needs, and the forward passes of frozen teachers. They are counted on the
batches that the loader draws, step after step, as a curriculum's phases differ; what a run spent in the end is in its
training log.
"""

from collections.abc import Iterator
from itertools import count, islice, repeat
from typing import Literal

from haplovl.data.loader import Batch, PackedLoader, PreparedRecords
from haplovl.settings import NoStageSettings, Params
from haplovl.train.flops import Work
from haplovl.train.stage import Stage, build_stage

Quantity = Literal["compute", "samples"]
COUNTED_STEPS = 400
"""Steps of a long stage that are counted: one differs from the next by a tenth, the sum is known to half a percent."""


def matched(params: Params, reference: Params, quantity: Quantity) -> Params:
    """The recipe with as many steps of stage 2 as spend what is left of the reference's budget.

    `quantity` is `compute` (floating-point operations) or `samples` (records). Stage 1 stays as the recipe says.

    Raises:
        ValueError: stage 1 alone spends the whole budget.
    """
    budget = sum(_whole(stage, reference.seed, quantity) for stage in _stages(reference))
    first, second = _stages(params)
    left = budget - _whole(first, params.seed, quantity)
    steps = 0
    for cost in _of_each_step(second, params.seed, quantity, reference.stage2.steps):
        if left < cost / 2:
            break
        left, steps = left - cost, steps + 1
    if not steps:
        raise ValueError(f"stage 1 of '{params.recipe}' alone spends the whole budget of '{reference.recipe}'")
    return params.model_copy(update={"stage2": params.stage2.model_copy(update={"steps": steps})})


def _stages(params: Params) -> tuple[Stage, Stage]:
    """Both stages; the second on the model that the first starts from, as weights decide nothing here."""
    return build_stage("stage1", params), build_stage("stage2", params, from_teachers=True)


def _whole(stage: Stage, seed: int, quantity: Quantity) -> float:
    """What a stage takes; one that the recipe leaves out takes nothing."""
    if isinstance(stage.settings, NoStageSettings):
        return 0.0
    steps = stage.settings.steps
    return sum(islice(_of_each_step(stage, seed, quantity, steps), steps))


def _of_each_step(stage: Stage, seed: int, quantity: Quantity, about: int) -> Iterator[float]:
    """What a stage's steps take, one after another and without end; of `about` steps some COUNTED_STEPS are counted."""
    batch, mixture, phases = stage.settings.batch, stage.settings.mixture, stage.settings.curriculum
    records = PreparedRecords("train", stage.processor)
    loader = PackedLoader(records, batch, mixture, seed, batch.rows, curriculum=phases)
    every = max(1, about // COUNTED_STEPS)
    for start in count(0, every):
        yield from repeat(_taken(stage, loader.step(start + every // 2), quantity), every)


def _taken(stage: Stage, batches: list[Batch], quantity: Quantity) -> float:
    """What one step takes."""
    if quantity == "samples":
        return sum(len(batch.record_ids) for batch in batches)
    counted = stage.flops.of(sum((Work.of(batch, stage.model.config) for batch in batches), Work()))
    return counted.model + counted.teachers
