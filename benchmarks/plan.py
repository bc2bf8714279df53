"""How far `haplovl plan` is off: predicted and measured memory and time of a stage-2 training of over 300M weights.

Each run is a process of its own: random weights, our engine and objective, three steps on a CPU. Memory is the largest
resident set less that after the imports. Time is predicted from the MFU of another, smaller shape, measured just
before; the peak is the rate of a large matrix product. Seconds are those of the processor per thread, so that other
work on the machine does not count; with one thread (the default) nothing waits for a thread that others hold up.

    python benchmarks/plan.py [--json FILE] [--threads N]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
STEPS = 3
SHAPES: dict[str, dict[str, Any]] = {
    "large": {
        "vision": {"hidden_size": 768, "intermediate_size": 3072, "layers": 8, "heads": 12},
        "language": {"hidden_size": 1024, "intermediate_size": 2816, "layers": 16, "heads": 16},
        "row_tokens": 768,
    },
    "small": {
        "vision": {"hidden_size": 512, "intermediate_size": 2048, "layers": 4, "heads": 8},
        "language": {"hidden_size": 768, "intermediate_size": 2048, "layers": 8, "heads": 12},
        "row_tokens": 512,
    },
}


def recipe(shape: str, precision: str) -> Any:
    """The default recipe with teachers of this shape and one row per step."""
    from haplovl.settings import load_params

    params, sizes = load_params(ROOT / "params.yaml"), SHAPES[shape]
    vision = params.teachers.vision.model_copy(update={"patch_size": 14, **sizes["vision"]})
    language = params.teachers.language.model_copy(update={"vocabulary": 32000, **sizes["language"]})
    batch = params.stage2.batch.model_copy(update={"rows": 1, "row_tokens": sizes["row_tokens"]})
    return params.model_copy(
        update={
            "model": params.model.model_copy(update={"image_size": 168}),
            "teachers": params.teachers.model_copy(update={"vision": vision, "language": language}),
            "prepare": params.prepare.model_copy(update={"max_tokens": sizes["row_tokens"]}),
            "stage2": params.stage2.model_copy(update={"precision": precision, "batch": batch}),
        }
    )


def profile(attention: str, zero_stage: int, threads: int, peak_tflops: float | None = None) -> Any:
    """One process on a CPU."""
    from haplovl.settings import ComputeProfile

    return ComputeProfile(
        name="benchmark", threads=threads, micro_batch_rows=1, attention=attention, zero_stage=zero_stage,
        peak_tflops=peak_tflops,
    )  # fmt: skip


def train(shape: str, precision: str, attention: str, zero_stage: int, threads: int) -> dict[str, float]:
    """Trains in this process: seconds of a step after the first, GiB above the imports."""
    import deepspeed  # noqa: F401
    import peft  # noqa: F401

    from haplovl.model import HaploForConditionalGeneration
    from haplovl.train.blueprint import Blueprint, find_teachers, typical_rows
    from haplovl.train.engine import global_counts, make_engine, start_distributed, take_step
    from haplovl.train.objectives import NextToken

    params, compute = recipe(shape, precision), profile(attention, zero_stage, threads)
    start_distributed(compute)
    config = Blueprint.of(params, find_teachers(params)).model.config
    torch.ones(512, 512) @ torch.ones(512, 512)  # the kernels' own start
    before = resident_gib()
    torch.manual_seed(0)
    model = HaploForConditionalGeneration(config).train()
    model.set_attn_implementation({"": attention, "text_config": attention})
    objective = NextToken(model)
    batch = typical_rows(config, params, params.stage2, 1)
    pictures = torch.randn(batch.pixel_values.shape)
    batch = replace(batch, pixel_values=pictures)
    engine = make_engine(objective, params.stage2, compute, 1)
    seconds = []
    for _ in range(STEPS):
        began = time.process_time()
        take_step(engine, [batch], global_counts(objective, [batch]))
        seconds.append((time.process_time() - began) / threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    return {"gib": peak - before, "seconds": min(seconds[1:])}


def resident_gib() -> float:
    """Resident set of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


def matmul_tflops(precision: str, threads: int) -> float:
    """Rate of a 2048³ matrix product, the peak that MFU refers to here."""
    torch.set_num_threads(threads)
    a = torch.randn(2048, 2048, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    rates = []
    for _ in range(8):
        began = time.process_time()
        a @ a
        rates.append(2 * 2048**3 / (time.process_time() - began) * threads / 1e12)
    return statistics.median(rates)


def in_a_process(*arguments: object) -> dict[str, float]:
    """Runs this script for one training and reads its last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments[-1])}
    command = [sys.executable, __file__, "--train", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(precision: str, attention: str, zero_stage: int, threads: int) -> dict[str, Any]:
    """Predicted beside measured for the large shape."""
    from haplovl.train.plan import plan_stage

    peak = matmul_tflops(precision, threads)
    small = in_a_process("small", precision, attention, zero_stage, threads)
    large = in_a_process("large", precision, attention, zero_stage, threads)
    compute = profile(attention, zero_stage, threads, peak)
    flops = plan_stage("stage2", recipe("small", precision), compute).flops
    mfu = flops.model / small["seconds"] / (peak * 1e12)
    plan = plan_stage("stage2", recipe("large", precision), compute, mfu)
    memory = next(o.memory for o in plan.options if o.zero_stage == zero_stage)
    return {
        "precision": precision,
        "attention": attention,
        "zero_stage": zero_stage,
        "threads": threads,
        "parameters": sum(plan.weights.values()),
        "predicted_gib": memory.total / GIB,
        "measured_gib": large["gib"],
        "memory_ratio": memory.total / GIB / large["gib"],
        "mfu_of_the_small_shape": mfu,
        "predicted_seconds": plan.seconds_per_step,
        "measured_seconds": large["seconds"],
        "time_ratio": plan.seconds_per_step / large["seconds"],
    }


def main() -> None:
    """Prints a table; `--json FILE` also writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--zero", type=int, nargs="*", default=[0], help="ZeRO stages to run (one process)")
    parser.add_argument("--attention", nargs="*", default=["sdpa", "eager"])
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        shape, precision, attention, stage, threads = arguments.train
        print(json.dumps(train(shape, precision, attention, int(stage), int(threads))))
        return
    os.chdir(ROOT)
    cases = [(p, a, z) for p in arguments.precision for a in arguments.attention for z in arguments.zero]
    rows = []
    print(
        f"{'run':24} {'predicted':>10} {'measured':>10} {'ratio':>6}   {'predicted':>10} {'measured':>10} {'ratio':>6}"
    )
    for case in cases:
        row = compare(*case, arguments.threads)
        rows.append(row)
        name = f"{row['precision']} {row['attention']} ZeRO {row['zero_stage']}"
        print(
            f"{name:24} {row['predicted_gib']:6.2f} GiB {row['measured_gib']:6.2f} GiB {row['memory_ratio']:6.2f}   "
            f"{row['predicted_seconds']:8.2f} s {row['measured_seconds']:8.2f} s {row['time_ratio']:6.2f}",
            flush=True,
        )
    figures = {
        "memory_worst_error": max(abs(row["memory_ratio"] - 1) for row in rows),
        "time_worst_error": max(abs(row["time_ratio"] - 1) for row in rows),
        "runs": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps({"figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
