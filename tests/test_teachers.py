"""Teachers from folders: .bin files become safetensors once, without running what they hold, and whole or never."""

import copy
import json
import os
import pickle

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

from haplovl.data.loader import PackedLoader, PreparedRecords
from haplovl.data.prepare import prepare
from haplovl.data.validated import ImageFile, ValidatedRecord, write_validated
from haplovl.errors import UserError
from haplovl.files import RAW, TEACHERS, VALIDATED, read_json, sha256_of
from haplovl.model import HaploProcessor
from haplovl.model.image_processing import CLIP_MEAN, CLIP_STD
from haplovl.model.inherit import inherit
from haplovl.model.media import image_sizes
from haplovl.records import Record, Turn
from haplovl.settings import BatchSettings, FolderTeacher, ModelSettings, StageMixture, load_params
from haplovl.teachers import load_language, load_vision, make_teachers, recipe_processor
from haplovl.train.image_path import attention_to_images, patch_gradient
from haplovl.train.objectives import NextToken

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


class Malicious:
    """A pickle that runs a command when opened without care."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def folders(tmp_path, monkeypatch, vision, language, tokenizer):
    """A project with the folders of a vision and a language teacher that hold .bin files alone."""
    monkeypatch.chdir(tmp_path)
    for name, model in (("clip", vision), ("llama", language)):
        (tmp_path / name).mkdir()
        model.config.save_pretrained(tmp_path / name)
        torch.save(model.state_dict(), tmp_path / name / "pytorch_model.bin")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path


@pytest.fixture
def params(folders, request):
    """The default recipe with these two folders as its teachers."""
    params = load_params(request.config.rootpath / "params.yaml")
    teachers = params.teachers.model_copy(
        update={
            "vision": FolderTeacher(kind="folder", path=str(folders / "clip")),
            "language": FolderTeacher(kind="folder", path=str(folders / "llama")),
        }
    )
    return params.model_copy(update={"teachers": teachers})


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_bin_files_become_safetensors_once(params, vision, language, tokenizer):
    make_teachers(params)
    assert not list(TEACHERS.rglob("*.bin"))
    assert (TEACHERS / "vision" / "model.safetensors").is_file()
    assert (TEACHERS / "language" / "model.safetensors").is_file()
    taken, spoken = load_vision(TEACHERS / "vision"), load_language(TEACHERS / "language")
    assert same_weights(taken.state_dict(), vision.state_dict())
    assert same_weights(spoken.state_dict(), language.state_dict())
    lineage = read_json(TEACHERS / "teachers.json")
    assert [lineage[name]["kind"] for name in ("vision", "language")] == ["folder", "folder"]
    processor = HaploProcessor.from_pretrained(TEACHERS / "processor")
    ids = processor.image_token_id, len(processor.tokenizer), processor.video_token_id
    model = inherit(taken, spoken, params.model, *ids).eval()
    batch = processor(text="<image>a", images=torch.zeros(3, 9, 9, dtype=torch.uint8), return_tensors="pt")
    assert torch.isfinite(model(**batch).logits).all()


@pytest.fixture
def clip(folders):
    """A whole CLIP in the vision teacher's folder."""
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 50}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 32, "patch_size": 8}))
    clip.config.save_pretrained(folders / "clip")
    torch.save(clip.state_dict(), folders / "clip" / "pytorch_model.bin")
    return clip


def test_a_whole_clip_gives_its_vision_tower_and_keeps_its_text_tower(params, folders, clip, tokenizer):
    tokenizer.save_pretrained(folders / "clip")
    make_teachers(params)
    taken = load_vision(TEACHERS / "vision")
    assert same_weights(taken.state_dict(), clip.vision_model.state_dict())
    assert same_weights(CLIPModel.from_pretrained(TEACHERS / "vision").state_dict(), clip.state_dict())
    assert AutoTokenizer.from_pretrained(TEACHERS / "vision").get_vocab() == tokenizer.get_vocab()


