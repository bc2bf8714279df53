"""What cannot be imported or exported is refused with its name and what was expected, before anything is written."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from haplovl.model import HaploConfig, HaploImageProcessor, HaploProcessor
from haplovl.model.configuration import HaploDecoderConfig
from haplovl.model.export_released import export_released, unsupported, unsupported_processor
from haplovl.model.import_released import import_released
from haplovl.model.inherit import build_config
from haplovl.settings import ModelSettings


# --- import: each damages a good checkpoint folder ------------------------------------------------------------------
def settings(file, **changes):
    """Changes values of a JSON file; `part__name` is `name` inside `part`, and a value of ... is taken out."""

    def damage(folder):
        content = json.loads((folder / file).read_text())
        for name, value in changes.items():
            *parts, name = name.split("__")
            place = content
            for part in parts:
                place = place[part]
            place.pop(name, None)
            place.update({} if value is ... else {name: value})
        (folder / file).write_text(json.dumps(content))

    return damage


def base(**changes):
    return settings("config.json", **{f"base_config__{name}": value for name, value in changes.items()})


def pre(**changes):
    return settings("config.json", **{f"pre_config__{name}": value for name, value in changes.items()})


def tensors(change):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        changed = change({name: tensor.clone() for name, tensor in weights.items()})
        save_file(changed, folder / "model.safetensors")

    return damage


def without(file):
    return lambda folder: (folder / file).unlink()


def written(file, text):
    return lambda folder: (folder / file).write_text(text)


def indexed(text):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGED = [
    # the configuration
    (without("config.json"), r"config\.json is missing"),
    (written("config.json", "{"), r"config\.json is no JSON"),
    (written("config.json", "[1]"), r"config\.json holds a list, expected an object"),
    (settings("config.json", model_type="llama"), r"model_type is 'llama', expected 'haplo'"),
    (settings("config.json", model_type=...), r"model_type is 'None', expected 'haplo'"),
    (settings("config.json", base_config=[1]), r"config\.json: base_config is \[1\], expected an object"),
    (base(tie_word_embeddings=True), r"config\.json: tie_word_embeddings is on"),
    (base(use_sliding_window=True), r"base_config\.use_sliding_window is on"),
    (pre(use_sliding_window=True), r"pre_config\.use_sliding_window is on"),
    (base(hidden_size=48), r"layers\.3\.\S+ has the shape \[96\], expected \[48\]"),
    (base(num_hidden_layers=4), r"missing tensors \(16\): model\.layers\.6\."),
    (base(num_hidden_layers=2), r"unknown tensors \(16\): model\.layers\.5\."),
    (base(num_attention_heads=None), r"base_config\.num_attention_heads is None, expected a positive whole number"),
    (pre(intermediate_size="wide"), r"pre_config\.intermediate_size is 'wide', expected a positive whole"),
    (base(patch_size=0), r"base_config\.patch_size is 0, expected a positive whole number"),
    (base(rms_norm_eps=None), r"base_config\.rms_norm_eps is None, expected a positive number"),
    (base(image_token_index=None), r"base_config\.image_token_index is None, expected the id of a token"),
    (base(pad_token_id=600), r"base_config\.pad_token_id is 600, beyond the vocabulary of 512"),
    (base(hidden_act="sharp"), r"base_config\.hidden_act is 'sharp', which is no activation"),
    (base(norm_mode="batchnorm"), r"norm is 'batchnorm'; expected 'layernorm' or 'rmsnorm'"),
    (base(rope_scaling={"type": "rubber", "factor": 2.0}), r"rope_scaling is .*rubber.*, of no type"),
    (base(rope_scaling={"factor": 2.0}), r"rope_scaling is .*, of no type"),
    (base(rope_scaling={"type": "linear"}), r"config\.json: Missing required keys .*factor"),
    (pre(patch_size=7), r"patch_size is 7 in pre_config, expected 14 as in base_config"),
    (pre(default_image_size=112), r"default_image_size is 112 in pre_config, expected 56"),
    (pre(attention_rope=False, num_attention_heads=8), r"share one rotary embedding, but their heads differ"),
    # the weights
    (without("model.safetensors"), r"model\.safetensors is missing \(weights are read from safetensors only\)"),
    (truncated, r"model\.safetensors is damaged"),
    (written("model.safetensors", ""), r"model\.safetensors is damaged"),
    (
        tensors(lambda w: {n: t for n, t in w.items() if n != "model.norm.weight"}),
        r"missing tensors \(1\): model\.norm",
    ),
    (tensors(lambda w: w | {"visual.proj": torch.zeros(1)}), r"unknown tensors \(1\): visual\.proj"),
    (
        tensors(lambda w: w | {"model.image_newline": torch.zeros(3)}),
        r"model\.image_newline has the shape \[3\], expected \[64\]",
    ),
    (
        tensors(lambda w: {n: t.to(torch.int8) for n, t in w.items()}),
        r"holds int8, expected floating-point numbers of 16 bits or more",
    ),
    (indexed("{}"), r"index\.json has no weight_map"),
    (indexed('{"weight_map": {"lm_head.weight": 3}}'), r"index\.json has no weight_map"),
    (indexed('{"weight_map": {"lm_head.weight": "../model.safetensors"}}'), r"index\.json has no weight_map"),
    (indexed('{"weight_map": {"lm_head.weight": "of_long_ago.safetensors"}}'), r"of_long_ago\.safetensors is missing"),
    (written("generation_config.json", "{"), r"generation_config\.json is no JSON"),
    (written("generation_config.json", '{"max_new_tokens": -3}'), r"generation_config\.json: .*max_new_tokens"),
    # the processor
    (written("preprocessor_config.json", "{"), r"preprocessor_config\.json is no JSON"),
    (settings("preprocessor_config.json", do_normalize=False), r"do_normalize is False, expected True"),
    (settings("preprocessor_config.json", resample=2), r"preprocessor_config\.json: resample is 2, expected 3"),
    (settings("preprocessor_config.json", size={"shortest_edge": 56}), r"size is .*shortest_edge.*, expected .*56"),
    (settings("preprocessor_config.json", image_grid_pinpoints=[[60, 60]]), r"multiples of image_size 56"),
    (settings("preprocessor_config.json", image_grid_pinpoints=[56]), r"pinpoints is \[56\], expected pairs"),
    (
        settings("preprocessor_config.json", image_mean=[0.5]),
        r"image_mean is \[0\.5\], expected a list of three numbers",
    ),
    (
        settings("preprocessor_config.json", image_std=[0.5, 0.5, 0]),
        r"image_std is .*, expected a list of three numbers",
    ),
    (settings("preprocessor_config.json", image_grid_pinpoints=[[56]]), r"multiples of image_size 56"),
    (
        settings("video_processor/preprocessor_config.json", image_mean=[0.5] * 3),
        r"video_processor\S+: image_mean differs from that of images",
    ),
    (base(image_aspect_ratio="pad"), r"image_aspect_ratio is 'pad', expected anyres_max_ and a number"),
    (base(image_token_index=500), r"the tokenizer's id of '<image>' is 510, but the model's is 500"),
    (base(video_token_index=500), r"the tokenizer's id of '<video>' is 511, but the model's is 500"),
    (written("tokenizer.json", "{"), r"the tokenizer cannot be read"),
    (without("tokenizer.json"), r"the tokenizer cannot be read"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGED, ids=[words[:40] for _, words in DAMAGED])
def test_a_damaged_checkpoint_is_refused_by_name(damage, words, released_source, tmp_path):
    source = released_source(tmp_path / "source")
    damage(source)
    with pytest.raises(ValueError, match=words) as error:
        import_released(source, tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_what_the_release_leaves_unread_is_left_unread(released_source, tmp_path):
    """It reads base_config, from which it writes the file's top level, and no post_config."""
    source = released_source(tmp_path / "source")
    settings("config.json", hidden_size=48, post_config={"hidden_size": 7}, pre_config__tie_word_embeddings=True)(
        source
    )
    import_released(source, tmp_path / "ours")
    assert HaploConfig.from_pretrained(tmp_path / "ours").text_config.hidden_size == 96


