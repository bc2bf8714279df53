"""Memory of one device in training: what DeepSpeed holds at each ZeRO stage, beside the activations.

Follows DeepSpeed 0.19 as `haplovl.train.engine` configures it (its buckets are the library's defaults). P trained
weights over N processes in bf16, bytes per device: ZeRO 0 and 1 hold 2 P of weights, (4 + 2) P of gradients (summed in
float32, and as the backward pass leaves them) and 12 P/N of float32 weights and AdamW's two moments; ZeRO 2 splits the
gradients, ZeRO 3 the weights as well. In fp32, ZeRO 0 is plain torch: 4 P + 4 P + 8 P.
"""

from dataclasses import asdict, dataclass

from haplovl.settings import ComputeProfile
from haplovl.train.meta_run import Footprint

BUCKET = 500_000_000
"""Elements that are reduced at once (reduce_bucket_size)."""
LIVE = 1_000_000_000
"""Most elements of gathered weights that ZeRO 3 keeps (stage3_max_live_parameters)."""


@dataclass(frozen=True)
class Holdings:
    """What a stage holds: numbers of weights, and bytes of what is frozen outside of the objective."""

    trained: int
    frozen: int = 0
    """Weights inside the objective that are not trained (LoRA)."""
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
    """Memory of one device with a profile's ZeRO stage and offload. Its other fields only say device and processes."""
    half, stage, n = precision == "bf16", compute.zero_stage, compute.processes
    size = 2 if half else 4
    trained, every = holdings.trained, holdings.trained + holdings.frozen
    weights, optimizer, host = size * every, 0, 0
    if half and stage < 2 and compute.offload == "none":
        # DeepSpeed's BF16_Optimizer (ZeRO 1), which also serves ZeRO 0.
        gradients, optimizer = (4 + size) * trained, 12 * trained // n
        buffers = 0 if n == 1 else 4 * min(BUCKET, trained)
    elif stage == 0:
        gradients, optimizer = 4 * trained, 8 * trained
        buffers = 0 if n == 1 else 4 * min(BUCKET, trained)
    else:
        # A partition of gradients in float32, and all of them where ZeRO 1 does not split them.
        gradients = 4 * trained // n + (4 * trained if stage == 1 else 0)
        optimizer = 12 * trained // n
        buffers = size * (BUCKET if compute.device == "cuda" else min(BUCKET, trained))
    if stage == 3:
        weights = size * every // n
        buffers += size * min(LIVE, every) if n > 1 or compute.offload == "all" else 0
    if compute.offload != "none":
        host = optimizer + 4 * trained // n
        gradients, optimizer = gradients - 4 * trained // n, 0
        if compute.offload == "all":
            host, weights = host + weights, 0
    activations = footprint.activations
    if not half and stage == 0 and micro_batches == 1:
        # Gradients come while activations go: the fullest moment has not all of both.
        together = max(footprint.with_gradients, 4 * trained)
        activations = max(0, together - footprint.logits - 4 * trained)
    teacher = holdings.teacher
    if compute.device == "cpu":
        weights, optimizer, teacher, host = weights, optimizer + host, teacher + holdings.idle, 0
    else:
        host += holdings.idle
    return DeviceMemory(weights, gradients, optimizer, activations, footprint.logits, teacher, buffers, host)