def test_a_clip_file_of_the_vision_tower_alone_is_enough(params, folders, clip):
    weights = {name: tensor for name, tensor in clip.state_dict().items() if name.startswith("vision_model.")}
    torch.save(weights, folders / "clip" / "pytorch_model.bin")
    make_teachers(params)
    assert same_weights(load_vision(TEACHERS / "vision").state_dict(), clip.vision_model.state_dict())
    assert read_json(TEACHERS / "vision/config.json")["model_type"] == "clip_vision_model"
    assert not (TEACHERS / "vision/tokenizer_config.json").exists()  # there was none


@pytest.mark.parametrize(
    ("file", "told", "mean", "std"),
    [
        ("preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.25, 0.5, 1]}, [0.5] * 3, [0.25, 0.5, 1]),
        (
            "processor_config.json",
            {"image_processor": {"image_mean": [0.1] * 3, "image_std": [1] * 3}},
            [0.1] * 3,
            [1] * 3,
        ),
        ("preprocessor_config.json", {"do_normalize": False, "image_mean": [9] * 3}, [0] * 3, [1] * 3),
        ("preprocessor_config.json", {"size": 32}, CLIP_MEAN, CLIP_STD),
    ],
)
def test_pixels_are_normalised_as_the_vision_teacher_knows_them(file, told, mean, std, params, folders):
    (folders / "clip" / file).write_text(json.dumps(told))
    make_teachers(params)
    for processor in (HaploProcessor.from_pretrained(TEACHERS / "processor"), recipe_processor(params)):
        assert processor.image_processor.image_mean == pytest.approx(list(mean))
        assert processor.image_processor.image_std == pytest.approx(list(std))


@pytest.mark.parametrize(
    "told", [{"image_mean": [0.5] * 3}, {"image_mean": 0.5, "image_std": 0.5}, {"image_std": [0] * 3}]
)
def test_a_normalisation_that_cannot_be_used_is_one_sentence(told, params, folders):
    (folders / "clip/preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3} | told))
    with pytest.raises(UserError, match=r"teachers.vision: 'image_(mean|std)' in preprocessor_config.json of .* is "):
        make_teachers(params)


def test_several_bin_files_and_a_tied_head_are_read_whole(params, folders, language):
    sizes = {**SIZES, "vocab_size": language.config.vocab_size, "tie_word_embeddings": True}
    tied = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None)).to(torch.bfloat16)
    tied.config.save_pretrained(folders / "llama")
    weights = {name: tensor for name, tensor in tied.state_dict().items() if name != "lm_head.weight"}
    parts = {"pytorch_model-00001-of-00002.bin": "layers.0.", "pytorch_model-00002-of-00002.bin": ""}
    placed = {name: next(file for file, words in parts.items() if words in name) for name in weights}
    for file in parts:
        torch.save({name: weights[name] for name in weights if placed[name] == file}, folders / "llama" / file)
    (folders / "llama" / "pytorch_model.bin").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folders / "llama" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    make_teachers(params)
    saved = load_file(TEACHERS / "language" / "model.safetensors")
    assert same_weights(saved, weights)  # in the precision that they were saved in


