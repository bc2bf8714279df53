"""Where answers look: the maps lie where the picture is, add up, are those of the whole weights, and come out twice."""

import copy
import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from noise import noise
from PIL import Image

from haplovl import cli
from haplovl.data.conversation import TEMPLATES
from haplovl.errors import UserError
from haplovl.evaluate import looking
from haplovl.evaluate.attention_figure import attention_colours, attention_figure, drawn_size, overlay
from haplovl.evaluate.looking import Shown, look
from haplovl.model import HaploImageProcessor, HaploProcessor
from haplovl.model.attention_weights import AttentionWeights
from haplovl.model.decoder import eager_attention
from haplovl.model.embedding import merge_tiles
from haplovl.model.inherit import inherit
from haplovl.model.layout import Placement, single_tile
from haplovl.model.media import read_grids
from haplovl.settings import ModelSettings

TILE, PATCH = 32, 8
QUESTION = "Where is the red digit?"


def tiled(tokenizer, max_tiles, **options):
    looks = HaploImageProcessor(TILE, PATCH, max_tiles, **options)
    return HaploProcessor(looks, tokenizer, chat_template=TEMPLATES["plain"].jinja())


def lit(processor, image, row, column, size=None):
    """The pixels that light up when all weight is on one patch: first and last row, first and last column."""
    placed = processor.image_processor.place(image.height, image.width)
    values = np.zeros((placed.grid.out_rows, placed.grid.out_columns))
    values[row, column] = 1.0
    height, width = size or (image.height, image.width)
    found = np.argwhere(Shown(image, placed, PATCH).spread(values, height, width) == 1)
    return (*map(int, found.min(axis=0)), *map(int, found.max(axis=0))) if len(found) else None


def test_by_hand_in_tiles_side_by_side(tokenizer):
    processor = tiled(tokenizer, 4)
    wide = noise(64, 32)  # two tiles, nothing resized
    assert processor.image_processor.place(32, 64).grid.tile_columns == 2
    assert lit(processor, wide, 1, 5) == (8, 40, 15, 47)
    assert lit(processor, wide, 0, 0) == (0, 0, 7, 7)
    assert lit(processor, wide, 3, 7) == (24, 56, 31, 63)
    assert lit(processor, wide, 1, 5, size=(320, 640)) == (80, 400, 159, 479)
    low = noise(64, 20)  # the last row of patches shows four rows of pixels and padding
    assert processor.image_processor.place(20, 64).grid.out_rows == 3
    assert lit(processor, low, 2, 3) == (16, 24, 19, 31)


def test_by_hand_in_a_letterbox(tokenizer):
    processor = tiled(tokenizer, 1)
    wide = noise(64, 32)  # 32x16 in the middle of a square: half size, eight rows above and below
    assert lit(processor, wide, 0, 0) is None and lit(processor, wide, 3, 2) is None
    assert lit(processor, wide, 1, 0) == (0, 0, 15, 15)
    assert lit(processor, wide, 2, 3) == (16, 48, 31, 63)


@pytest.mark.parametrize(
    "options",
    [{}, {"tiling": "native"}, {"tiling": "released", "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}],
)
@pytest.mark.parametrize("size", [(96, 64), (64, 150), (300, 120), (90, 90), (200, 31)])
@pytest.mark.parametrize("max_tiles", [1, 2, 6])
def test_a_patch_lights_up_what_the_processor_puts_into_it(tokenizer, size, max_tiles, options):
    """The picture's colours tell where a pixel is; a patch's mean colour must be that of the pixels it lights up.

    Blue is full in the picture and absent from padding: a patch's blue says how much of it the picture fills.
    """
    processor = tiled(tokenizer, max_tiles, image_mean=(0,) * 3, image_std=(1,) * 3, **options)
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / width, 255 * y / height, np.full_like(x, 255)], axis=-1)
    image = Image.fromarray(pixels.astype(np.uint8))
    inputs = processor.image_processor(image, return_tensors="pt")
    grid = read_grids(inputs["image_grids"])[0]
    tiles = inputs["pixel_values"][0][: grid.tiles]
    means = tiles.unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH)).mean(dim=(3, 5)).permute(0, 2, 3, 1)
    means = merge_tiles(means.contiguous(), grid).numpy()
    filled = np.argwhere(means[..., 2] > 0.3)
    assert len(filled) > 0
    placed = processor.image_processor.place(height, width)
    shown = Shown(image, placed, PATCH)
    for row, column in filled:
        values = np.zeros(means.shape[:2])
        values[row, column] = 1.0
        own = shown.spread(values, height, width) == 1
        # Half a pixel of rounding, and bicubic edges.
        tolerance = 0.01 + 1 / min(width, height)
        expected = means[row, column, :2] / means[row, column, 2]
        assert np.allclose(pixels[own].mean(axis=0)[:2] / 255, expected, atol=tolerance)
    if options.get("tiling") != "released":
        covered = shown.spread(np.ones(means.shape[:2]), height, width)
        assert (covered == 1).all()  # every pixel of the picture belongs to a patch


