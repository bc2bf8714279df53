"""Broken checkpoints: what is missing, misshapen or damaged is named, and nothing is filled with random numbers."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, LlamaConfig

from haplovl.model import HaploConfig, HaploForConditionalGeneration, HaploModel, HaploProcessor

WEIGHTS = "model.safetensors"
CLASSES = (HaploForConditionalGeneration, AutoModelForImageTextToText, HaploModel, AutoModel)


@pytest.fixture
def broken(tiny_model_dir, tmp_path):
    """`broken(change)`: a copy of the tiny model's folder with changed tensors."""

    def build(change=lambda tensors: None):
        shutil.copytree(tiny_model_dir, tmp_path / "broken")
        tensors = load_file(tmp_path / "broken" / WEIGHTS)
        change(tensors)
        save_file(tensors, tmp_path / "broken" / WEIGHTS, metadata={"format": "pt"})
        return tmp_path / "broken"

    return build


def refused(folder, words, **options):
    for cls in CLASSES:
        with pytest.raises(ValueError, match=words):
            cls.from_pretrained(folder, **options)


def test_missing_tensors_are_named(broken):
    folder = broken(lambda tensors: [tensors.pop("model.connector.weight"), tensors.pop("lm_head.weight")])
    refused(folder, r"broken are incomplete: \d missing .*connector.weight")
    with pytest.raises(ValueError, match="2 missing .lm_head.weight, model.connector.weight."):
        AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)


def test_tensors_of_another_shape_are_named_and_never_ignored(broken):
    folder = broken(lambda tensors: tensors.update({"model.connector.weight": torch.zeros(5, 32)}))
    refused(folder, r"broken do not fit its configuration: .*connector.weight: \[5, 32\] in the file, \[48, 32\] here")
    refused(folder, "would fill tensors with random numbers", ignore_mismatched_sizes=True)


@pytest.mark.parametrize("length", [0, 500, -100])
def test_a_truncated_file_is_refused(broken, length):
    folder = broken()
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])
    refused(folder, "broken are damaged")


def test_a_missing_shard_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    refused(tmp_path, gone.name)


def test_pickled_weights_are_refused(broken):
    folder = broken()
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    refused(folder, "HaploVL loads safetensors only")


def test_the_configuration_of_another_model_is_refused(broken):
    folder = broken()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(**sizes).save_pretrained(folder)
    for cls in (HaploConfig, HaploForConditionalGeneration, HaploModel):
        with pytest.raises(ValueError, match="that of a 'llama', not of a 'haplovl'"):
            cls.from_pretrained(folder)


def test_subfolders_revisions_and_loading_info_are_passed_on(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "inner")
    options = {"subfolder": "inner", "revision": "main"}
    for cls in CLASSES:
        loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True, **options)
        assert isinstance(loaded, torch.nn.Module) and not info["missing_keys"] and not info["mismatched_keys"]
    assert isinstance(AutoProcessor.from_pretrained(tmp_path, subfolder="inner"), HaploProcessor)
