"""Checkpoints go into our layout and back without a change, and a trained model of ours fits the released layout."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from typer.testing import CliRunner

from haplovl.cli import app
from haplovl.model import HaploForConditionalGeneration, HaploImageProcessor, HaploProcessor
from haplovl.model.export_released import export_released
from haplovl.model.import_released import import_released
from haplovl.model.inherit import inherit
from haplovl.model.layout import tile_shapes
from haplovl.settings import ModelSettings

# float32: the text projection folded into the embedding, RMSNorm in one call; measured 1.3e-6 on logits of up to 3.
TOLERANCE = 1e-5
SETTINGS = ModelSettings(image_size=32, class_token=False, pre_rotary_increment=1.0, released_layout=True)
SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LANGUAGES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama, every bias and scaled rotary": (
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    ),
    "llama with wide heads": (LlamaForCausalLM, LlamaConfig, {"head_dim": 16}),
    "mistral without a window": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2, tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
}


@pytest.fixture(scope="module")
def released_processor(tokenizer):
    """The processor that the pipeline makes for model.released_layout and four tiles."""
    from haplovl.data.conversation import TEMPLATES

    points = [(32 * rows, 32 * columns) for rows, columns in tile_shapes(4)]
    images = HaploImageProcessor(32, 8, 4, tiling="released", image_grid_pinpoints=points)
    template = TEMPLATES["plain"].jinja()
    return HaploProcessor(images, tokenizer, chat_template=template, class_token=False, frame_newlines=False)


@pytest.fixture
def build(vision, released_processor, tmp_path):
    """`build(language)`: the folder of a model in the released layout, in which no tensor is zero or one."""

    def build(cls=LlamaForCausalLM, config=LlamaConfig, dtype=torch.float32, folder="ours", **changes):
        torch.manual_seed(5)
        processor = released_processor
        sizes = {"vocab_size": len(processor.tokenizer), "num_key_value_heads": 2, "pad_token_id": 0, **SIZES}
        language = cls(config(**{**sizes, **changes}))
        ids = (processor.image_token_id, len(processor.tokenizer), processor.video_token_id)
        model = inherit(vision, language, SETTINGS, *ids)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.to(dtype).save_pretrained(tmp_path / folder)
        processor.save_pretrained(tmp_path / folder)
        return tmp_path / folder

    return build


def answers(folder):
    """Token ids and logits of a padded batch with pictures of several tiles, a video and text alone."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    generator = torch.Generator().manual_seed(6)

    def picture(height, width):
        return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator).byte().numpy())

    batch = processor(
        text=["<image>Where is the red digit?", "two <image> one <video> yes", "Is there a 3?"],
        images=[picture(20, 90), picture(64, 64)],
        videos=[[picture(40, 30), picture(40, 30)]],
        padding=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        logits = model(**batch).logits
    real = batch["attention_mask"].bool()
    assert logits[real].std() > 0.5  # near zero, any two models would agree
    return batch["input_ids"], logits[real]


def content(path):
    return json.loads(path.read_text())


# --- there and back -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["model", "model_variant"])
def test_a_released_checkpoint_comes_back_tensor_for_tensor(name, released_source, golden, tmp_path):
    source, ours, back, again = (tmp_path / part for part in ("source", "ours", "back", "again"))
    released_source(source, name)
    import_released(source, ours)
    export_released(ours, back)
    import_released(back, again)

    before, after = (load_file(folder / "model.safetensors") for folder in (source, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)

    full, written = content(golden / name / "config_full.json"), content(back / "config.json")
    for part in ("base_config", "pre_config", None):
        theirs, found = (full, written) if part is None else (full[part], written[part])
        unread = {"base_config", "pre_config", "post_config"}
        if part == "pre_config" and not theirs["attention_rope"]:
            unread |= {"rope_theta", "rope_scaling"}  # it turns by the base configuration's then
        shared = (found.keys() & theirs.keys()) - unread
        assert len(shared) > 20
        assert {key: found[key] for key in shared} == {key: theirs[key] for key in shared}

    for file in ("config.json", "processor_config.json", "tokenizer.json", "generation_config.json"):
        assert (again / file).read_bytes() == (ours / file).read_bytes(), file
    same = ("preprocessor_config.json", "processor_config.json", "video_processor/preprocessor_config.json",
            "chat_template.json", "generation_config.json")  # fmt: skip
    for file in same:
        theirs, found = content(source / file), content(back / file)
        for saved in (theirs, found):
            saved.pop("transformers_version", None)
            saved.pop("_from_model_config", None)
        assert found == theirs, file
    theirs, found = content(source / "tokenizer_config.json"), content(back / "tokenizer_config.json")
    shared = (theirs.keys() & found.keys()) - {"tokenizer_class"}
    assert {key: found[key] for key in shared} == {key: theirs[key] for key in shared}
    theirs, found = content(source / "tokenizer.json"), content(back / "tokenizer.json")
    assert found["model"] == theirs["model"]
    assert found["added_tokens"] == theirs["added_tokens"]


def test_the_commands_import_and_export(golden, tmp_path):
    shutil.copytree(golden / "model", tmp_path / "model")
    shutil.copytree(golden / "processor", tmp_path / "processor")
    imported = CliRunner().invoke(app, ["import-released", str(tmp_path), str(tmp_path / "ours")])
    said = f"{tmp_path}/model -> {tmp_path}/ours (processor from {tmp_path}/processor)"
    assert imported.stdout.splitlines()[-1] == said
    exported = CliRunner().invoke(app, ["export-released", str(tmp_path / "ours"), str(tmp_path / "back")])
    assert exported.stdout.splitlines()[-1] == f"{tmp_path}/ours -> {tmp_path}/back"
    assert imported.exit_code == exported.exit_code == 0
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("model", "processor", "named"),
    [(".", ".", "."), (".", "processor", "."), ("model", "processor", "model"), ("model", "processor", ".")],
    ids=["in SRC", "in SRC/processor", "beside SRC", "SRC holds model and processor"],
)
def test_the_processor_is_found(model, processor, named, golden, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(golden / "model", source / model)
    shutil.copytree(golden / "processor", source / processor, dirs_exist_ok=True)
    said = import_released(source / named, tmp_path / "ours")
    assert said.endswith(f"(processor from {(source / processor)})")
    assert AutoProcessor.from_pretrained(tmp_path / "ours").image_tokens(56, 56) == 20


def test_a_model_without_processor_is_imported_and_exported_alone(golden, tmp_path):
    shutil.copytree(golden / "model", tmp_path / "source" / "model")
    assert import_released(tmp_path / "source" / "model", tmp_path / "ours").endswith("no processor files were found)")
    assert export_released(tmp_path / "ours", tmp_path / "back").endswith("no processor files were found)")
    assert {path.name for path in (tmp_path / "back").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip
    assert content(tmp_path / "back" / "config.json")["image_grid_pinpoints"] == [[56, 56]]


def test_shards_are_read_by_their_index_and_beside_a_whole_file_ignored(released_source, tmp_path):
    whole, sharded = released_source(tmp_path / "whole"), released_source(tmp_path / "sharded")
    (whole / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "of_long_ago"}}')
    weights = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"first.safetensors": names[::2], "second.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: weights[name] for name in own}, sharded / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    for source in (whole, sharded):
        import_released(source, tmp_path / f"{source.name}_ours")
    a, b = (load_file(tmp_path / f"{kind}_ours" / "model.safetensors") for kind in ("whole", "sharded"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_precision_stays(dtype, released_source, tmp_path):
    source = released_source(tmp_path / "source")
    weights = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors")
    import_released(source, tmp_path / "ours")
    export_released(tmp_path / "ours", tmp_path / "back")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(after[name], weights[name]) and after[name].dtype == dtype for name in weights)
    assert content(tmp_path / "back" / "config.json")["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_settings_of_sampling_do_not_keep_a_checkpoint_from_being_imported(released_source, tmp_path):
    """Llama's and Vicuna's generation_config.json name a temperature without sampling, which nobody could save."""
    source = released_source(tmp_path / "source")
    (source / "generation_config.json").write_text('{"temperature": 0.7, "top_p": 0.8, "eos_token_id": [507, 508]}')
    import_released(source, tmp_path / "ours")
    generation = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").generation_config
    assert (generation.temperature, generation.eos_token_id) == (None, [507, 508])
    assert generation.suppress_tokens == [510, 511]
    export_released(tmp_path / "ours", tmp_path / "back")
    back = content(tmp_path / "back" / "generation_config.json")
    assert back["eos_token_id"] == [507, 508]
    assert back.get("suppress_tokens") is None


# --- models of ours -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LANGUAGES)
def test_an_exported_model_answers_as_before(name, build, tmp_path):
    cls, config, changes = LANGUAGES[name]
    ours = build(cls, config, **changes)
    export_released(ours, tmp_path / "released")
    import_released(tmp_path / "released", tmp_path / "again")
    (ids, logits), (ids_again, logits_again) = answers(ours), answers(tmp_path / "again")
    assert torch.equal(ids, ids_again)
    torch.testing.assert_close(logits, logits_again, atol=TOLERANCE, rtol=0)


def test_what_the_layout_writes_otherwise_is_exact(build, tmp_path):
    ours = build(Qwen2ForCausalLM, Qwen2Config)
    before, config = load_file(ours / "model.safetensors"), content(ours / "config.json")
    export_released(ours, tmp_path / "released")
    after = load_file(tmp_path / "released" / "model.safetensors")

    mlp = {part: after[f"model.layers.1.mlp.{part}"] for part in ("gate_proj.weight", "gate_proj.bias")}
    assert torch.equal(mlp["gate_proj.weight"], before["model.pre_decoder.layers.1.fc1.weight"])
    assert torch.equal(mlp["gate_proj.bias"], before["model.pre_decoder.layers.1.fc1.bias"])
    assert not after["model.layers.1.mlp.up_proj.weight"].any()
    assert bool((after["model.layers.1.mlp.up_proj.bias"] == 1).all())

    words, projection = before["model.language_model.embed_tokens.weight"], "model.text_projection"
    folded = words @ before[f"{projection}.weight"].T + before[f"{projection}.bias"]
    torch.testing.assert_close(after["model.embed_tokens.weight"], folded, atol=1e-6, rtol=0)

    first = f"model.layers.{config['pre_config']['num_hidden_layers']}"
    own = "model.language_model.layers.0"
    assert torch.equal(after[f"{first}.self_attn.q_proj.bias"], before[f"{own}.self_attn.q_proj.bias"])
    for missing in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        assert torch.equal(after[f"{first}.{missing}.weight"], before[f"{own}.{missing}.weight"])
        assert not after[f"{first}.{missing}.bias"].any()
    assert after["model.pre_pos_embed"].shape == (1, 16, 32)
    assert after["model.patch_embed.proj.weight"].shape == (32, 3, 8, 8)


def test_the_bias_of_the_patches_moves_into_the_positions(build, tmp_path):
    ours = build()
    model = HaploForConditionalGeneration.from_pretrained(ours)
    config = model.config
    config.pre_config.patch_bias = True
    biased = HaploForConditionalGeneration(config)
    state = {**model.state_dict(), "model.image_embedding.patch.bias": torch.randn(config.pre_config.hidden_size)}
    biased.load_state_dict(state)
    biased.save_pretrained(ours)
    export_released(ours, tmp_path / "released")
    import_released(tmp_path / "released", tmp_path / "again")
    torch.testing.assert_close(answers(ours)[1], answers(tmp_path / "again")[1], atol=TOLERANCE, rtol=0)


def test_a_tokenizer_that_begins_texts_by_itself_does_not_do_so_after_export(build, tmp_path):
    """Our templates write their own beginning, and the release's processor would let the tokenizer add a second."""
    ours = build()
    processor = AutoProcessor.from_pretrained(ours)
    start = ("<|user|>", processor.tokenizer.convert_tokens_to_ids("<|user|>"))
    processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start[0]} $A", special_tokens=[start]
    )
    processor.save_pretrained(ours)
    assert AutoProcessor.from_pretrained(ours).tokenizer("yes")["input_ids"][0] == start[1]
    export_released(ours, tmp_path / "released")
    import_released(tmp_path / "released", tmp_path / "again")
    expected = processor(text=["yes no"])["input_ids"]
    assert AutoProcessor.from_pretrained(tmp_path / "again")(text=["yes no"])["input_ids"] == expected


def test_a_model_without_videos_comes_back_without_videos(build, tmp_path):
    ours = build()
    settings = content(ours / "config.json")
    settings["video_token_id"] = None
    (ours / "config.json").write_text(json.dumps(settings))
    export_released(ours, tmp_path / "released")
    import_released(tmp_path / "released", tmp_path / "again")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert model.config.video_token_id is None
    assert model.generation_config.suppress_tokens == [model.config.image_token_id]