def test_what_no_patch_shows_has_no_value():
    cut = Placement(single_tile(4, 4), (40, 32), (-4, 0))  # four rows of the picture above and below the tile
    values = Shown(noise(32, 40), cut, PATCH).spread(np.ones((4, 4)), 40, 32)
    assert np.isnan(values[:4]).all() and np.isnan(values[36:]).all() and (values[4:36] == 1).all()


@pytest.mark.parametrize("flags", [(True, True), (False, False), (True, False)])
def test_all_weight_on_one_patch_lights_it_up_and_nothing_else(vision, language, tokenizer, monkeypatch, flags):
    """Two pictures, tiles, class and newline tokens: the patch is counted in the model's own order of tokens."""
    model, processor = tiny(vision, language, tokenizer, flags)
    wide, upright = noise(64, 32), noise(20, 60, seed=1)
    target = (3, 1)  # row 3, column 1 of the second picture's patches
    prompt = processor(text="<image><image>", images=[wide, upright], return_tensors="pt")
    grids = read_grids(prompt["image_grids"])
    assert [(g.out_rows, g.out_columns, g.tiles) for g in grids] == [(4, 8, 2), (8, 3, 2)]
    is_patch = model.model.image_embedding.is_patch(grids)
    patches = is_patch.nonzero()[:, 0]
    place = int(patches[4 * 8 + target[0] * 3 + target[1]])

    def one_patch(self, query, key, allowed, scaling):
        weights = torch.zeros(query.shape[1], len(self.queries), key.shape[2])
        weights[..., int(self.first_image) + place] = 1.0
        return weights

    ids = processor(
        text=[
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": QUESTION}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
        ],
        images=[[wide, upright]],
        return_tensors="pt",
    )["input_ids"][0]
    monkeypatch.setattr(
        AttentionWeights, "first_image", (ids == processor.image_token_id).nonzero()[0, 0], raising=False
    )
    monkeypatch.setattr(AttentionWeights, "_weights", one_patch)
    found = look(model, processor, QUESTION, [wide, upright], "top left")
    assert (found.share == 1).all()
    first, second = found.relative()
    assert not first.any()
    expected = np.zeros((8, 3))
    expected[target] = 4 * 8 + 8 * 3  # all of it, in multiples of an even share
    assert (second == expected).all()
    colours = attention_colours(float(expected.max()))
    drawn = overlay(found.pictures[1], second[0, 0], colours, 60, 20).astype(int)
    cold = overlay(found.pictures[1], np.zeros((8, 3)), colours, 60, 20).astype(int)
    changed = np.argwhere((drawn != cold).any(axis=-1))
    assert (*changed.min(axis=0), *changed.max(axis=0)) == lit(processor, upright, *target)
    assert len(changed) == np.prod(changed.max(axis=0) - changed.min(axis=0) + 1)


def tiny(vision, language, tokenizer, flags=(True, True), max_tiles=4):
    class_token, newline = flags
    looks = HaploImageProcessor(TILE, PATCH, max_tiles)
    processor = HaploProcessor(looks, tokenizer, TEMPLATES["plain"].jinja(), *flags)
    settings = ModelSettings(image_size=TILE, class_token=class_token, image_newline=newline)
    torch.manual_seed(3)
    ids = (processor.image_token_id, len(tokenizer), processor.video_token_id)
    return inherit(vision, language, settings, *ids).eval(), processor


@pytest.fixture
def found(model, processor):
    return look(model, processor, QUESTION, [noise(32, 32)], "top left", with_question=True)


