"""Training speed and memory of stage 2 beside what today's code does, plain torch and what the machine can do at best.

    python benchmarks/training.py [--json FILE] [--rounds N] [--profile]
    python benchmarks/training.py --device cuda [--json FILE] [--compile]

On a CPU: full steps (forward, backward, optimiser) of the 65M configuration of inference.py on records like those of
LLaVA-665K (lengths.py), in float32 and bf16, with vocabularies of 8192 and 32,000. Every
way lives in a process of its own, so that its peak memory is its own; the processes take their steps in turns, each
after a matrix product of 2048³, the machine's ceiling. The same records and weights must give the same loss in every
way, else nothing is compared. Times are sums over rounds, and every round has other records.
With --device cuda: stages 1 and 2 at 1 to 2 billion parameters (training_cuda.py).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PRECISIONS = ("fp32", "bf16")
VOCABULARIES = (8192, 32_000)
COMPARED = ("ours", "baseline")
ALL_WAYS = {
    "fp32": ("ours", "plain torch", "baseline"),
    "bf16": ("ours", "ours, checkpointed", "plain torch", "baseline", "baseline, master weights"),
}
CLOSE = {"fp32": 1e-4, "bf16": 1e-2}
"""Relative difference of the first loss: sums in another order; half precision rounds activations differently."""
Figures = dict[str, float]


# --- one way in a process of its own ---------------------------------------------------------------------------------
class Process:
    """A child process that holds one way and takes a step when it is told to."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, __file__, "--child", *arguments]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, request: str) -> Any:
        """Sends one line and reads one line of JSON."""
        self._child.stdin.write(request + "\n")
        self._child.stdin.flush()
        for line in self._child.stdout:  # libraries print too
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"error: a process of the benchmark ended with status {self._child.wait()}")

    def end(self) -> None:
        self._child.stdin.close()
        self._child.wait()


def serve(way: str, precision: str, vocabulary: str) -> None:
    """The child's side: `step` takes a step over the next records, `peak` tells the peak memory."""
    from inference import matmul_rate
    from training_ways import WAYS, steps_of_records

    imports = resident("VmRSS")
    trained = WAYS[way](precision, int(vocabulary))
    steps = steps_of_records(trained.config)
    for request in sys.stdin:
        if request.strip() == "peak":
            print(json.dumps({"peak": resident("VmHWM") - imports}), flush=True)
            continue
        rate = matmul_rate(trained.dtype)
        batches = trained.batches(next(steps))
        work = trained.work(batches)
        began = time.perf_counter()
        loss = trained.step(batches)
        seconds = time.perf_counter() - began
        supervised = sum(trained_tokens(batch) for batch in batches)
        positions = sum(batch.input_ids.numel() for batch in batches)
        figures = {"seconds": seconds, "loss": loss, "supervised": supervised, "positions": positions}
        print(json.dumps({**figures, "flops": work, "rate": rate}), flush=True)


def trained_tokens(batch: Any) -> int:
    """Positions with a loss."""
    return int((batch.labels[:, 1:] != -100).sum())


