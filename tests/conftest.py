"""Fixtures shared by all tests: tiny teachers and a tiny model with real tokenizer and processor."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TEXT = ["Which digit is at the top left? 7 Where is the red digit? top left Is there a 3? yes no two one four three"]


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer with the plain template's special tokens."""
    from haplovl.teacher_training import train_tokenizer

    return train_tokenizer(TEXT, 300, "plain")


@pytest.fixture(scope="session")
def vision():
    """A random CLIP vision tower: 32-pixel pictures, 8-pixel patches."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).eval()


@pytest.fixture(scope="session")
def language(tokenizer):
    """A random Llama that knows the tokenizer's words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids, num_key_value_heads=2)).eval()


@pytest.fixture(scope="session")
def model_settings():
    """Settings that fit the tiny teachers."""
    from haplovl.settings import ModelSettings

    return ModelSettings(image_size=32)


@pytest.fixture(scope="session")
def processor(tokenizer):
    """The processor of the tiny model."""
    from haplovl.data.conversation import TEMPLATES
    from haplovl.model import HaploImageProcessor, HaploProcessor

    return HaploProcessor(HaploImageProcessor(32, 8), tokenizer, chat_template=TEMPLATES["plain"].jinja())


def vocabulary(processor):
    """What `inherit` asks of a tokenizer: the image token, its size and the video token."""
    return processor.image_token_id, len(processor.tokenizer), processor.video_token_id


@pytest.fixture
def model(vision, language, model_settings, processor):
    """A fresh tiny model that inherited from the tiny teachers."""
    from haplovl.model.inherit import inherit

    torch.manual_seed(3)
    return inherit(vision, language, model_settings, *vocabulary(processor)).eval()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, vision, language, model_settings, processor):
    """A saved tiny model with its processor, as models/stage2 is."""
    from haplovl.model.inherit import inherit

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("tiny_model")
    inherit(vision, language, model_settings, *vocabulary(processor)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    """A video file of twelve frames that grow brighter."""
    import av
    import numpy as np

    path = tmp_path_factory.mktemp("video") / "brighter.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
