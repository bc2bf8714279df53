"""Training steps of stages 1 and 2 at 1 to 2 billion parameters on a GPU; see training.py.

Rows of 4096 tokens, FlexAttention with block masks, bf16 with float32 master weights. The step is DeepSpeed's, and
plain torch's where DeepSpeed is missing. MFU counts what the model needs (haplovl/train/flops.py): no attention that
the mask keeps apart, no padding; against the data sheet's rate and against that of a product measured in the same run.
"""

import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile
from training_profile import shares, show
from training_ways import OPTIMIZER, packed, steps_of_records
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from haplovl.data.loader import Batch
from haplovl.model import HaploConfig, HaploForConditionalGeneration, HaploPreDecoderConfig
from haplovl.settings import BatchSettings, ComputeProfile, StageSettings
from haplovl.train.engine import global_counts, make_engine, start_distributed, take_step
from haplovl.train.flops import StepFlops, Work
from haplovl.train.objectives import Distillation, NextToken
from haplovl.train.optim import make_optimizer

ROW_TOKENS, ROWS = 4096, 4
PEAK = 989e12
"""Dense bf16 of an H100 or H200 SXM, NVIDIA's data sheet."""
VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
LANGUAGE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32_000, "max_position_embeddings": 8192,
}  # fmt: skip
"""CLIP-ViT-L/14-336 and the shape of TinyLlama-1.1B: 1.4 billion parameters."""


def run(console: Console, rounds: int, compiled: bool) -> dict[str, Any]:
    """Measures both stages, prints a table and returns the report.

    Raises:
        SystemExit: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise SystemExit("error: there is no CUDA device; without --device the benchmark runs on the CPU")
    table = Table(title=f"{torch.cuda.get_device_name()}, {'compiled' if compiled else 'not compiled'}")
    for name in ("stage", "step", "tokens/s", "TFLOP/s", "of 989", "of matmul rate", "peak memory"):
        table.add_column(name, justify="right")
    figures, profiles = {}, {}
    for stage in (1, 2):
        found, profiles[f"stage{stage}"] = _measure(console, stage, rounds, compiled)
        figures |= {f"{key}_stage{stage}": value for key, value in found.items()}
        table.add_row(
            str(stage),
            f"{found['step_seconds'] * 1000:.0f} ms",
            f"{found['tokens_per_second']:.0f}",
            f"{found['flops_per_second'] / 1e12:.0f}",
            f"{found['mfu']:.1%}",
            f"{found['mfu_of_matmul']:.1%}",
            f"{found['peak_memory_bytes'] / 2**30:.1f} GiB",
        )
    console.print(table)
    return {"figures": {**figures, "mfu": figures["mfu_stage2"]}, "profile": profiles}


def _measure(console: Console, stage: int, rounds: int, compiled: bool) -> tuple[dict[str, float], dict[str, float]]:
    torch.cuda.reset_peak_memory_stats()
    objective, model, flops = _objective(stage)
    model.set_attn_implementation({"": "flex_attention", "text_config": "flex_attention"})
    if compiled:
        for layers in (model.model.pre_decoder.layers, model.model.language_model.layers):
            for layer in layers:
                layer.compile()
    step = _stepper(objective)
    batches = [
        [packed(model.config, [row], ROW_TOKENS, torch.bfloat16) for row in rows]
        for rows, _ in zip(steps_of_records(model.config, ROW_TOKENS, ROWS), range(rounds + 2), strict=False)
    ]
    works = [sum((Work.of(batch, model.config) for batch in own), Work()) for own in batches]
    rates, times = [], []
    for number, own in enumerate(batches):
        moved = [batch.to(torch.device("cuda")) for batch in own]
        rates.append(_matmul_rate())
        times.append(_seconds(lambda moved=moved: step(moved)))
        last = moved if number else None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step(last)
        torch.cuda.synchronize()
    used = slice(2, None)  # the first two warm up and compile
    seconds, work = sum(times[used]), sum(flops.of(own).model for own in works[used])
    found = {
        "parameters": sum(p.numel() for p in objective.parameters()),
        "step_seconds": seconds / rounds,
        "tokens_per_second": sum(own.tokens for own in works[used]) / seconds,
        "flops_per_second": work / seconds,
        "mfu": work / seconds / PEAK,
        "mfu_of_matmul": work / seconds / median(rates),
        "matmul_flops_per_second": median(rates),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
    }
    return found, show(console, f"stage {stage}", shares(profiler, "cuda"))


def _objective(stage: int) -> tuple[nn.Module, HaploForConditionalGeneration, StepFlops]:
    torch.manual_seed(0)
    sizes = {key: value for key, value in VISION.items() if key != "image_size"}
    text = LlamaConfig(**LANGUAGE)
    config = HaploConfig(HaploPreDecoderConfig(**sizes), text, image_token_id=31_999, image_size=VISION["image_size"])
    with torch.device("cuda"):
        model = HaploForConditionalGeneration(config).train()
        if stage == 2:
            return NextToken(model), model, StepFlops.stage2(model)
        vision = CLIPVisionModel(CLIPVisionConfig(**VISION))
        objective = Distillation(model, vision, -2, 1.0)
    objective.frozen_to(torch.device("cuda"), torch.bfloat16)
    return objective, model, StepFlops.stage1(model, vision.config)


def _stepper(objective: nn.Module) -> Callable[[list[Batch]], Any]:
    """An optimiser step with DeepSpeed where it is installed, else in a plain loop."""
    if find_spec("deepspeed"):
        compute = ComputeProfile(name="benchmark", device="cuda", micro_batch_rows=1)
        start_distributed(compute)
        batch = BatchSettings(rows=ROWS, row_tokens=ROW_TOKENS)
        settings = StageSettings(steps=1, precision="bf16", batch=batch, optimizer=OPTIMIZER)
        engine = make_engine(objective, settings, compute, ROWS)
        return lambda batches: take_step(engine, batches, global_counts(objective, batches))
    masters = nn.ParameterList(p.detach().float() for p in objective.parameters() if p.requires_grad)
    weights = [p for p in objective.to(torch.bfloat16).parameters() if p.requires_grad]
    optimizer = make_optimizer(masters, OPTIMIZER)

    def step(batches: list[Batch]) -> None:
        counts = [objective.counts(batch) for batch in batches]
        total = {name: sum(own[name] for own in counts) for name in counts[0]}
        for batch in batches:
            sum(part / max(1, total[name]) for name, part in objective(batch).items()).backward()
            for weight, master in zip(weights, masters, strict=True):
                if weight.grad is not None:
                    master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                    weight.grad = None
        nn.utils.clip_grad_norm_(masters, OPTIMIZER.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(weights, list(masters))

    return step


def _seconds(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _matmul_rate() -> float:
    """FLOP/s of an 8192³ product in bf16: the best of three."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a @ b
    return 2 * 8192**3 / min(_seconds(lambda: a @ b) for _ in range(3))
