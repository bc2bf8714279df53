"""Low-rank adapters (LoRA, arXiv 2106.09685) on the post-decoder: stage 2 for a fraction of the optimiser's memory.

peft holds the adapters; they live only while training runs and are merged into plain weights before anything is saved.
"""

import re
import sys
from collections.abc import Mapping

import torch
from torch import nn

from haplovl.errors import UserError
from haplovl.model import HaploForConditionalGeneration
from haplovl.settings import LoraSettings

ADAPTER = "default"
ADAPTER_WEIGHT = re.compile(r"\.lora_[AB]\.")


def add_adapters(model: HaploForConditionalGeneration, settings: LoraSettings, seed: int) -> int:
    """Puts an adapter on every linear layer of the language model, in place; returns how many weights they have.

    Frozen: the language model's own weights, the head and the table of text embeddings. Image embedding, text
    projection, pre-decoder and connector stay as they are: trained whole. Before the first step the model computes what
    it computed before; the adapters' random start depends on `seed` alone, and no random number is drawn.

    Raises:
        UserError: the rank is not below the width of every layer, the model has adapters already, or peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("stage2.lora needs peft, which is not installed: pip install 'haplovl[train]'") from None
    if _adapted(model):
        raise UserError("the model has adapters already; merge them first")
    language = model.model.language_model
    layers = {name: layer for name, layer in language.named_modules() if isinstance(layer, nn.Linear)}
    narrowest = min(min(layer.in_features, layer.out_features) for layer in layers.values())
    if settings.rank >= narrowest:
        raise UserError(
            f"stage2.lora.rank is {settings.rank}, but the language model has layers only {narrowest} wide: such an "
            "adapter is no smaller than the layer; choose a lower rank, or leave stage2.lora out"
        )
    for part in (language, model.lm_head, model.get_input_embeddings()):
        part.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=list(layers)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, language, ADAPTER)
    return trainable_parameters(language)[0]


@torch.no_grad()
def merge_adapters(model: HaploForConditionalGeneration) -> None:
    """Adds the adapters to the weights they belong to and takes them out again, in place; without any, does nothing.

    What was frozen stays so. The weights must be whole: under ZeRO 3 use `merged_weights`.

    Raises:
        ValueError: an adapter holds a number that is not finite.
    """
    for name, layer in _adapted(model).items():
        base, down, up = layer.get_base_layer(), layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        base.weight.copy_(_merged(name, base.weight, down, up, layer.scaling[ADAPTER]))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    if hasattr(model.model.language_model, "peft_config"):
        del model.model.language_model.peft_config


def merged_weights(weights: Mapping[str, torch.Tensor], settings: LoraSettings) -> dict[str, torch.Tensor]:
    """A state dict with adapters as the plain one: merged as by `merge_adapters`, under the names of the model without.

    For weights that were gathered from several processes; the model itself is left alone.

    Raises:
        ValueError: an adapter holds a number that is not finite.
    """
    plain = {}
    for name, value in weights.items():
        layer, inner, rest = name.rpartition(".base_layer.")
        if inner and rest == "weight":
            down, up = (weights[f"{layer}.{part}.{ADAPTER}.weight"] for part in ("lora_A", "lora_B"))
            value = _merged(layer, value, down, up, settings.alpha / settings.rank)
        if not ADAPTER_WEIGHT.search(name):
            plain[f"{layer}.{rest}" if inner else name] = value
    return plain


def _merged(name: str, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """weight [out, in] + scale · up [out, rank] · down [rank, in], in float32, rounded once."""
    merged = weight.float() + scale * (up.float() @ down.float())
    if not bool(merged.isfinite().all()):
        raise ValueError(f"the adapter of {name} holds numbers that are not finite")
    return merged.to(weight.dtype)


def trainable_parameters(module: nn.Module) -> tuple[int, int]:
    """How many weights are trained, and how many there are."""
    # Under ZeRO 3 a parameter holds a part only; DeepSpeed keeps its whole size beside it.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that carry an adapter."""
    if "peft" not in sys.modules:  # whoever added adapters has imported it
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
