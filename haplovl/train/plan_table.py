"""`haplovl plan` as people and scripts see it: a few Rich tables, or one JSON object."""

import json

from rich.console import Console
from rich.table import Table

from haplovl.errors import UserError
from haplovl.settings import ComputeProfile, Params
from haplovl.train.blueprint import SUPERVISED_SHARE, TEXT_TOKENS, find_teachers
from haplovl.train.plan import GIB, RESERVE, Option, StagePlan, as_data, plan_stage, total

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "teacher", "buffers")


def print_plan(stage: str, params: Params, compute: ComputeProfile, mfu: float | None, as_json: bool) -> None:
    """Plans `stage1`, `stage2` or `both` and prints what they need and cost.

    Raises:
        UserError: an unknown stage, or as `plan_stage`.
    """
    stages = {"both": ["stage1", "stage2"], "stage1": ["stage1"], "stage2": ["stage2"]}.get(stage)
    if stages is None:
        raise UserError(f"there is no stage '{stage}' to plan; choose stage1, stage2 or both")
    plans = [plan_stage(name, params, compute, mfu) for name in stages]
    if as_json:
        print(json.dumps(as_data(plans, params, compute)))
    else:
        _show(plans, params, compute)


def _show(plans: list[StagePlan], params: Params, compute: ComputeProfile) -> None:
    out = Console(highlight=False)
    room = f", {compute.memory_gib:g} GiB each" if compute.memory_gib else ""
    out.print(f"[bold]{compute.name}[/]: {compute.processes} × {compute.accelerator or compute.device}{room}")
    sources = find_teachers(params).sources
    out.print(f"teachers' shapes: vision from {sources['vision']}, language from {sources['language']}")
    for plan in plans:
        out.print()
        _show_stage(out, plan, compute)
    out.print()
    if len(plans) > 1:
        hours, price = total(p.hours for p in plans), total(p.price for p in plans)
        out.print(f"[bold]together[/]: {_time(hours)}, {_price(price)}")
    out.print(
        f"[dim]Assumed: a record has one picture and {TEXT_TOKENS} tokens of text, {SUPERVISED_SHARE:.0%} of them "
        f"learnt; {RESERVE:.0%} of a device's memory stays free. docs/planning.md says how far off plans were.[/]"
    )


def _show_stage(out: Console, plan: StagePlan, compute: ComputeProfile) -> None:
    every = sum(plan.weights.values())
    parts = ", ".join(f"{name.replace('_', ' ')} {_count(number)}" for name, number in plan.weights.items())
    out.print(f"[bold]{plan.stage}[/]: {_count(every)} weights ({parts}), {_count(plan.trained)} trained")
    flops = plan.flops
    extra = [f"teachers {flops.teachers / 1e12:,.0f}"] if flops.teachers else []
    extra += [f"recomputation {flops.recompute / 1e12:,.0f}"] if flops.recompute else []
    out.print(
        f"{flops.model / 1e12:,.1f} TFLOP a step{' and beside them ' + ', '.join(extra) if extra else ''}; "
        f"{plan.steps:,} steps of {plan.micro_batches} micro-batches a device: {flops.model * plan.steps:.2e} FLOP"
    )
    if plan.seconds_per_step is None:
        out.print("time and price: unknown, as the compute profile names no peak_tflops")
    else:
        out.print(
            f"[bold]{_time(plan.hours)}, {_price(plan.price)}[/] at {plan.seconds_per_step:.2f} s a step "
            f"(MFU {plan.mfu:.1%}, {plan.mfu_source})"
        )
    out.print(_memory_table(plan, compute))
    out.print(f"shapes: forward and backward pass of one micro-batch on the meta device, {plan.checked_seconds:.1f} s")


def _memory_table(plan: StagePlan, compute: ComputeProfile) -> Table:
    """A column for every ZeRO stage; the profile's own is marked."""
    table = Table(title="GiB on one device at its fullest", title_justify="left", title_style="")
    table.add_column("ZeRO")
    for option in plan.options:
        chosen = (option.zero_stage, option.offload) == (compute.zero_stage, compute.offload)
        offload = "" if option.offload == "none" else f"\noffload {option.offload}"
        table.add_column(f"{option.zero_stage}{' (profile)' if chosen else ''}{offload}", justify="right")
    for part in PARTS:
        sizes = [getattr(option.memory, part) for option in plan.options]
        if any(sizes):
            table.add_row(part, *(f"{size / GIB:.2f}" for size in sizes))
    table.add_section()
    table.add_row("total", *(f"{option.memory.total / GIB:.2f}" for option in plan.options), style="bold")
    if compute.memory_gib:
        table.add_row("fits", *(_fits(option) for option in plan.options))
    if any(option.memory.host for option in plan.options):
        table.add_row("in the CPU's memory", *(f"{option.memory.host / GIB:.2f}" for option in plan.options))
    return table


def _fits(option: Option) -> str:
    return "[green]yes[/]" if option.fits else "[red]no[/]"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def _time(hours: float | None) -> str:
    if hours is None:
        return "time unknown"
    return (
        f"{hours * 60:.0f} minutes" if hours < 2 else f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
    )


def _price(price: float | None) -> str:
    return "price unknown" if price is None else f"about {price:,.0f} US dollars"
