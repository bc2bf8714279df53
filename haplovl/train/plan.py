"""`haplovl plan`: what a training run will need and cost, before money is spent. docs/planning.md has the formulae."""

import json
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from haplovl.data.loader import Batch
from haplovl.errors import UserError
from haplovl.files import RUNS
from haplovl.settings import ComputeProfile, DistillationSettings, Params, Stage1Settings, Stage2Settings, StageSettings
from haplovl.train.blueprint import SUPERVISED_SHARE, TEXT_TOKENS, Blueprint, find_teachers, typical_rows
from haplovl.train.engine import DTYPES
from haplovl.train.flops import Flops, StepFlops, Work
from haplovl.train.memory import DeviceMemory, Holdings, device_memory
from haplovl.train.meta_run import Footprint, checkpointing, run_on_meta
from haplovl.train.objectives import Distillation, NextToken
from haplovl.train.optim import freeze_parts

ASSUMED_UTILISATION = 0.4
"""Share of the device's peak at which its operations are assumed to run, where no run has measured it."""
RESERVE = 0.08
"""Assumed share of a device's memory for the driver's context, communication buffers and fragmentation."""
GIB = 2**30


@dataclass(frozen=True)
class Option:
    """One ZeRO stage with or without offload, and the memory that it takes."""

    zero_stage: int
    offload: str
    memory: DeviceMemory
    fits: bool | None
    """None where the profile does not tell the device's memory."""


@dataclass(frozen=True)
class StagePlan:
    """The needs of one training stage."""

    stage: str
    weights: dict[str, int]
    """Numbers of weights by part; `trained` of them are trained."""
    trained: int
    micro_batches: int
    steps: int
    flops: Flops
    """Of one step, all devices together."""
    options: list[Option]
    mfu: float
    mfu_source: str
    seconds_per_step: float | None
    """None where the profile does not tell the device's peak."""
    price: float | None
    checked_seconds: float
    """What the forward and backward pass on the meta device took."""

    @property
    def hours(self) -> float | None:
        """Of the whole stage."""
        return None if self.seconds_per_step is None else self.seconds_per_step * self.steps / 3600


def plan_stage(name: str, params: Params, compute: ComputeProfile, mfu: float | None = None) -> StagePlan:
    """Plans `stage1` or `stage2`; runs one micro-batch on the meta device, so that errors of shape show.

    `mfu` is the model FLOPs utilisation to expect; else that of the newest training log of this stage is taken, else
    an assumption.

    Raises:
        UserError: a recipe that does not fit its teachers or the profile, or whose shapes are wrong.
    """
    settings: Any = {"stage1": params.stage1, "stage2": params.stage2}[name]
    if not isinstance(settings, StageSettings):
        raise UserError(f"this recipe trains nothing in {name} (objective: none), so there is nothing to plan")
    micro_rows, micro_batches = _split(settings, compute)
    blueprint = Blueprint.of(params, find_teachers(params))
    model = blueprint.model
    if name == "stage2" and settings.lora is not None:
        from haplovl.train.lora import add_adapters

        add_adapters(model, settings.lora, params.seed)
    try:
        freeze_parts(model, settings.optimizer)
    except ValueError as error:
        raise UserError(f"{name}.{error}") from None
    rows = typical_rows(model.config, params, settings, micro_rows)
    distils = isinstance(settings, DistillationSettings)
    counter = _distillation_flops(blueprint, settings) if distils else StepFlops.stage2(model)
    work = Work.of(rows, model.config).times(micro_batches * compute.processes)
    began = time.perf_counter()
    holdings, footprint = dry_run(blueprint, settings, compute, rows)
    checked = time.perf_counter() - began
    flops = counter.of(work, compute.activation_checkpointing)
    mfu, source = _utilisation(name, mfu, flops)
    seconds = None
    if compute.peak_tflops:
        seconds = flops.model / (mfu * compute.peak_tflops * 1e12 * compute.processes)
    price = None
    if seconds is not None and compute.price_per_hour:
        price = seconds * settings.steps / 3600 * compute.price_per_hour * compute.processes
    return StagePlan(
        stage=name,
        weights=_weights(model) | ({"heads": holdings.heads} if holdings.heads else {}),
        trained=holdings.trained,
        micro_batches=micro_batches,
        steps=settings.steps,
        flops=flops,
        options=list(_options(holdings, footprint, settings.precision, compute, micro_batches)),
        mfu=mfu,
        mfu_source=source,
        seconds_per_step=seconds,
        price=price,
        checked_seconds=checked,
    )


