"""Inference speed and memory beside what the machine can do at best and beside a naive implementation.

    python benchmarks/inference.py [--json FILE] [--repeats N]

Every configuration and precision runs in a process of its own, so that its peak memory is its own. Each figure is a
median, and the machine's ceilings (matrix product, memory copy) are measured in the same process, in turns with it.
Prefill is one forward pass over an image and text; decode is `generate` with a cache, one answer at a time. The model
is measured as `from_pretrained` gives it, and packed for a CPU, as `haplovl ask`, `chat` and `evaluate` use it.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from haplovl.model import HaploConfig, HaploForConditionalGeneration, HaploPreDecoderConfig, pack_for_cpu
from haplovl.model.layout import ImageGrid, single_tile

CONFIGURATIONS = {
    "65M": {"pre": (384, 6, 1536), "post": (512, 8, 3072), "vocabulary": 8192},
    "336M": {"pre": (768, 12, 3072), "post": (1024, 16, 3584), "vocabulary": 8192},
}
"""Width, layers and MLP width of pre- and post-decoder; heads have 64 dimensions, images 336 pixels, patches 14."""
TEXT_TOKENS = 63
NEW_TOKENS = 48
IMAGE_TOKEN = 8000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(name: str, dtype: torch.dtype) -> HaploForConditionalGeneration:
    """A model with random weights."""
    shape = CONFIGURATIONS[name]

    def decoder(part: str) -> dict[str, int]:
        width, layers, mlp = shape[part]
        return {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "intermediate_size": mlp,
            "num_attention_heads": width // 64,
        }

    text = LlamaConfig(vocab_size=shape["vocabulary"], max_position_embeddings=4096, **decoder("post"))
    config = HaploConfig(HaploPreDecoderConfig(**decoder("pre")), text, image_token_id=IMAGE_TOKEN, image_size=336)
    torch.manual_seed(0)
    return HaploForConditionalGeneration(config).to(dtype).eval()


def prompt(model: HaploForConditionalGeneration) -> dict[str, torch.Tensor]:
    """One image and text around it."""
    count = model.config.tokens_per_image
    words = torch.randint(1, IMAGE_TOKEN, (1, TEXT_TOKENS), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([words[:, :8], torch.full((1, count), IMAGE_TOKEN), words[:, 8:]], dim=1)
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(2)).to(model.dtype)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# --- the limits ------------------------------------------------------------------------------------------------------
def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a 2048³ matrix product: the median of five."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    a @ b
    return 2 * 2048**3 / statistics.median(seconds(lambda: a @ b) for _ in range(5))


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy far larger than the caches: the median of five."""
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(5))


def streamed_bytes(model: HaploForConditionalGeneration) -> int:
    """Bytes of the weights that every new text token needs: tables are looked up and the patch embedding rests."""
    core = model.model
    resting = {id(core.get_input_embeddings().weight), *(id(p) for p in core.image_embedding.parameters())}
    return sum(p.nbytes for p in model.parameters() if id(p) not in resting)