def test_an_edit_of_the_top_level_counts_where_base_config_says_nothing(released_source, tmp_path):
    source = released_source(tmp_path / "source")
    settings("config.json", image_aspect_ratio="anyres_max_9")(source)
    import_released(source, tmp_path / "ours")
    assert HaploProcessor.from_pretrained(tmp_path / "ours").image_processor.max_tiles == 9


def test_neither_command_writes_over_what_it_reads(released_source, golden, tmp_path):
    source = released_source(tmp_path / "source")
    ours = tmp_path / "ours"
    import_released(source, ours)
    for command, folder in ((import_released, source), (export_released, ours)):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match="another folder to write"):
            command(folder, folder.parent / "." / folder.name)
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_in_the_place_of_the_folder_to_write_is_kept(released_source, tmp_path):
    source = released_source(tmp_path / "source")
    import_released(source, tmp_path / "ours")
    (tmp_path / "file").write_text("mine")
    for command, folder in ((import_released, source), (export_released, tmp_path / "ours")):
        with pytest.raises(FileExistsError):
            command(folder, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_command_says_what_is_wrong_in_one_sentence(golden, tmp_path):
    shutil.copytree(golden / "model", tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    command = [sys.executable, "-m", "haplovl", "import-released", tmp_path / "source", tmp_path / "ours"]
    done = subprocess.run(command, capture_output=True, text=True)
    wrong = f"{tmp_path}/source/model.safetensors is missing (weights are read from safetensors only)"
    assert (done.returncode, done.stderr) == (1, f"error: {wrong}\n")
    assert not (tmp_path / "ours").exists()


# --- export ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def exportable(vision, language, processor):
    """A configuration that the released layout can hold."""
    settings = ModelSettings(image_size=32, class_token=False, pre_rotary_increment=1.0, released_layout=True)
    config = build_config(vision.config, language.config, settings, processor.image_token_id, processor.video_token_id)
    assert unsupported(config) == []
    return config


UNSUPPORTED = [
    ("pre_config.class_token", True, "a class token"),
    ("pre_config.image_newline", False, "images without newline tokens"),
    ("pre_config.pre_layernorm", False, "a pre-decoder without a norm before it"),
    ("pre_config.pre_layernorm_eps", 1e-6, "an epsilon other than 1e-05 in the norm before the pre-decoder"),
    ("pre_config.norm_eps", 1e-6, "an epsilon other than 1e-05 in the norm before the pre-decoder"),
    ("pre_config.final_norm", True, "a norm after the pre-decoder"),
    ("pre_config.rotary_increment", 0.25, "a pre-decoder rotary increment of 0.25; it is always 1"),
    ("pre_config.num_channels", 1, "pictures of 1 channels"),
    ("pre_config.patch_grid", 2, "a position table of 2x2 patches .* for tiles of 32 pixels"),
    ("connector_bias", True, "a bias in the connector"),
    ("post_rotary_increment", 0.5, "a post_rotary_increment of 0.5; it is always 1"),
    ("post_mask", "causal", "a language model with the mask 'causal'"),
    ("frame_newlines", True, "video frames with newline tokens"),
    ("image_token_id", 5000, "an image token .5000. beyond the vocabulary"),
    ("text_config", MistralConfig(), "a sliding window of 4096"),
    ("text_config", Qwen2Config(use_sliding_window=True, sliding_window=32), "a sliding window of 32"),
    ("text_config", Qwen3Config(), "a language model of type 'qwen3' .it holds llama, mistral, qwen2."),
    ("text_config", GemmaConfig(), "a language model of type 'gemma'"),
    ("text_config", HaploDecoderConfig(final_norm=False, vocab_size=400), "a language model without a norm after it"),
]


@pytest.mark.parametrize(("name", "value", "words"), UNSUPPORTED, ids=[f"{u[0]}-{u[2][:20]}" for u in UNSUPPORTED])
def test_what_the_layout_cannot_hold_is_refused_by_name(name, value, words, exportable, tmp_path):
    *parts, name = name.split(".")
    setattr(exportable.pre_config if parts else exportable, name, value)
    exportable.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=f"^the released layout cannot hold [^;]*{words}[^;]*$"):
        export_released(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "text",
    [
        LlamaConfig(),
        MistralConfig(sliding_window=None),
        Qwen2Config(),
        Qwen2Config(use_sliding_window=False, sliding_window=32),
        HaploDecoderConfig(gated_mlp=True, vocab_size=400),
    ],
    ids=lambda text: text.model_type,
)
def test_language_models_that_the_layout_holds_are_not_refused(text, exportable):
    exportable.text_config = text
    assert unsupported(exportable) == []


def test_all_that_a_default_model_has_too_much_is_named_at_once(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="class token.*; .*norm after.*; .*bias.*; .*increment of 0.*; .*'haplovl'"):
        export_released(tiny_model_dir, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("images", "changes", "words"),
    [
        ({"tiling": "haplovl"}, {}, "the tiling 'haplovl' .it holds 'released'."),
        ({}, {"class_token": True}, "a processor that counts class tokens"),
        ({}, {"image_newline": False}, "a processor that counts no newline tokens"),
        ({}, {"frame_newlines": True}, "a processor that counts newline tokens in video frames"),
        ({"patch_size": 16}, {}, "tiles of 32 and patches of 16 pixels in the processor, but 32 and 8 in the model"),
    ],
)
def test_a_processor_that_the_layout_cannot_hold_is_refused_by_name(
    images, changes, words, exportable, tokenizer, tmp_path
):
    options = {"patch_size": 8, "tiling": "released", "image_grid_pinpoints": [[32, 32]], **images}
    flags = {"class_token": False, "frame_newlines": False, **changes}
    processor = HaploProcessor(HaploImageProcessor(32, **options), tokenizer, **flags)
    exportable.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=f"^the released layout cannot hold [^;]*{words}[^;]*$"):
        export_released(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_tokenizer_without_videos_is_refused_by_name(exportable, processor):
    images = HaploImageProcessor(32, 8, tiling="released", image_grid_pinpoints=[[32, 32]])
    plain = HaploProcessor(images, processor.tokenizer, class_token=False, frame_newlines=False)
    plain.video_token_id = None
    assert unsupported_processor(plain, exportable) == ["a tokenizer without '<video>'"]


def test_folders_that_are_no_model_of_ours_are_refused_unread(released_source, exportable, tmp_path):
    """Another model's config.json would describe a default model of ours, of 7 billion parameters."""
    released = released_source(tmp_path / "released")
    exportable.save_pretrained(tmp_path / "no_weights")
    cases = [
        (tmp_path / "nowhere", r"nowhere/config\.json is missing"),
        (released, r"model_type is 'haplo', expected 'haplovl' \(a model of ours\)"),
        (tmp_path / "no_weights", r"no_weights cannot be loaded.*model\.safetensors"),
    ]
    for source, words in cases:
        with pytest.raises(ValueError, match=words):
            export_released(source, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_damaged_model_of_ours_is_refused(released_source, tmp_path):
    ours = tmp_path / "ours"
    import_released(released_source(tmp_path / "source"), ours)
    whole = (ours / "model.safetensors").read_bytes()
    weights = load_file(ours / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "less.safetensors", metadata={"format": "pt"})
    for content, words in (
        (whole[:-100], "are damaged"),
        ((tmp_path / "less.safetensors").read_bytes(), "lm_head"),
    ):
        (ours / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            export_released(ours, tmp_path / "back")
    assert not (tmp_path / "back").exists()
