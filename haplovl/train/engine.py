"""The DeepSpeed engine around an objective: distributed start, configuration, and one optimiser step."""

import math
import os
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from haplovl.errors import UserError
from haplovl.settings import ComputeProfile, StageSettings
from haplovl.train.launch import STORE, adopt_slurm, meeting_place, on_this_machine
from haplovl.train.optim import make_optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def start_distributed(compute: ComputeProfile) -> torch.device:
    """Joins the process group (of one, where no launcher set the environment) and returns this rank's device."""
    adopt_slurm()
    require_gpus(compute, int(os.environ.get("LOCAL_RANK", "0")) + 1)
    place = os.environ.get(STORE)
    if "RANK" not in os.environ:
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **on_this_machine()})
        place = meeting_place()  # not for the environment: what this process starts is no rank of it
    # DeepSpeed asks the accelerator by name; without this it looks for GPUs on machines that should not use them.
    os.environ.setdefault("DS_ACCELERATOR", compute.device)
    if compute.threads:
        torch.set_num_threads(compute.threads)
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as compatible

    # Training never uses the shared-memory collectives, which would be compiled for a minute at the first start.
    compatible["deepspeed_shm_comm"] = False
    deepspeed.logger.setLevel("WARNING")
    backend = "nccl" if compute.device == "cuda" else "gloo"
    # Without a place, another launcher started the ranks, perhaps on several machines: they meet at MASTER_ADDR.
    where: dict[str, Any] = {"init_method": f"file://{place}"} if place else {}
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deepspeed.init_distributed(backend, verbose=False, rank=rank, world_size=world, **where)
    if compute.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def require_gpus(compute: ComputeProfile, needed: int) -> None:
    """Refuses a profile for GPUs on a machine that has fewer of them for these processes.

    Raises:
        UserError: names how many torch sees.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if compute.device == "cuda" and found < needed:
        gpus = "1 GPU" if needed == 1 else f"{needed} GPUs"
        raise UserError(f"compute profile '{compute.name}' needs {gpus} on this machine, and torch sees {found}")


def make_engine(
    objective: nn.Module,
    settings: StageSettings,
    compute: ComputeProfile,
    micro_batches: int,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """Wraps an objective in a DeepSpeed engine, with AdamW as configured or the given optimiser.

    In bf16 weights, optimiser states and accumulated gradients are also held in float32. DeepSpeed can do that from
    ZeRO 1 on, which on one process is the same as ZeRO 0.
    """
    import deepspeed

    half = settings.precision == "bf16"
    config = {
        "train_micro_batch_size_per_gpu": 1,  # counted in micro-batches: rows and their losses are our own affair
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": settings.optimizer.max_grad_norm,
        "zero_optimization": _zero(max(compute.zero_stage, int(half)), compute, objective),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": half},
        "data_types": {"grad_accum_dtype": "fp32"},
        # Else gradients that were added up in float32 would be rounded to bf16 before the step, even on one process.
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
    }
    optimizer = optimizer or make_optimizer(objective, settings.optimizer)
    with redirect_stdout(StringIO()):  # its bf16 optimiser prints memory figures that nobody asked for
        return deepspeed.initialize(model=objective, optimizer=optimizer, config=config)[0]


MOST_BUCKET = 500_000_000
"""DeepSpeed's own bucket, in elements. It is allocated whole: two gigabytes in every step, however small the model."""


def _zero(stage: int, compute: ComputeProfile, objective: nn.Module) -> dict[str, Any]:
    """DeepSpeed's settings of a ZeRO stage."""
    bucket = min(MOST_BUCKET, sum(weight.numel() for weight in objective.parameters() if weight.requires_grad))
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    resting = {"device": "cpu", "pin_memory": compute.device == "cuda"}
    if compute.offload in ("optimizer", "all"):
        zero["offload_optimizer"] = resting
    if compute.offload == "all":
        zero["offload_param"] = resting
    return zero


def global_counts(objective: Any, batches: list[Any]) -> dict[str, float]:
    """Tokens behind each loss part over all micro-batches and ranks of a step."""
    names, total = [], None
    for batch in batches:
        counts = objective.counts(batch)
        names = list(counts)
        value = torch.tensor([float(counts[name]) for name in names], dtype=torch.float64)
        total = value if total is None else total + value
    total = reduce_sum(total)
    return dict(zip(names, total.tolist(), strict=True))


def reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sums a small CPU tensor over all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        values = values.to(device)
        dist.all_reduce(values)
        values = values.cpu()
    return values


def accumulate(engine: Any, batches: list[Any], counts: dict[str, float]) -> dict[str, float]:
    """Forward and backward over all micro-batches of a step; returns the mean of every loss part over all ranks.

    DeepSpeed averages gradients over ranks, so the loss is multiplied by their number: together with the division by
    the global token counts, the gradient is that of the loss over the whole step.

    Raises:
        FloatingPointError: a loss that is no finite number, on all ranks alike.
    """
    world, weights = dist.get_world_size(), engine.module.weights
    sums: dict[str, Any] = dict.fromkeys(counts, 0.0)
    for number, batch in enumerate(batches, start=1):
        parts = engine(batch)
        loss = sum(weights.get(name, 1.0) * parts[name] / max(counts[name], 1.0) for name in parts)
        engine.backward(loss * world, scale_wrt_gas=False)
        for name, value in parts.items():
            sums[name] = sums[name] + value.detach()
        if number < len(batches):
            engine.step()  # only counts the micro-batch
    totals = reduce_sum(torch.tensor([float(sums[name]) for name in counts], dtype=torch.float64)).tolist()
    means = {name: total / max(counts[name], 1.0) for name, total in zip(counts, totals, strict=True)}
    if not math.isfinite(sum(means.values())):
        raise FloatingPointError(f"the loss is {means}")
    return means


def update(engine: Any) -> float:
    """The optimiser's step; returns the gradient's norm before clipping.

    Raises:
        FloatingPointError: a gradient that is no finite number, on all ranks alike; the optimiser has not moved.
    """
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    plain = engine.optimizer is engine.basic_optimizer
    norm = float(nn.utils.get_total_norm(gradients)) if plain and gradients else 0.0
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm}")
    engine.step()
    if getattr(engine.optimizer, "overflow", False):  # DeepSpeed's own optimisers then leave the weights alone
        raise FloatingPointError("the gradient is not finite")
    return norm if plain else float(engine.get_global_grad_norm())


def take_step(engine: Any, batches: list[Any], counts: dict[str, float]) -> tuple[dict[str, float], float]:
    """Forward, backward and update: the mean of every loss part and the gradient's norm.

    Raises:
        FloatingPointError: as `accumulate` and `update` do.
    """
    means = accumulate(engine, batches, counts)
    return means, update(engine)
