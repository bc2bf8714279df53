"""Where the time of one training step goes, by kind of operation."""

import sys
from collections import defaultdict

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from training_ways import WAYS, steps_of_records

KINDS = {
    "products of linear layers": ("aten::mm", "aten::addmm", "aten::linear"),
    "attention": (
        "aten::bmm",
        "aten::_softmax",
        "aten::_softmax_backward_data",
        "scaled_dot_product",
        "flex_attention",
    ),
    "loss": ("aten::_log_softmax", "aten::gather", "aten::scatter", "nll_loss", "aten::exp"),
    "optimiser": ("aten::_fused_adam", "adam", "Optimizer"),
    "norms": ("layer_norm", "rms_norm", "aten::pow", "aten::rsqrt", "aten::mean"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::zero_", "Memcpy", "aten::_to_copy"),
}
"""The first kind with a name that an operation's begins with or contains; all others are elementwise."""


def kind_of(name: str) -> str:
    """The kind of an operation."""
    for kind, parts in KINDS.items():
        if any(name == part or (part in name and not part.startswith("aten::")) for part in parts):
            return kind
    if name.startswith("aten::_fused_adam"):
        return "optimiser"
    return "elementwise and other"


def shares(profiler: profile, device: str) -> dict[str, float]:
    """Share of the time that each kind of operation takes, greatest first."""
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        times[kind_of(event.key)] += getattr(event, field)
    total = sum(times.values())
    return {kind: time / total for kind, time in sorted(times.items(), key=lambda item: -item[1])}


def profile_step(console: Console, precision: str) -> dict[str, float]:
    """Profiles our second step in this process and prints the shares."""
    way = WAYS["ours"](precision, 32_000)
    steps = steps_of_records(way.config)
    way.step(way.batches(next(steps)))
    batches = way.batches(next(steps))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        way.step(batches)
    return show(console, f"our step in {precision}", shares(profiler, "cpu"))


def show(console: Console, title: str, found: dict[str, float]) -> dict[str, float]:
    """Prints shares and gives them back."""
    table = Table("operations", "share of time", title=title)
    for kind, share in found.items():
        table.add_row(kind, f"{share:.1%}")
    console.print(table)
    return found


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]) if len(sys.argv) > 2 else torch.get_num_threads())
    profile_step(Console(), sys.argv[1] if len(sys.argv) > 1 else "bf16")