def prefill_flops(model: HaploForConditionalGeneration, length: int) -> float:
    """Floating-point operations of the matrix products of one forward pass with logits for the last position only."""
    core, config = model.model, model.config

    def linear(module: torch.nn.Module) -> int:
        return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))

    pre, text = config.pre_config, config.text_config
    every = linear(core.pre_decoder) + linear(core.language_model) + linear(core.connector)
    attention = 4 * length**2 * (pre.hidden_size * pre.num_hidden_layers + text.hidden_size * text.num_hidden_layers)
    patches = 2 * (336 // pre.patch_size) ** 2 * core.image_embedding.patch.weight.numel()
    return every * length + attention + patches + 2 * model.lm_head.weight.numel()


# --- a naive implementation ------------------------------------------------------------------------------------------
class Naive:
    """The same model as first written down: the dense mask of the whole sequence made anew at every step, attention
    by its definition, and logits for every position that is computed. It does keep keys and values."""

    def __init__(self, model: HaploForConditionalGeneration) -> None:
        self.model, self.core = model, model.model
        self.caches: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.inference_mode()
    def generate(self, inputs: dict[str, torch.Tensor], new_tokens: int) -> torch.Tensor:
        """Greedy decoding; input_ids [1, L] → [1, L + new_tokens]."""
        self.caches.clear()
        ids, new, pixels = inputs["input_ids"], inputs["input_ids"], inputs["pixel_values"]
        for _ in range(new_tokens):
            logits = self.logits(ids, new, pixels)
            new, pixels = logits[:, -1:].argmax(-1), None
            ids = torch.cat([ids, new], dim=1)
        return ids

    def logits(self, ids: torch.Tensor, new: torch.Tensor, pixels: torch.Tensor | None) -> torch.Tensor:
        """Logits of the new tokens [1, N] at the end of the sequence [1, L] → [1, N, V]."""
        core, length = self.core, ids.shape[1]
        is_image = ids[0] == IMAGE_TOKEN
        allowed = torch.ones(length, length, dtype=torch.bool).tril() | (is_image[:, None] & is_image[None, :])
        mask = torch.zeros(length, length, dtype=self.model.dtype).masked_fill(~allowed, float("-inf"))
        mask = mask[-new.shape[1] :]
        inside = is_image & torch.cat([is_image.new_zeros(1), is_image[:-1]])
        pre_positions = torch.where(inside, 0, 1).cumsum(0)[-new.shape[1] :] - 1
        x = core.text_projection(core.get_input_embeddings()(new))
        if pixels is not None:
            x[0, is_image] = core.image_embedding(pixels, [core_grid(self.model)])
        x = core.pre_decoder.pre_layernorm(x)
        for i, layer in enumerate(core.pre_decoder.layers):
            attended = self.attention(i, layer.self_attn, layer.layer_norm1(x), pre_positions, mask, 10000.0)
            x = x + layer.self_attn.out_proj(attended)
            x = x + layer.fc2(layer.activation(layer.fc1(layer.layer_norm2(x))))
        x = core.connector(core.pre_decoder.final_layernorm(x))
        positions = torch.arange(length)[-new.shape[1] :]
        for i, layer in enumerate(core.language_model.layers):
            attended = self.attention(100 + i, layer.self_attn, layer.input_layernorm(x), positions, mask, 10000.0)
            x = x + layer.self_attn.o_proj(attended)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(core.language_model.norm(x))

    def attention(
        self, index: int, module: Any, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, theta: float
    ) -> torch.Tensor:
        """[1, N, H] → [1, N, H] over all keys so far."""
        query, key, value = (
            f(x).unflatten(-1, (-1, 64)).transpose(1, 2) for f in (module.q_proj, module.k_proj, module.v_proj)
        )
        angles = positions[:, None] / theta ** (torch.arange(0, 64, 2) / 64)
        cos, sin = (torch.cat([f(angles), f(angles)], dim=-1).to(x.dtype) for f in (torch.cos, torch.sin))

        def rotate(y: torch.Tensor) -> torch.Tensor:
            return y * cos + torch.cat([-y[..., 32:], y[..., :32]], dim=-1) * sin

        query, key = rotate(query), rotate(key)
        if index in self.caches:
            key, value = (torch.cat(pair, dim=2) for pair in zip(self.caches[index], (key, value), strict=True))
        self.caches[index] = key, value
        weights = (query @ key.transpose(2, 3) / 8 + mask).float().softmax(-1).to(x.dtype)
        return (weights @ value).transpose(1, 2).flatten(2)


def core_grid(model: HaploForConditionalGeneration) -> ImageGrid:
    """The layout of one picture in one tile."""
    side = model.config.image_size // model.config.pre_config.patch_size
    return single_tile(side, side)


# --- one process -----------------------------------------------------------------------------------------------------
def measure(name: str, precision: str, repeats: int) -> dict[str, float]:
    """All figures of one configuration and precision."""
    dtype, imports = DTYPES[precision], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    plain = build(name, dtype)
    weights = {
        "parameters": sum(p.numel() for p in plain.parameters()),
        "weight_bytes": sum(p.nbytes for p in plain.parameters()),
    }
    streamed, inputs = streamed_bytes(plain), prompt(plain)
    length = inputs["input_ids"].shape[1]
    work = prefill_flops(plain, length)
    naive = Naive(plain)
    packed = pack_for_cpu(build(name, dtype))
    ways = {"packed": packed, "plain": plain, "naive": naive}
    if precision == "fp32" and not torch.equal(naive.generate(inputs, 5), generate(packed, inputs, 5)):
        raise SystemExit("error: the naive implementation gives other tokens; the comparison means nothing")
    rows: dict[str, list[float]] = {}
    for _ in range(repeats):
        rows.setdefault("rate", []).append(matmul_rate(dtype))
        rows.setdefault("copy", []).append(copy_bandwidth())
        for way, model in ways.items():
            rows.setdefault(f"{way}_prefill", []).append(prefill_seconds(model, inputs))
            rows.setdefault(f"{way}_decode", []).append(decode_seconds(model, inputs))
    middle = {key: statistics.median(values) for key, values in rows.items()}
    return {
        **weights,
        "prompt_tokens": length,
        "peak_memory_bytes": peak_memory(name, precision) - imports,
        "matmul_flops_per_second": middle["rate"],
        "copy_bytes_per_second": middle["copy"],
        "prefill_seconds": middle["packed_prefill"],
        "decode_tokens_per_second": 1 / middle["packed_decode"],
        "prefill_matmul_share": work / middle["packed_prefill"] / middle["rate"],
        "decode_bandwidth_share": streamed / middle["packed_decode"] / middle["copy"],
        "plain_prefill_matmul_share": work / middle["plain_prefill"] / middle["rate"],
        "plain_decode_bandwidth_share": streamed / middle["plain_decode"] / middle["copy"],
        "prefill_over_naive": middle["naive_prefill"] / middle["packed_prefill"],
        "decode_over_naive": middle["naive_decode"] / middle["packed_decode"],
        "prefill_over_plain": middle["plain_prefill"] / middle["packed_prefill"],
        "decode_over_plain": middle["plain_decode"] / middle["packed_decode"],
    }


@torch.inference_mode()
def generate(model: Any, inputs: dict[str, torch.Tensor], count: int) -> torch.Tensor:
    """Exactly `count` greedy tokens after the prompt."""
    if isinstance(model, Naive):
        return model.generate(inputs, count)
    return model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)


