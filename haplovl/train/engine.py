"""The DeepSpeed engine around an objective: distributed start, configuration, and one optimiser step."""

import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from haplovl.settings import ComputeProfile, StageSettings
from haplovl.train.optim import make_optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def start_distributed(compute: ComputeProfile) -> torch.device:
    """Joins the process group (of one, where no launcher set the environment) and returns this rank's device."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    # DeepSpeed asks the accelerator by name; without this it looks for GPUs on machines that should not use them.
    os.environ.setdefault("DS_ACCELERATOR", compute.device)
    if compute.threads:
        torch.set_num_threads(compute.threads)
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as compatible

    # Training never uses the shared-memory collectives, which would be compiled for a minute at the first start.
    compatible["deepspeed_shm_comm"] = False
    deepspeed.logger.setLevel("WARNING")
    deepspeed.init_distributed(dist_backend="nccl" if compute.device == "cuda" else "gloo", verbose=False)
    if compute.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def make_engine(objective: nn.Module, settings: StageSettings, compute: ComputeProfile, micro_batches: int) -> Any:
    """Wraps an objective in a DeepSpeed engine with our own AdamW."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,  # counted in micro-batches: rows and their losses are our own affair
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": settings.optimizer.max_grad_norm,
        "zero_optimization": {"stage": compute.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": settings.precision == "bf16"},
        "steps_per_print": 10**9,
    }
    optimizer = make_optimizer(objective, settings.optimizer)
    return deepspeed.initialize(model=objective, optimizer=optimizer, config=config)[0]


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


def take_step(engine: Any, batches: list[Any], counts: dict[str, float]) -> tuple[dict[str, float], float]:
    """Forward and backward over all micro-batches, then the optimiser.

    Returns the mean of every loss part and the gradient's norm before clipping.

    Raises:
        FloatingPointError: a loss or gradient that is no finite number, on all ranks alike; before the optimiser
            has moved where gradients are whole (ZeRO 0).

    DeepSpeed averages gradients over ranks, so the loss is multiplied by their number: together with the division by
    the global token counts, the gradient is that of the loss over the whole step.
    """
    world = dist.get_world_size()
    sums = dict.fromkeys(counts, 0.0)
    for number, batch in enumerate(batches, start=1):
        parts = engine(batch)
        loss = sum(parts[name] / max(counts[name], 1.0) for name in parts)
        engine.backward(loss * world, scale_wrt_gas=False)
        for name, value in parts.items():
            sums[name] += value.item()
        if number < len(batches):
            engine.step()  # only counts the micro-batch
    totals = reduce_sum(torch.tensor([sums[name] for name in counts], dtype=torch.float64)).tolist()
    means = {name: total / max(counts[name], 1.0) for name, total in zip(counts, totals, strict=True)}
    norm = _plain_grad_norm(engine)
    if not (math.isfinite(sum(means.values())) and math.isfinite(norm)):
        raise FloatingPointError(f"losses {means}, gradient norm {norm}")
    engine.step()
    norm = float(engine.get_global_grad_norm() or norm)
    if not math.isfinite(norm):
        # ZeRO knows the norm only after its step; no checkpoint is written from here on.
        raise FloatingPointError(f"losses {means}, gradient norm {norm}")
    return means, norm


def _plain_grad_norm(engine: Any) -> float:
    """Norm of the gradients where DeepSpeed keeps them in `.grad` (fp32 without ZeRO) and does not report it."""
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
