"""Stage 1 measured on its own: a copy of the teacher is found to be one, a stranger is not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from noise import noise
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

from haplovl.data.loader import Batch, PreparedRecords
from haplovl.data.prepare import prepare
from haplovl.data.scenes import SceneMaker
from haplovl.data.validated import ImageFile, ValidatedRecord, write_validated
from haplovl.errors import UserError
from haplovl.evaluate.probe.classes import imagenet, scenes
from haplovl.evaluate.probe.linear_map import fit_linear_map
from haplovl.evaluate.probe.runner import measure, probe, rounded
from haplovl.evaluate.probe.similarity import cka_matrix
from haplovl.evaluate.probe.subject import load_subject
from haplovl.evaluate.probe.zero_shot import look
from haplovl.files import HEADS, RAW, STAGE1, TEACHERS, VALIDATED, sha256_of
from haplovl.model import HaploForConditionalGeneration
from haplovl.model.inherit import inherit
from haplovl.records import IMAGE_PLACEHOLDER, Record, Turn
from haplovl.settings import ModelSettings, Params, load_params
from haplovl.train.objectives import Distillation

PARAMS_FILE = Path(__file__).parents[2] / "params.yaml"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LIKE_THE_TEACHER = {"image_newline": False, "pre_rotary_increment": 0.0}
"""What the teacher has none of, left out: the pre-decoder then computes what the teacher does."""


@pytest.fixture(scope="module")
def clip(tokenizer):
    """A random CLIP with both towers, whose text tower knows the tokenizer's words."""
    torch.manual_seed(5)
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 48}
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0, "pad_token_id": tokenizer.pad_token_id}
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    # Wider than usual: in 32 dimensions the usual 0.02 leaves all pictures the same.
    model = CLIPModel(CLIPConfig(text_config={**text, **ids}, vision_config=vision, projection_dim=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model.vision_model.embeddings.position_embedding.weight.normal_()
    return model


@pytest.fixture
def params() -> Params:
    params = load_params(PARAMS_FILE)
    settings = params.probe.model_copy(update={"records": 10, "zero_shot_pictures": 60, "fit_pictures": 9, "batch": 7})
    prepared = params.prepare.model_copy(update={"max_tokens": 1024})
    stage1 = params.stage1.model_copy(update={"vision_layer": -1})  # that of save_stage1
    return params.model_copy(update={"probe": settings, "prepare": prepared, "stage1": stage1})


@pytest.fixture
def project(tmp_path, monkeypatch, clip, tokenizer, processor, params):
    """A project with teachers and prepared test records of the embedded data, and no stage 1 yet."""
    monkeypatch.chdir(tmp_path)
    clip.save_pretrained(TEACHERS / "vision")
    tokenizer.save_pretrained(TEACHERS / "vision")
    processor.save_pretrained(TEACHERS / "processor")
    write_records()
    prepare(params)
    return tmp_path


def write_records() -> None:
    """Scenes with questions, two of them text alone, for training and test."""
    media = RAW / "scenes/media"
    media.mkdir(parents=True)
    VALIDATED.mkdir(parents=True)
    rows = []
    for split in ("train", "test"):
        maker = SceneMaker(split, seed=1, image_size=32)
        for number in range(12):
            turns, images = (maker.text_turn(),), ()
            if number > 1:
                scene, path = maker.scene(), f"{split}-{number}.png"
                maker.draw(scene).save(media / path)
                first, *rest = maker.picture_turns(scene, 3)
                turns = (Turn(f"{IMAGE_PLACEHOLDER}\n{first.question}", first.answer, first.kind), *rest)
                images = (ImageFile(f"file:{path}", sha256_of(media / path), 32, 32),)
            record = Record(f"{split}-{number}", tuple(image.path for image in images), turns, split)
            rows.append(ValidatedRecord(record, images, "scenes"))
    write_validated(VALIDATED, rows)


def save_stage1(clip, language, processor, **settings):
    """A stage 1 that has not learnt anything yet; returns its model and its objective with the two heads."""
    own = ModelSettings(image_size=32, **settings)
    torch.manual_seed(3)
    ids = processor.image_token_id, len(processor.tokenizer), processor.video_token_id
    model = inherit(clip.vision_model, language, own, *ids).eval()
    objective = Distillation(model, clip.vision_model, vision_layer=-1, temperature=1.0)
    save(model, processor, own, {"vision_head": objective.vision_head, "text_head": objective.text_head})
    return model, objective


def save(model, processor, settings, heads):
    own = type(processor)(
        processor.image_processor, processor.tokenizer, processor.chat_template, settings.class_token,
        settings.image_newline,
    )  # fmt: skip
    shutil.rmtree(STAGE1, ignore_errors=True)
    model.save_pretrained(STAGE1)
    own.save_pretrained(STAGE1)
    tensors = {f"{head}.{name}": value for head, part in heads.items() for name, value in part.state_dict().items()}
    save_file(tensors, STAGE1 / HEADS)


def measured(params):
    """The metrics without the page, whose charts take seconds."""
    return rounded(measure(params, Path("."))[0])


# --- it finds what is there ----------------------------------------------------------------------------------------
def test_an_inherited_pre_decoder_is_its_teacher_in_every_layer_and_resolution(
    project, params, clip, language, processor
):
    save_stage1(clip, language, processor, **LIKE_THE_TEACHER)
    metrics = measured(params)
    assert list(metrics["vision"]["alone"]) == ["32", "16", "48"]
    for own in metrics["vision"]["alone"].values():
        for number, layer in own["layers"].items():
            assert layer["cosine"] == pytest.approx(1, abs=1e-3) and layer["cka"] == pytest.approx(1, abs=1e-3)
            assert layer["most_like"] == int(number)
    assert len(own["layers"]) == 3
    for question in ("digit", "colour", "place"):
        shown = metrics["zero_shot"]["scenes"][question]
        assert shown["direct"] == shown["teacher"] and shown["agreement"]["direct"] == 1
    assert_the_teachers_features("direct", target=2)


@torch.inference_mode()
def assert_the_teachers_features(way, target):
    """The pictures' features by this way are the teacher's, and those of different pictures differ."""
    pictures = [noise(32, 32, seed) for seed in range(3)]
    found = look(load_subject(Path(".")), pictures, target).features
    torch.testing.assert_close(found[way], found["teacher"], atol=1e-4, rtol=0)
    assert (found["teacher"][0] - found["teacher"][1]).norm() > 1e-2


def test_a_stranger_is_not(project, params, clip, language, processor):
    _, objective = save_stage1(clip, language, processor, **LIKE_THE_TEACHER, pre_decoder="random")
    metrics = measured(params)
    for own in metrics["vision"]["alone"].values():
        assert abs(own["cosine"]) < 0.4  # random vectors of 32 numbers: a deviation of 0.18
        assert all(abs(layer["cosine"]) < 0.4 for layer in own["layers"].values())
    assert metrics["current_token"]["all"]["top1"] < 0.1
    assert metrics["zero_shot"]["scenes"]["digit"]["vision_head"] < 0.4


def test_a_head_that_gives_a_lower_layer_is_finished_by_the_teacher(project, params, clip, language, processor):
    """A pre-decoder of one layer, and vision_layer -2: the head's output has to go through the teacher's last layer."""
    settings = ModelSettings(image_size=32, pre_decoder_layers=1, **LIKE_THE_TEACHER)
    ids = processor.image_token_id, len(processor.tokenizer), processor.video_token_id
    model = inherit(clip.vision_model, language, settings, *ids).eval()
    model.model.pre_decoder.final_layernorm = nn.Identity()
    model.config.pre_config.final_norm = False
    head = nn.Linear(32, 32)
    head.load_state_dict({"weight": 3 * torch.eye(32), "bias": torch.zeros(32)})  # the loss leaves lengths open
    save(model, processor, settings, {"vision_head": head})
    stage1 = params.stage1.model_copy(update={"vision_layer": -2})
    metrics = measured(params.model_copy(update={"stage1": stage1}))
    assert metrics["vision"]["layer"] == 1
    assert metrics["vision"]["alone"]["32"]["cosine"] == pytest.approx(1, abs=1e-3)
    for question in ("digit", "colour", "place"):
        assert metrics["zero_shot"]["scenes"][question]["agreement"]["vision_head"] == 1
    assert_the_teachers_features("vision_head", target=1)
    for question in ("digit", "colour", "place"):  # a lower layer's output is no last hidden state of the teacher
        shown = metrics["zero_shot"]["scenes"][question]
        assert "direct" not in shown and "direct" not in shown["agreement"]
    assert metrics["current_token"] == {"undefined": "neither of the text losses had a weight in stage 1"}


# --- it says what training says ------------------------------------------------------------------------------------
@torch.inference_mode()
def test_held_out_figures_are_those_of_the_objective(project, params, clip, language, processor):
    model, objective = save_stage1(clip, language, processor)
    metrics = measured(params.model_copy(update={"probe": params.probe.model_copy(update={"records": 12})}))
    records = PreparedRecords("test", processor)
    loss = patches = right = tokens = after = 0
    words = model.get_input_embeddings().weight
    for number in range(len(records)):
        sample = records[number]
        ids = torch.tensor([sample.input_ids])
        batch = Batch(ids, ids, torch.zeros_like(ids), sample.pixel_values, sample.image_grids, [sample.id])
        loss += objective(batch)["loss_vision"].item()
        patches += objective.counts(batch)["loss_vision"]
        hidden = model.model.pre_decode(ids, sample.pixel_values, batch.document_ids, sample.image_grids)
        is_text = ids != processor.image_token_id
        said = (objective.text_head(hidden[is_text]) @ words.T).argmax(dim=-1)
        right += int((said == ids[is_text]).sum())
        tokens += int(is_text.sum())
        after += int((is_text & ((~is_text).cumsum(1) > 0)).sum())
    seen, text = metrics["vision"]["in_records"], metrics["current_token"]
    assert seen["patches"] == patches == 160 and seen["cosine"] == pytest.approx(1 - loss / patches, abs=1e-4)
    assert (text["all"]["tokens"], text["after_image"]["tokens"]) == (tokens, after)
    assert text["all"]["top1"] == pytest.approx(right / tokens, abs=1e-4)
    assert metrics["records"] == 12 and metrics["split"] == "test"


def test_current_tokens_are_read_by_a_head_that_reads_them(project, params, clip, language, processor):
    """The pre-decoder passes words on, and the text head undoes their projection: every token is the first."""
    model, objective = save_stage1(clip, language, processor)
    core = model.model
    with torch.no_grad():
        for layer in core.pre_decoder.layers:
            layer.self_attn.out_proj.weight.zero_()
            layer.fc2.weight.zero_()
        core.text_projection.weight.copy_(torch.eye(32, 48))
        core.text_projection.bias.zero_()
        core.get_input_embeddings().weight.normal_()
        core.get_input_embeddings().weight[:, 32:] = 0
        core.get_input_embeddings().weight.div_(core.get_input_embeddings().weight.norm(dim=1, keepdim=True))
        objective.text_head.weight.copy_(torch.eye(48, 32))
        objective.text_head.bias.zero_()
    save(model, processor, ModelSettings(image_size=32), {"text_head": objective.text_head})
    metrics = measured(params)
    assert metrics["current_token"]["all"]["top1"] > 0.99 and metrics["current_token"]["after_image"]["top1"] > 0.99
    assert metrics["vision"]["in_records"] == {"undefined": "the vision loss had no weight in stage 1"}
    assert "cosine" not in metrics["vision"]["alone"]["32"]
    assert "vision_head" not in metrics["zero_shot"]["scenes"]["digit"]


def test_a_head_that_says_nothing_is_never_right(project, params, clip, language, processor):
    model, objective = save_stage1(clip, language, processor)
    silent = nn.Linear(32, 48)
    silent.load_state_dict({name: torch.zeros_like(value) for name, value in silent.state_dict().items()})
    save(model, processor, ModelSettings(image_size=32), {"text_head": silent})
    assert measured(params)["current_token"]["all"]["top5"] == 0


def test_cka_knows_rotations_and_strangers():
    torch.manual_seed(0)
    x, other = torch.randn(200, 24), torch.randn(200, 40)
    turned = 5 * x @ torch.linalg.qr(torch.randn(24, 24)).Q + 3
    (row,) = cka_matrix([x], [x, turned, other])
    assert row[:2] == pytest.approx([1, 1], abs=1e-5)
    assert abs(row[2]) < 0.05  # the biased estimator gives 0.15 here
    with pytest.raises(ValueError, match="at least 4 examples, found 3"):
        cka_matrix([x[:3]], [other[:3]])


def test_a_linear_map_finds_what_is_there_and_nothing_else():
    torch.manual_seed(0)
    x, turn = 0.01 * torch.randn(300, 24) + 7, torch.randn(24, 10)  # small differences far from the origin
    apply = fit_linear_map(x[:200], x[:200] @ turn + 2)
    torch.testing.assert_close(apply(x[200:]), x[200:] @ turn + 2, atol=1e-3, rtol=0)
    noise = torch.randn(300, 10)
    guess = fit_linear_map(x[:200], noise[:200])(x[200:])
    assert (guess - noise[200:]).square().mean() < 1.2 * noise[200:].var()  # no worse than the mean
    with pytest.raises(ValueError, match="at least 5 examples, found 4"):
        fit_linear_map(x[:4], noise[:4])


# --- its files -----------------------------------------------------------------------------------------------------
def test_the_same_bytes_twice_and_a_page_that_needs_nothing_else(
    project, params, clip, language, processor, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")  # room for whole names
    save_stage1(clip, language, processor)
    params = params.model_copy(update={"recipe": "<b>mine</b>"})

    def outputs():
        probe(params)
        files = [*Path("reports/stage1").rglob("*"), Path("metrics/stage1.json")]
        return {str(path): path.read_bytes() for path in files}

    first = outputs()
    assert set(first) == {"reports/stage1/index.html", "metrics/stage1.json"}
    assert outputs() == first
    page = first["reports/stage1/index.html"].decode()
    assert page.count("data:image/svg+xml;base64,") == 3
    assert "http" not in page.replace("http://www.w3.org", "") and "&lt;b&gt;mine&lt;/b&gt;" in page
    assert str(project).encode() not in b"".join(first.values())
    shown = capsys.readouterr().out
    assert "zero-shot, scenes: colour" in shown and "current token, after_image" in shown


def test_the_model_loads_beside_its_heads(project, clip, language, processor):
    model, _ = save_stage1(clip, language, processor)
    loaded = HaploForConditionalGeneration.from_pretrained(STAGE1)
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert set(load_file(STAGE1 / HEADS)) == {
        "vision_head.weight", "vision_head.bias", "text_head.weight", "text_head.bias",
    }  # fmt: skip


# --- what cannot be measured ---------------------------------------------------------------------------------------
def test_no_class_token_leaves_only_zero_shot_undefined(project, params, clip, language, processor):
    save_stage1(clip, language, processor, class_token=False)
    probe(params)
    metrics = json.loads(Path("metrics/stage1.json").read_text())
    assert metrics["zero_shot"] == {"undefined": "the recipe has no class token (model.class_token)"}
    assert "cosine" in metrics["vision"]["in_records"] and "top1" in metrics["current_token"]["all"]
    assert "the recipe has no class token" in Path("reports/stage1/index.html").read_text()


def test_a_teacher_without_text_tower_or_tokenizer_is_said_to_be_one(project, params, clip, language, processor):
    save_stage1(clip, language, processor)
    (TEACHERS / "vision/tokenizer_config.json").unlink()
    assert measured(params)["zero_shot"] == {"undefined": "the vision teacher came without its tokenizer"}
    shutil.rmtree(TEACHERS / "vision")
    clip.vision_model.save_pretrained(TEACHERS / "vision")
    metrics = measured(params)
    assert metrics["zero_shot"] == {"undefined": "the vision teacher came without a text tower"}
    assert "cosine" in metrics["vision"]["alone"]["32"]["layers"]["2"]


def test_another_objective_is_undefined_throughout_and_needs_no_model(tmp_path, monkeypatch, params):
    monkeypatch.chdir(tmp_path)
    stage1 = params.stage1.model_copy(update={"objective": "next_token"})
    probe(params.model_copy(update={"stage1": stage1}))
    metrics = json.loads(Path("metrics/stage1.json").read_text())
    reason = {"undefined": "stage 1 of this recipe is not a distillation"}
    assert metrics == {"vision": reason, "current_token": reason, "zero_shot": reason}
    assert Path("reports/stage1/index.html").read_text().count("is not a distillation") == 3


def test_missing_inputs_are_named(project, params, clip, language, processor):
    with pytest.raises(UserError, match=r"models/stage1 is missing; run 'haplovl train stage1'"):
        probe(params)
    save_stage1(clip, language, processor)
    wrong = params.stage1.model_copy(update={"vision_layer": 7})
    with pytest.raises(UserError, match="vision_layer is 7, but the vision teacher has 3 hidden states"):
        probe(params.model_copy(update={"stage1": wrong}))
    save_file(load_file(STAGE1 / HEADS), STAGE1 / HEADS, {"vision_layer": "1"})
    with pytest.raises(UserError, match="vision_layer is -1 now, but models/stage1 was trained with 1"):
        probe(params)
    (STAGE1 / HEADS).unlink()
    with pytest.raises(UserError, match=r"heads.safetensors is missing; run 'haplovl train stage1'"):
        probe(params)
    assert not Path("metrics/stage1.json").exists() and not Path("reports").exists()


# --- classes -------------------------------------------------------------------------------------------------------
def test_scenes_show_every_class_equally_often(params):
    shown = scenes(params.model_copy(update={"probe": params.probe.model_copy(update={"zero_shot_pictures": 240})}))
    for name, classes in (("digit", 10), ("colour", 6), ("place", 4)):
        question = shown.questions[name]
        assert [question.right.count(number) for number in range(classes)] == [240 // classes] * classes
        assert len(question.prompts) == classes and {len(set(p)) for p in question.prompts} == {720 // classes}
    assert all("red" in prompt for prompt in shown.questions["colour"].prompts[3])
    assert len({picture().tobytes() for picture in shown.pictures}) == 240


@pytest.fixture
def class_folders(tmp_path):
    """Three classes of five pictures of one colour each, in ImageNet's layout."""
    root = tmp_path / "imagenet"
    for number, name in enumerate(("n01", "n02", "n03")):
        (root / "val" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (40 + i, 32), (80 * number, 20 * i, 90)).save(root / "val" / name / f"{i}.JPEG")
    (root / "classes.txt").write_text("n01 tench, Tinca tinca\nn02 goldfish\nn03 great white shark, white shark\n")
    return root


def test_imagenet_folders_are_classified_as_the_teacher_itself_would(
    project, params, clip, tokenizer, language, processor, class_folders
):
    save_stage1(clip, language, processor, **LIKE_THE_TEACHER)
    settings = params.probe.model_copy(update={"imagenet": str(class_folders), "zero_shot_pictures": 12})
    found = measured(params.model_copy(update={"probe": settings}))["zero_shot"]
    assert set(found) == {"scenes", "imagenet"}
    names = ["tench", "goldfish", "great white shark"]
    ids = [tokenizer(f"a photo of a {name}.")["input_ids"] + [tokenizer.eos_token_id] for name in names]
    right = 0
    for number in range(12):  # in turns: the first picture of every class, then the second
        path = class_folders / "val" / f"n0{number % 3 + 1}" / f"{number // 3}.JPEG"
        pixels = processor.image_processor(Image.open(path), return_tensors="pt")["pixel_values"][:, 0]
        scores = [clip(input_ids=torch.tensor([row]), pixel_values=pixels).logits_per_image.item() for row in ids]
        right += scores.index(max(scores)) == number % 3
    own = found["imagenet"]["class"]
    assert (
        found["imagenet"]["pictures"] == 12 and own["classes"] == 3 and own["chance"] == pytest.approx(1 / 3, abs=1e-4)
    )
    assert own["teacher"] == pytest.approx(right / 12, abs=1e-4) == own["direct"]


def test_classes_of_one_first_name_get_prompts_of_their_own(class_folders):
    def prompts(*lines):
        (class_folders / "classes.txt").write_text("\n".join(lines))
        return [own[0] for own in imagenet(class_folders, 3).questions["class"].prompts]

    assert prompts("n01 maillot", "n02 maillot, tank suit", "n03 tench") == [
        "a photo of a maillot.", "a photo of a tank suit.", "a photo of a tench.",
    ]  # fmt: skip
    # The other case is the same word to the text tower; a second name that is another's is none of one's own.
    assert prompts("n01 Cardigan, tench, Welsh corgi", "n02 cardigan", "n03 tench")[0] == "a photo of a Welsh corgi."
    assert prompts("n01 tabby, tench", "n02 crane", "n03 tench")[0] == "a photo of a tabby."
    with pytest.raises(UserError, match="the classes n01 and n02 are both called 'crane' and would have one prompt"):
        prompts("n01 crane", "n02 crane", "n03 tench")


def test_the_two_cranes_of_imagenet_are_told_apart(class_folders):
    for old, new in (("n01", "n02012849"), ("n02", "n03126707")):
        (class_folders / "val" / old).rename(class_folders / "val" / new)
    (class_folders / "classes.txt").unlink()
    (class_folders / "LOC_synset_mapping.txt").write_text("n02012849 crane\nn03126707 crane\nn03 tench\n")
    found = imagenet(class_folders, 3).questions["class"].prompts
    assert sorted(own[0] for own in found) == [
        "a photo of a construction crane.", "a photo of a crane bird.", "a photo of a tench.",
    ]  # fmt: skip


def test_wrong_class_folders_are_one_sentence(class_folders):
    with pytest.raises(UserError, match=r"probe.imagenet: there is no folder .*away"):
        imagenet(class_folders / "away", 10)
    (class_folders / "val/n04").mkdir()
    assert len(imagenet(class_folders, 100).pictures) == 15  # an empty folder is no class
    (class_folders / "val/n03/0.JPEG").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"n03/0.JPEG cannot be used: not an image in a known format"):
        imagenet(class_folders, 3).pictures[2]()
    (class_folders / "classes.txt").write_text("n01 tench\nn03 shark\n")
    with pytest.raises(UserError, match="no line of the file with the classes' names is about 'n02'"):
        imagenet(class_folders, 10)
    for text, said in (
        ("n01 tench\nn02 gold,\nn03 shark\n", "line 2 of .*classes.txt holds an empty name"),
        ("n01 tench\nn02 gold\nn01 shark\n", "line 3 of .*classes.txt names 'n01' a second time"),
        ("n01 t\udce4nch\n", "classes.txt is not UTF-8 text"),
    ):
        (class_folders / "classes.txt").write_text(text, errors="surrogateescape")
        with pytest.raises(UserError, match=said):
            imagenet(class_folders, 10)
    (class_folders / "classes.txt").write_text("n01 tench\nn02 gold\nn03 shark\n", encoding="utf-8-sig")
    assert imagenet(class_folders, 2).questions["class"].prompts[0] == ["a photo of a tench."]
    (class_folders / "classes.txt").unlink()
    with pytest.raises(UserError, match="holds neither classes.txt nor LOC_synset_mapping.txt"):
        imagenet(class_folders, 10)
    shutil.rmtree(class_folders / "val")
    (class_folders / "val").mkdir()
    with pytest.raises(UserError, match="holds 0 class folders with pictures, and at least 2 are needed"):
        imagenet(class_folders, 10)