def test_maps_add_up(found):
    [relative], [attention] = found.relative(), found.attention
    layers = [("pre", 1), ("pre", 2), ("post", 1), ("post", 2)]
    assert found.layers == layers and relative.shape == (len(found.tokens), 4, 4, 4)
    assert np.allclose(relative.mean(axis=(2, 3)), 1, atol=1e-5)
    assert (attention.sum(axis=(2, 3)) < found.share + 1e-6).all()  # class and newline tokens get some of it
    assert (found.share > 0).all() and (found.share <= 1 + 1e-6).all()
    tokens = 4 * 5 + 1
    before = np.array([1 + tokens + 1 + i for i in range(len(found.tokens))])
    assert "".join(found.tokens[: found.of_question]) == QUESTION.replace(" ", "")
    assert "".join(found.tokens[found.of_question :]) == "topleft"
    assert found.even.shape == (len(found.tokens),) and (np.diff(found.even) <= 1e-6).all()
    assert found.even[0] == pytest.approx(tokens / (before[0] + 1), rel=0.1)


def test_attention_is_that_of_the_whole_weights(model, processor, monkeypatch):
    """An answer's token at the position before it, a question's at its own; means over heads of the pre-decoder."""
    image = noise(32, 32)
    found = look(model, processor, QUESTION, [image], "top left", with_question=True)
    kept = []

    def keep(module, query, key, value, mask, scaling, **options):
        out, weights = eager_attention(module, query, key, value, mask, scaling)
        kept.append(weights[0].mean(dim=0))
        return out, weights

    whole = copy.deepcopy(model)
    whole.set_attn_implementation({"": "eager", "text_config": "sdpa"})
    monkeypatch.setattr("haplovl.model.decoder.eager_attention", keep)
    text = f"<|user|><image>\n{QUESTION}<|assistant|> top left"
    inputs = processor(text=[text], images=[[image]], return_tensors="pt")
    with torch.no_grad():
        whole.model(**{name: inputs[name] for name in ("input_ids", "pixel_values", "image_grids")})
        states = whole.model.pre_decode(inputs["input_ids"], inputs["pixel_values"], None, inputs["image_grids"])[0]
    ids, answer = inputs["input_ids"][0], len(found.tokens) - found.of_question
    is_image = ids == processor.image_token_id
    patches = is_image.nonzero()[:, 0][model.model.image_embedding.is_patch([single_tile(4, 4)])]
    own = [
        *range(len(ids) - answer - 1 - found.of_question, len(ids) - answer - 1),
        *range(len(ids) - answer, len(ids)),
    ]
    queries = [place - (place >= len(ids) - answer) for place in own]
    assert "".join(processor.tokenizer.decode([t]).strip() for t in ids[own].tolist()) == "".join(found.tokens)
    for layer in range(2):
        expected = kept[layer][queries][:, patches].reshape(-1, 4, 4).numpy()
        assert np.allclose(found.attention[0][:, layer], expected, atol=1e-6)
        assert np.allclose(found.share[:, layer], kept[layer][queries][:, is_image].sum(-1), atol=1e-6)
    cosines = torch.nn.functional.cosine_similarity(states[own][:, None], states[patches][None], dim=-1)
    assert np.allclose(found.likeness[0], cosines.reshape(-1, 4, 4), atol=1e-5)


def test_a_look_leaves_no_trace_and_comes_out_twice(model, processor):
    model.set_attn_implementation({"": "matmul", "text_config": "eager"})
    first = look(model, processor, QUESTION, [noise(32, 32)])
    second = look(model, processor, QUESTION, [noise(32, 32)])
    assert model.config._attn_implementation == "matmul"
    assert model.config.text_config._attn_implementation == "eager"
    assert not model.model.pre_decoder._forward_hooks
    assert first.answer == second.answer and attention_figure(first) == attention_figure(second)


def test_the_models_own_answer_is_what_it_says(model, processor):
    from haplovl.evaluate.answer import scored_answers

    image = noise(32, 32)
    [said] = scored_answers(model, processor, [QUESTION], [[image]], 1, 6, open_picture=lambda picture: picture)
    found = look(model, processor, QUESTION, [image], max_new_tokens=6)
    assert found.answer == said.text and 0 < len(found.tokens) <= 6


def test_an_answer_that_the_template_s_end_mark_holds_is_looked_at_itself(model, processor):
    found = look(model, processor, QUESTION, [noise(32, 32)], "end")
    assert "<" not in "".join(found.tokens) and found.answer == "end"


def test_long_texts_are_looked_at_in_part(model, processor, monkeypatch):
    monkeypatch.setattr(looking, "MOST_TOKENS", 3)
    found = look(model, processor, QUESTION, [noise(32, 32)], "top left top left", with_question=True)
    assert (found.of_question, len(found.tokens)) == (3, 6) and found.left_out > 2