@torch.inference_mode()
def prefill_seconds(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    """Median of three forward passes over the prompt."""
    if isinstance(model, Naive):
        return seconds(lambda: model.generate(inputs, 1))
    return statistics.median(seconds(lambda: model(**inputs, use_cache=True, logits_to_keep=1)) for _ in range(3))


def decode_seconds(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    """Time of one more token: many tokens less one, so that the prompt cancels out."""
    first, all_ = (seconds(lambda n=n: generate(model, inputs, n)) for n in (1, NEW_TOKENS + 1))
    return (all_ - first) / NEW_TOKENS


def peak_memory(name: str, precision: str) -> int:
    """Peak resident bytes of a process that builds the model, packs it and answers once."""
    command = [sys.executable, __file__, "--only", name, precision, "--peak"]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def print_peak(name: str, precision: str) -> None:
    """What `peak_memory` reads."""
    model = pack_for_cpu(build(name, DTYPES[precision]))
    generate(model, prompt(model), 16)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    """Measures every configuration in turn and prints them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--repeats", type=int, default=5, help="rounds per figure (default: 5)")
    parser.add_argument("--only", nargs=2, metavar=("SIZE", "PRECISION"), help=argparse.SUPPRESS)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(*options.only)
        return
    if options.only:
        print(json.dumps(measure(*options.only, options.repeats)))
        return
    results = {
        (name, precision): _in_own_process(name, precision, options.repeats)
        for name in CONFIGURATIONS
        for precision in DTYPES
    }
    _show(results)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(_report(results), file, indent=2)
            file.write("\n")


def _in_own_process(name: str, precision: str, repeats: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--only", name, precision, "--repeats", str(repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _report(results: dict[tuple[str, str], dict[str, float]]) -> dict[str, Any]:
    """`figures` are those of the 65M configuration; `configurations` has everything."""
    figures = {}
    for precision in DTYPES:
        own = results["65M", precision]
        names = [name for name in own if name.endswith(("_share", "_over_naive", "_over_plain", "_per_second"))]
        names += ["prefill_seconds", "peak_memory_bytes"]
        figures |= {f"{key}_{precision}": own[key] for key in names}
    figures["decode_over_naive"] = figures["decode_over_naive_fp32"]
    figures["prefill_over_naive"] = figures["prefill_over_naive_fp32"]
    everything = {f"{name}_{precision}": values for (name, precision), values in results.items()}
    return {"figures": figures, "configurations": everything, "machine": _machine()}


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _show(results: dict[tuple[str, str], dict[str, float]]) -> None:
    machine = _machine()
    table = Table(title=f"inference, {machine['cores']} cores, torch {machine['torch']}")
    speeds = ("of ceiling", "unpacked", "× naive")
    columns = ("model", "prefill", *speeds, "decode", *speeds, "peak memory", "weights")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for (name, precision), r in results.items():
        table.add_row(
            f"{name} {precision}",
            f"{r['prefill_seconds'] * 1000:.0f} ms",
            f"{r['prefill_matmul_share']:.0%}",
            f"{r['plain_prefill_matmul_share']:.0%}",
            f"{r['prefill_over_naive']:.2f}",
            f"{r['decode_tokens_per_second']:.0f}/s",
            f"{r['decode_bandwidth_share']:.0%}",
            f"{r['plain_decode_bandwidth_share']:.0%}",
            f"{r['decode_over_naive']:.2f}",
            f"{r['peak_memory_bytes'] / 2**20:.0f} MiB",
            f"{r['weight_bytes'] / 2**20:.0f} MiB",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    exact, half = results["65M", "fp32"], results["65M", "bf16"]
    rates = [f"{r['matmul_flops_per_second'] / 1e9:.0f}" for r in (exact, half)]
    console.print(
        f"prompt of {exact['prompt_tokens']:.0f} tokens; ceilings: matrix product of 2048³ {rates[0]} GFLOP/s fp32, "
        f"{rates[1]} bf16; copy {exact['copy_bytes_per_second'] / 1e9:.0f} GB/s"
    )


if __name__ == "__main__":
    main()
