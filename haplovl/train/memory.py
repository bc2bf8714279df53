"""Memory of one device in training: what DeepSpeed holds at each ZeRO stage, beside the activations.

Follows DeepSpeed 0.19 as `haplovl.train.engine` configures it (buckets of the library's default size, or of all trained
weights where these are fewer). P trained weights over N processes in bf16, bytes per device: ZeRO 0 and 1 (the engine
runs the former as the latter) hold 2 P of weights, (4 + 2) P of gradients (summed in float32, and as the backward pass
leaves them) and 12 P/N of float32 weights and AdamW's two moments; ZeRO 2 splits the gradients, ZeRO 3 the weights as
well. In fp32, ZeRO 0 is plain torch's 4 P + 4 P + 8 P.
"""

from dataclasses import asdict, dataclass

from haplovl.settings import ComputeProfile
from haplovl.train.engine import MOST_BUCKET
from haplovl.train.meta_run import Footprint

LIVE = 1_000_000_000
"""Most elements of gathered weights that ZeRO 3 keeps (stage3_max_live_parameters)."""

SUB_GROUP = 1_000_000_000
"""Weights that ZeRO 3 updates at once (sub_group_size)."""


@dataclass(frozen=True)
class Holdings:
    """What a stage holds: numbers of weights, and bytes of what is frozen outside of the objective."""

    trained: int
    frozen: int = 0
    """Weights inside the objective that are not trained (LoRA)."""
    heads: int = 0
    """Trained weights that are no part of the model: the throw-away heads of stage 1."""
    teacher: int = 0
    """Bytes on the device: the vision teacher and the word embeddings that stage 1 compares with."""
    idle: int = 0
    """Bytes that the process keeps in the CPU's memory and does not use (the language model in stage 1)."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device at the fullest moment of a step, and in the CPU's memory for its process (`host`)."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    teacher: int
    buffers: int
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(asdict(self).values()) - self.host


def device_memory(
    holdings: Holdings,
    footprint: Footprint,
    precision: str,
    compute: ComputeProfile,
    micro_batches: int,
) -> DeviceMemory:
    """Memory of one device with a profile's ZeRO stage and offload, at the fuller of two moments of a step.

    They are the backward pass, with all activations, and what follows it: the reduction of gradients and the
    optimiser's step. ZeRO 2 and 3 reduce during the backward pass.
    """
    half, stage, n = precision == "bf16", compute.zero_stage, compute.processes
    size = 2 if half else 4
    trained, every = holdings.trained, holdings.trained + holdings.frozen
    bucket = min(MOST_BUCKET, trained)
    if stage == 0 and not half:
        state = {"weights": 4 * every, "gradients": 4 * trained, "optimizer": 8 * trained}
        buffers = 4 * bucket
    elif stage < 2 and half and compute.offload == "none":
        # DeepSpeed's BF16_Optimizer (ZeRO 1), which also serves ZeRO 0.
        state = {"weights": 2 * every, "gradients": 6 * trained, "optimizer": 12 * trained // n}
        # What fits a bucket is put together in one before it travels.
        buffers = 4 * trained if trained <= MOST_BUCKET else 0
    else:
        state = {
            "weights": size * every // (n if stage == 3 else 1),
            "gradients": 4 * trained // n + (4 * trained if stage == 1 else 0),
            "optimizer": 12 * trained // n,
        }
        buffers = (6 if half else 4) * bucket  # gradients travel in float32, copied out of a bucket in bf16
        if stage == 2 and compute.offload == "none":
            state["gradients"] += size * trained // n  # as reduced, before they are added up in float32
        if stage == 3:
            # Gathered weights, and with bf16 the bucket's partition in float32.
            buffers += size * min(LIVE, every) + (4 * bucket // n if half else 0)
    state, host = _offloaded(state, compute, 4 * trained // n)
    teacher = holdings.teacher
    if compute.device == "cpu":
        teacher, state["optimizer"], host = teacher + holdings.idle, state["optimizer"] + host, 0
    else:
        host += holdings.idle
    passing = {"activations": footprint.activations, "logits": footprint.logits}
    backward = {**state, **passing, "buffers": buffers if stage > 1 else 0}
    if stage == 0 and not half and micro_batches == 1:
        # Gradients come while activations go: not all of both are there at once.
        backward["gradients"] = footprint.with_gradients - footprint.activations - footprint.logits
    kept = footprint.small if compute.device == "cpu" else 0
    if stage == 3:  # the optimiser's step has the gradients of some weights once more
        buffers = size * min(LIVE, every) + 4 * min(SUB_GROUP, trained // n)
    update = {**state, "activations": kept, "logits": 0, "buffers": buffers}
    moments = [DeviceMemory(**parts, teacher=teacher, host=host) for parts in (backward, update)]
    return max(moments, key=lambda memory: memory.total)


def _offloaded(state: dict[str, int], compute: ComputeProfile, partition: int) -> tuple[dict[str, int], int]:
    """What stays on the device of a partition's weights, gradients and optimiser states, and the bytes that leave."""
    if compute.offload == "none":
        return state, 0
    stays = {**state, "gradients": state["gradients"] - partition, "optimizer": 0}
    if compute.offload == "all":
        stays["weights"] = 0
    return stays, sum(state.values()) - sum(stays.values())