@pytest.mark.parametrize(
    ("fusion", "shape"), [({"fusion": "tower"}, (4, 4)), ({"fusion": "patches", "patch_size": 8}, (3, 4))]
)
def test_a_model_without_pre_decoder_shows_what_it_has(vision, language, tokenizer, fusion, shape):
    settings = ModelSettings(image_size=TILE, **fusion)
    processor = tiled(tokenizer, 1, tiling="native" if settings.fusion == "patches" else "haplovl")
    processor.class_token, processor.image_newline = settings.class_token, settings.image_newline
    ids = (processor.image_token_id, len(tokenizer), processor.video_token_id)
    model = inherit(vision, copy.deepcopy(language), settings, *ids).eval()
    found = look(model, processor, QUESTION, [noise(32, 24)], "top left")
    assert found.likeness is None and found.layers == [("post", 1), ("post", 2)]
    assert found.attention[0].shape == (len(found.tokens), 2, *shape)
    assert np.allclose(found.relative()[0].mean(axis=(2, 3)), 1, atol=1e-5)
    assert Image.open(io.BytesIO(attention_figure(found))).height > 200


def test_tiny_pictures_are_enlarged_in_whole_steps_and_large_ones_shrunk():
    assert drawn_size(noise(32, 32), 187) == (160, 160)
    assert drawn_size(noise(48, 20), 240) == (100, 240)
    assert drawn_size(Image.new("RGB", (4000, 3000)), 200) == (150, 200)
    assert drawn_size(Image.new("RGB", (4000, 3)), 200) == (1, 200)


@pytest.mark.parametrize(
    ("question", "answer", "pictures", "message"),
    [
        (" ", None, 1, "the question is empty"),
        ("Which?", None, 0, "there is no picture to look at"),
        ("Which?", "  ", 1, "the answer is empty"),
        ("Which <image>?", None, 1, "'<image>' means something special"),
        ("Which?", "red<|end|>", 1, "'<|end|>' means something special"),
        ("word " * 3000, "red", 1, "the model cannot take this question: the sequence has"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(model, processor, question, answer, pictures, message):
    with pytest.raises(UserError, match=message.replace("|", r"\|").replace("?", r"\?")) as refused:
        look(model, processor, question, [noise(32, 32)] * pictures, answer)
    assert "\n" not in str(refused.value)


def test_an_answer_of_nothing_but_its_end_is_refused(model, processor, monkeypatch):
    monkeypatch.setattr(looking, "_generate", lambda *_: [])
    with pytest.raises(UserError, match="the model's answer is empty"):
        look(model, processor, QUESTION, [noise(32, 32)])


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["haplovl", "look", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_the_command_draws_and_tells(tiny_model_dir, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    noise(64, 40).save("a.png")
    noise(32, 32, seed=1).save("b.png")
    command = [QUESTION, "--image", "a.png", "--image", "b.png", "--model", tiny_model_dir, "--answer", "top left"]
    assert run(monkeypatch, *command, "--output", "new/first.png", "--with-question") in (0, None)
    assert run(monkeypatch, *command, "--output", "second.png", "--with-question") in (0, None)
    told = capsys.readouterr().out
    assert "top left" in told and "pre-decoder" in told and "The figure is new/first.png" in told
    assert Path("new/first.png").read_bytes() == Path("second.png").read_bytes()
    picture = Image.open("second.png")
    assert picture.format == "PNG" and picture.width > 600 and picture.height > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "none.png"], "none.png: the image is missing"),
        (["--image", "text.png"], "text.png: not an image in a known format"),
        (["--image", "a.png", "--model", "empty"], "empty is no model: it holds no readable config.json"),
        (["--image", "a.png", "--model", "none"], "there is no model folder none"),
        (["--image", "a.png", "--output", "look.jpg"], "look.jpg is no .png file"),
        (["--image", "a.png", "--output", "text.png/look.png"], "text.png/look.png cannot be written"),
        ([], "there is no picture to look at"),
    ],
)
def test_the_command_refuses_in_one_sentence(options, message, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise(32, 32).save("a.png")
    Path("text.png").write_text("no picture")
    Path("empty").mkdir()
    shutil.copytree(tiny_model_dir, "models/stage2")
    code = run(monkeypatch, QUESTION, "--answer", "red", *options)
    assert str(code).startswith(f"error: {message}") and "\n" not in str(code)
