"""Tiny models around every kind of language model, a packed batch for them, and projects to train in."""

import os
import shutil
from pathlib import Path

import pytest
import small_project
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from haplovl.data.loader import IGNORE, Batch
from haplovl.model import HaploForConditionalGeneration
from haplovl.model.import_released import import_released
from haplovl.model.inherit import inherit
from haplovl.model.layout import single_tile
from haplovl.settings import ModelSettings

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
KINDS = [*CONFIGS, "released"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that share tiny matrices wait for each other: on a busy machine one is several times faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def environment_as_before():
    """What trains in the tests' own process names a rank in its environment, which later commands must not inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def released_folder(tmp_path_factory):
    """A tiny checkpoint of the authors' layout, imported."""
    folder = tmp_path_factory.mktemp("released")
    shutil.copytree(GOLDEN / "model", folder / "source")
    import_released(folder / "source", folder / "ours")
    return folder / "ours"


@pytest.fixture
def tiny(released_folder):
    """`tiny(kind)`: a fresh model around one of KINDS of language models."""

    def build(kind="llama"):
        if kind == "released":
            return HaploForConditionalGeneration.from_pretrained(released_folder, dtype=torch.float32).eval()
        torch.manual_seed(0)
        vision = CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=32, patch_size=8))
        own = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 16}}.get(kind, {})
        config = CONFIGS[kind](vocab_size=64, num_key_value_heads=2, initializer_range=0.1, **SIZES, **own)
        return inherit(vision, AutoModelForCausalLM.from_config(config), ModelSettings(image_size=32), 63, 64).eval()

    return build


@pytest.fixture
def packed():
    """`packed(model)`: two rows; the first is text alone, the second has two documents with a picture each.

    In the second row, document 0 is: 2 words, a picture, a word, an answer of 2 words; document 1: a word, an answer of
    one word, a picture, an answer of 3 words; then 2 of padding.
    """

    def build(model):
        config = model.config
        side = config.image_size // config.pre_config.patch_size
        grid = single_tile(side, side)
        tokens = grid.tokens(config.pre_config.class_token, config.pre_config.image_newline)
        picture = [config.image_token_id] * tokens
        row = [5, 6, *picture, 7, 8, 9, 10, 14, *picture, 11, 12, 13, 0, 0]
        answers = [0, 0, *[0] * tokens, 0, 1, 1, 0, 1, *[0] * tokens, 1, 1, 1, 0, 0]
        documents = [0] * (tokens + 5) + [1] * (tokens + 5) + [-1, -1]
        ids = torch.tensor([[20 + i % 7 for i in range(len(row))], row])
        labels = torch.where(torch.tensor([[0] + [1] * (len(row) - 1), answers]).bool(), ids, IGNORE)
        document_ids = torch.tensor([[0] * len(row), documents])
        noise = torch.Generator().manual_seed(1)
        channels, size = config.pre_config.num_channels, config.image_size
        pixels = torch.randn(2, channels, size, size, generator=noise)
        return Batch(ids, labels, document_ids, pixels, [grid, grid], ["a", "b", "c"])

    return build


@pytest.fixture(scope="session")
def make_project():
    """`make_project(folder, vision, language, processor, stage)`: see tests/helpers/small_project.py."""
    return small_project.make_project