def resident(name: str) -> int:
    """Bytes of this process's resident set, now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(name + ":")[1].split()[0]) * 1024


# --- all ways in turns -----------------------------------------------------------------------------------------------
def compare(precision: str, vocabulary: int, ways: tuple[str, ...], rounds: int) -> dict[str, Figures]:
    """Figures of every way; the first step of each warms up and must give the same loss in all of them."""
    processes = {way: Process(way, precision, str(vocabulary)) for way in ways}
    # Only for its memory: one step is enough.
    once = [way for way in ways if way.endswith("master weights")]
    first = {way: process.ask("step") for way, process in processes.items()}
    for way, own in first.items():
        if abs(own["loss"] / first[ways[0]]["loss"] - 1) > CLOSE[precision]:
            raise SystemExit(
                f"error: the loss of '{way}' is {own['loss']}, that of '{ways[0]}' {first[ways[0]]['loss']}"
            )
    rows: dict[str, list[Figures]] = {way: [first[way]] if way in once else [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            if way not in once:
                rows[way].append(processes[way].ask("step"))
    figures = {way: _summed(rows[way], processes[way].ask("peak")["peak"]) for way in ways}
    for process in processes.values():
        process.end()
    return figures


def _summed(rows: list[Figures], peak: int) -> Figures:
    total = {key: sum(row[key] for row in rows) for key in ("seconds", "supervised", "positions", "flops")}
    rate = statistics.median(row["rate"] for row in rows)
    return {
        "loss": rows[-1]["loss"],
        "step_seconds": total["seconds"] / len(rows),
        "tokens_per_second": total["supervised"] / total["seconds"],
        "positions_per_step": total["positions"] / len(rows),
        "flops_per_second": total["flops"] / total["seconds"],
        "matmul_flops_per_second": rate,
        "mfu": total["flops"] / total["seconds"] / rate,
        "peak_memory_bytes": peak,
    }


def ratios(ways: dict[str, Figures]) -> Figures:
    """What the aims are about."""
    ours, baseline = ways["ours"], ways["baseline"]
    found = {
        "tokens_per_s_ratio": ours["tokens_per_second"] / baseline["tokens_per_second"],
        "peak_memory_ratio": ours["peak_memory_bytes"] / baseline["peak_memory_bytes"],
        "mfu": ours["mfu"],
    }
    if lean := ways.get("ours, checkpointed"):
        found["tokens_per_s_ratio_checkpointed"] = lean["tokens_per_second"] / baseline["tokens_per_second"]
        found["peak_memory_ratio_checkpointed"] = lean["peak_memory_bytes"] / baseline["peak_memory_bytes"]
    if torch_loop := ways.get("plain torch"):
        found["deepspeed_overhead"] = ours["step_seconds"] / torch_loop["step_seconds"]
    if masters := ways.get("baseline, master weights"):
        found["peak_memory_ratio_to_masters"] = ours["peak_memory_bytes"] / masters["peak_memory_bytes"]
    return found


def main() -> None:
    """Measures everything and prints it."""
    if sys.argv[1:2] == ["--child"]:
        from training_beside import beside

        served = {"beside": beside}
        served.get(sys.argv[2], lambda *rest: serve(sys.argv[2], *rest))(*sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--rounds", type=int, default=2, help="measured steps of every way (default: 2)")
    parser.add_argument("--profile", action="store_true", help="also say which operations our steps spend time on")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="with --device cuda: torch.compile the layers")
    options = parser.parse_args()
    if options.compile and options.device == "cpu":
        parser.error("--compile needs --device cuda")
    console = Console(width=None if sys.stdout.isatty() else 120)
    if options.device == "cuda":
        from training_cuda import run

        report = run(console, options.rounds, options.compile)
    else:
        report = _on_cpu(console, options.rounds, options.profile)
    report["machine"] = _machine(sys.argv)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _on_cpu(console: Console, rounds: int, profile: bool) -> dict[str, Any]:
    console.print("running on a CPU" + ("" if profile else "; --profile says where the time goes"))
    everything: dict[str, dict[str, Figures]] = {}
    figures: Figures = {}
    for vocabulary in reversed(VOCABULARIES):
        largest = vocabulary == max(VOCABULARIES)
        for precision in PRECISIONS:
            ways = ALL_WAYS[precision] if largest else COMPARED
            found = compare(precision, vocabulary, ways, rounds if largest else 1)
            everything[f"{precision}, vocabulary {vocabulary}"] = found
            ending = f"_{precision}" if largest else f"_{precision}_{vocabulary}"
            figures |= {key + ending: value for key, value in ratios(found).items()}
            _show(console, f"{precision}, vocabulary of {vocabulary}", found)
    process = Process("beside", "bf16")  # where steps are shortest and what runs beside them weighs most
    figures |= {f"{key}_bf16": value for key, value in process.ask("").items()}
    process.end()
    figures |= packed_shares()
    # The aims name these without a precision: half precision, where steps are shortest and overheads weigh most.
    names = [key.removesuffix("_bf16") for key in figures if key.endswith("_bf16")]
    figures = {name: figures[f"{name}_bf16"] for name in names} | figures
    _show_figures(console, figures)
    report = {"figures": figures, "ways": everything}
    if profile:
        from training_profile import profile_step

        report["profile"] = {precision: profile_step(console, precision) for precision in PRECISIONS}
    return report


def packed_shares() -> Figures:
    """Share of real tokens in rows of 4096, by look-ahead."""
    from lengths import draw
    from packing import measure

    samples = draw(100_000)
    lengths, images = [s.length for s in samples], [s.images for s in samples]
    found = {n: measure(lengths, images, 4096, None, n)["real_token_share"] for n in (4096, 64)}
    return {"packed_share": found[4096], "packed_share_64": found[64]}


def _machine(arguments: list[str]) -> dict[str, Any]:
    import torch

    return {
        "date": date.today().isoformat(),
        "command": " ".join(["python", *arguments]),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _show(console: Console, title: str, ways: dict[str, Figures]) -> None:
    table = Table(title=title)
    columns = ("way", "step", "supervised/s", "positions", "GFLOP/s", "of matmul rate", "peak memory", "× baseline")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for way, r in ways.items():
        table.add_row(
            way,
            f"{r['step_seconds']:.2f} s",
            f"{r['tokens_per_second']:.0f}",
            f"{r['positions_per_step']:.0f}",
            f"{r['flops_per_second'] / 1e9:.0f}",
            f"{r['mfu']:.0%}",
            f"{r['peak_memory_bytes'] / 2**30:.2f} GiB",
            f"{r['tokens_per_second'] / ways['baseline']['tokens_per_second']:.2f}",
        )
    console.print(table)


def _show_figures(console: Console, figures: Figures) -> None:
    table = Table("figure", "fp32", "bf16", title="figures")
    for name in dict.fromkeys(key.removesuffix("_fp32").removesuffix("_bf16") for key in figures):
        if name + "_bf16" in figures:
            table.add_row(name, *(f"{figures.get(f'{name}_{p}', float('nan')):.3f}" for p in PRECISIONS))
        else:
            table.add_row(name, "", f"{figures[name]:.4f}")
    console.print(table)


if __name__ == "__main__":
    main()
