"""Every preset builds at full size, on the meta device: shapes without memory."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from haplovl.model import HaploForConditionalGeneration
from haplovl.model.inherit import build_config
from haplovl.presets import list_presets
from haplovl.settings import load_params

CLIP_L_336 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
LANGUAGE_MODELS = {
    "lmsys/vicuna-7b-v1.5": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008},
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
    },
}
BILLIONS = {"haplovl-7b": 7.05, "haplovl-8b": 8.35, "haplovl-8b-multi-image": 8.35}
"""Language model (6.74 and 8.03) plus CLIP-L (0.30) and two projections (0.01)."""


@pytest.mark.parametrize("name", sorted(BILLIONS))
def test_a_preset_builds_on_the_meta_device(name, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    published = [name for name in list_presets() if load_params(f"params/{name}.yaml").teachers.language.kind == "hub"]
    assert sorted(BILLIONS) == published
    params = load_params(f"params/{name}.yaml")
    vision = CLIPVisionConfig(**CLIP_L_336, patch_size=14, image_size=336)
    sizes = {"num_hidden_layers": 32, "num_attention_heads": 32, **LANGUAGE_MODELS[params.teachers.language.id]}
    language = LlamaConfig(**sizes)
    config = build_config(vision, language, params.model, image_token_id=sizes["vocab_size"])
    with torch.device("meta"):
        model = HaploForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(BILLIONS[name], abs=0.03)
    assert config.tokens_per_image == (params.model.image_size // 14) * (params.model.image_size // 14 + 1) + 1
    assert params.prepare.max_tokens > config.tokens_per_image