@pytest.mark.parametrize("role", ["clip", "llama"])
@pytest.mark.parametrize("way", ["beside the tensors", "alone", "in an old file"])
def test_a_malicious_file_is_refused_and_never_run(params, folders, role, way):
    trace, path = folders / "it ran", folders / role / "pytorch_model.bin"
    if way == "beside the tensors":
        torch.save({"extra": Malicious(trace), **torch.load(path)}, path)
    elif way == "alone":
        path.write_bytes(pickle.dumps(Malicious(trace)))
    else:
        torch.save({"extra": Malicious(trace)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="holds more than tensors, and could run code when opened"):
        make_teachers(params)
    assert not trace.exists() and not TEACHERS.exists()
    if way != "in an old file":  # the trap is a real one
        torch.load(path, weights_only=False) if way == "beside the tensors" else pickle.loads(path.read_bytes())
        assert trace.exists()


@pytest.mark.parametrize("role", ["clip", "llama"])
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_teacher_without_all_its_weights_is_refused(params, folders, role, kind):
    path = folders / role / "pytorch_model.bin"
    weights = {name: tensor for name, tensor in torch.load(path).items() if "layers.1." not in name}
    path.unlink()
    if kind == "bin":
        torch.save(weights, path)
    else:
        save_file(weights, folders / role / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"teacher '.*{role}' is incomplete: \d+ missing weights \(.*layers.1"):
        make_teachers(params)
    assert not TEACHERS.exists()


def test_weights_that_do_not_fit_or_cannot_be_read_are_one_sentence(params, folders):
    path = folders / "clip" / "pytorch_model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    with pytest.raises(UserError, match="clip' cannot be loaded"):
        make_teachers(params)
    path.unlink()
    with pytest.raises(UserError, match="no file named model.safetensors, or pytorch_model.bin"):
        make_teachers(params)
    path.write_bytes(whole)
    CLIPVisionConfig(**{**SIZES, "intermediate_size": 48}, image_size=32, patch_size=8).save_pretrained(
        folders / "clip"
    )
    with pytest.raises(UserError, match="its weights have other shapes than its config.json says"):
        make_teachers(params)
    (folders / "clip" / "config.json").unlink()
    with pytest.raises(UserError, match=r"teachers.vision: '.*clip' is not a model folder \(it has no config.json\)"):
        make_teachers(params)
    LlamaConfig().save_pretrained(folders / "clip")
    with pytest.raises(UserError, match="teachers.vision: the vision teacher is a 'llama'"):
        make_teachers(params)


# --- the processor of a recipe --------------------------------------------------------------------------------------
MODELS = {
    "early": {"image_size": 32},
    "tower": {"fusion": "tower", "image_size": 32},
    "patches": {"fusion": "patches", "image_size": 48, "patch_size": 8},
}


def of_model(params, **model):
    return params.model_copy(update={"model": ModelSettings(**model)})


def test_the_default_recipe_has_the_processor_that_the_teachers_came_with(params, tmp_path):
    make_teachers(params)
    recipe_processor(params).save_pretrained(tmp_path / "again")
    for file in sorted((TEACHERS / "processor").iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_without_teachers_there_is_no_processor(params):
    with pytest.raises(UserError, match="haplovl teachers"):
        recipe_processor(params)


@pytest.mark.parametrize("name", MODELS)
def test_recipes_with_other_models_train_on_the_same_shards(params, vision, language, name):
    """Pictures of three shapes, prepared once with the default recipe's processor."""
    make_teachers(params)
    (RAW / "a/media").mkdir(parents=True)
    VALIDATED.mkdir(parents=True)
    rows = []
    for n in range(24):
        height, width = ((32, 32), (20, 48), (48, 9))[n % 3]
        path = RAW / "a/media" / f"{n}.png"
        Image.new("RGB", (width, height), (n * 9, 10, 90)).save(path)
        record = Record(f"r{n}", (path.name,), (Turn("<image>Where is the 3?", "top left"),), split="train")
        rows.append(ValidatedRecord(record, (ImageFile(f"file:{path.name}", sha256_of(path), width, height),), "a"))
    write_validated(VALIDATED, rows)
    prepare(params)
    recipe = of_model(params, **MODELS[name])
    processor = recipe_processor(recipe)
    loader = PackedLoader(
        PreparedRecords("train", processor),
        BatchSettings(rows=2, row_tokens=128),
        StageMixture(),
        1,
        micro_batch_rows=2,
    )
    batch = loader.step(0)[0]
    assert len(set(batch.image_grids)) == (3 if name == "patches" else 1)
    ids = processor.image_token_id, len(processor.tokenizer), processor.video_token_id
    torch.manual_seed(0)
    model = inherit(vision, copy.deepcopy(language), recipe.model, *ids)
    assert sum(image_sizes(model.config, batch.image_grids)) == int((batch.input_ids == ids[0]).sum())
    objective = NextToken(model)
    loss = objective(batch)["loss"] / objective.counts(batch)["loss"]
    assert 4 < loss.item() < 8  # random words: the logarithm of about 300
    loss.backward()
    assert patch_gradient(objective) > 0
    figures = attention_to_images(model, batch)
    assert 0 < figures["attention_even"] < 1 and 0 < figures["attention_post"] < 1
    assert ("attention_pre" in figures) == (name == "early")