def dry_run(
    blueprint: Blueprint, settings: Stage1Settings | Stage2Settings, compute: ComputeProfile, rows: Batch
) -> tuple[Holdings, Footprint]:
    """The objective's forward and backward pass on the meta device: what it holds, and that its shapes are right.

    Raises:
        UserError: what a real step would have failed with.
    """
    model, dtype = blueprint.model, DTYPES[settings.precision]
    # Kernels without scores in memory are alike in what they keep.
    backend = "eager" if compute.attention == "eager" else "sdpa"
    tower = {"vision_config": backend} if model.config.vision_config is not None else {}
    model.set_attn_implementation({"": backend, "text_config": backend, **tower})
    if compute.activation_checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(checkpointing())
    objective: nn.Module
    if isinstance(settings, DistillationSettings):
        with torch.device("meta"):
            objective = Distillation(
                model, blueprint.vision, settings.vision_layer, settings.temperature, settings.losses
            )  # fmt: skip
        objective.frozen_to(torch.device("meta"), dtype)
        try:
            freeze_parts(objective, settings.optimizer)  # it has fewer parts than the model
        except ValueError as error:
            raise UserError(f"stage1.{error}") from None
    else:
        objective = NextToken(model)
    parameters = {id(p): p for p in objective.parameters()}
    own = {id(p) for p in model.parameters()}
    words, held = model.get_input_embeddings().weight, 0
    if isinstance(settings, DistillationSettings):
        held = _bytes(blueprint.vision) + 4 * words.numel()
    holdings = Holdings(
        trained=sum(p.numel() for p in parameters.values() if p.requires_grad),
        frozen=sum(p.numel() for p in parameters.values() if not p.requires_grad),
        heads=sum(p.numel() for key, p in parameters.items() if key not in own),
        teacher=held,
        idle=4 * sum(p.numel() for p in model.parameters() if id(p) not in parameters and p is not words),
    )
    try:
        footprint = run_on_meta(objective.to(dtype), rows, words.shape[0], (blueprint.vision, model))
    except (ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"a step would fail: {' '.join(str(error).split())[:300]}") from None
    return holdings, footprint


def _distillation_flops(blueprint: Blueprint, settings: DistillationSettings) -> StepFlops:
    vision = blueprint.vision.config
    taught = settings.taught_state(vision.num_hidden_layers + 1)
    return StepFlops.stage1(blueprint.model, vision, settings.losses, taught)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _split(settings: Stage1Settings | Stage2Settings, compute: ComputeProfile) -> tuple[int, int]:
    """Rows of a micro-batch and micro-batches of a step on one process, as the loader deals them."""
    rows, world = settings.batch.rows, compute.processes
    micro = min(compute.micro_batch_rows, rows // world)
    if not micro or rows % (micro * world):
        raise UserError(
            f"a step of {rows} rows cannot be split over {world} processes in micro-batches of "
            f"{compute.micro_batch_rows} rows"
        )
    return micro, rows // (micro * world)


def _weights(model: nn.Module) -> dict[str, int]:
    """Numbers of weights by part; words and head counted with the language model once where they are tied."""
    core = model.model
    parts = {
        "embeddings": [core.image_embedding, core.text_projection, core.text_embedding],
        "tower": [core.tower],
        "pre_decoder": [core.pre_decoder],
        "connector": [core.connector, core.text_gate],
        "language_model": [core.language_model, model.lm_head],
    }
    return {
        name: sum(p.numel() for p in {id(p): p for m in modules if m is not None for p in m.parameters()}.values())
        for name, modules in parts.items()
        if any(module is not None for module in modules)
    }


def _options(
    holdings: Holdings, footprint: Footprint, precision: str, compute: ComputeProfile, micro_batches: int
) -> Iterator[Option]:
    """Every ZeRO stage, without offload and with that of the profile where the stage can do it."""
    least = {"none": 0, "optimizer": 1, "all": 3}[compute.offload]
    for stage in range(4):
        for offload in dict.fromkeys(["none", compute.offload if stage >= least else "none"]):
            profile = compute.model_copy(update={"zero_stage": stage, "offload": offload})
            memory = device_memory(holdings, footprint, precision, profile, micro_batches)
            room = compute.memory_gib
            yield Option(stage, offload, memory, None if room is None else memory.total <= (1 - RESERVE) * room * GIB)


def _utilisation(stage: str, given: float | None, flops: Flops) -> tuple[float, str]:
    """The model FLOPs utilisation to expect, and where the number comes from."""
    if given is not None:
        return given, "as given"
    logs = sorted((RUNS / "training").glob(f"{stage}-*/log.jsonl"), key=lambda p: p.stat().st_mtime)
    for log in reversed(logs):
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()[-100:] if line.strip()]
        measured = [row["mfu"] for row in rows if row.get("mfu")]
        if measured:
            return statistics.median(measured), f"measured in {log}"
    share = flops.model / flops.hardware
    source = f"assumed: {ASSUMED_UTILISATION:.0%} of the peak"
    return ASSUMED_UTILISATION * share, source if share == 1 else f"{source}, teachers and recomputation included"


def as_data(plans: list[StagePlan], params: Params, compute: ComputeProfile) -> dict[str, Any]:
    """Plans as JSON-able data, with the profile and the assumptions behind them; see `StagePlan` for the fields."""
    return {
        "compute": compute.model_dump(),
        "teachers": find_teachers(params).sources,
        "assumptions": {
            "text_tokens_per_record": TEXT_TOKENS,
            "supervised_share_of_text": SUPERVISED_SHARE,
            "memory_reserve_share": RESERVE,
        },
        "stages": [_as_data(plan) for plan in plans],
        "hours": total(plan.hours for plan in plans),
        "price": total(plan.price for plan in plans),
    }


def _as_data(plan: StagePlan) -> dict[str, Any]:
    data = asdict(plan)
    data["flops"] |= {"model": plan.flops.model, "hardware": plan.flops.hardware}
    data["hours"] = plan.hours
    for option, row in zip(plan.options, data["options"], strict=True):
        row["memory"]["total"] = option.memory.total
    return data


def total(values: Iterable[float | None]) -> float | None:
    """The sum, unless one of them is not known."""
    values = list(values)
    return None if None in values else sum(values)
