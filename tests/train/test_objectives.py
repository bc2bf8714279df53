"""The losses are what the paper says, per token, and the gradient reaches what it must."""

import pytest
import torch
from torch.nn import functional

from haplovl.data.loader import IGNORE, Batch
from haplovl.model.layout import ImageGrid, place, single_tile
from haplovl.train.objectives import Distillation, NextToken


@pytest.fixture
def batch(model):
    """Two rows: text and an image in one, two documents and padding in the other."""
    image, n = model.config.image_token_id, model.config.tokens_per_image
    length = n + 7
    ids = torch.zeros(2, length, dtype=torch.long)
    labels, documents = torch.full((2, length), IGNORE), torch.full((2, length), -1)
    ids[0] = torch.tensor([11, 12, *[image] * n, 13, 14, 15, 16, 17])
    labels[0, -3:] = ids[0, -3:]
    documents[0] = 0
    ids[1, :9] = torch.tensor([21, 22, 23, 24, 25, 26, 27, 28, 29])
    documents[1, :4], documents[1, 4:9] = 0, 1
    labels[1, 2:4], labels[1, 6:9] = ids[1, 2:4], ids[1, 6:9]
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Batch(ids, labels, documents, pixels, [single_tile(4, 4)] * len(pixels), ["a", "b", "c"])


def test_stage2_is_the_next_token_loss_on_answers_only(model, batch):
    objective = NextToken(model)
    with torch.inference_mode():
        total = objective(batch)["loss"]
        out = model(batch.input_ids, batch.pixel_values, document_ids=batch.document_ids, labels=batch.labels)
    assert objective.counts(batch) == {"loss": 8}
    torch.testing.assert_close(total / 8, out.loss, atol=1e-6, rtol=1e-5)


def test_stage2_gradients_reach_patches_pre_decoder_and_language_model(model, batch):
    NextToken(model.train())(batch)["loss"].backward()
    core = model.model
    for name, parameter in {
        "patch embedding": core.image_embedding.patch.weight,
        "image positions": core.image_embedding.position,
        "class token": core.image_embedding.class_token,
        "newline": core.image_embedding.newline,
        "text projection": core.text_projection.weight,
        "first pre-decoder layer": core.pre_decoder.layers[0].self_attn.q_proj.weight,
        "last pre-decoder layer": core.pre_decoder.layers[-1].fc2.weight,
        "connector": core.connector.weight,
        "language model": core.language_model.layers[0].mlp.down_proj.weight,
        "words": core.get_input_embeddings().weight,
        "head": model.lm_head.weight,
    }.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-8, f"no gradient in the {name}"


def test_a_changed_question_changes_the_loss_but_carries_none(model, batch):
    objective = NextToken(model)
    before = objective(batch)["loss"].item()
    batch.input_ids[0, 0] += 1
    assert objective(batch)["loss"].item() != before
    assert objective.counts(batch) == {"loss": 8}


@pytest.fixture
def distillation(model, vision):
    torch.manual_seed(4)
    return Distillation(model, vision, vision_layer=-1, temperature=0.5)


def test_stage1_losses_by_hand(distillation, model, vision, batch):
    with torch.inference_mode():
        parts = distillation(batch)
        hidden = model.model.pre_decode(batch.input_ids, batch.pixel_values, batch.document_ids)
        words = model.get_input_embeddings().weight
        feature, current, tokens = 0.0, 0.0, 0
        for row in range(2):
            for column in range(batch.input_ids.shape[1]):
                token = batch.input_ids[row, column]
                if token == model.config.image_token_id or batch.document_ids[row, column] < 0:
                    continue
                predicted, target = distillation.text_head(hidden[row, column]), words[token]
                feature += (predicted - target).norm() - functional.cosine_similarity(predicted, target, dim=0)
                current += functional.cross_entropy(words @ predicted / 0.5, token)
                tokens += 1
        target = vision(batch.pixel_values, output_hidden_states=True).hidden_states[-1][0, 1:]
        image = hidden[0, 2 : 2 + model.config.tokens_per_image][1:].view(4, 5, -1)[:, :4].reshape(16, -1)
        seen = (1 - functional.cosine_similarity(distillation.vision_head(image), target, dim=-1)).sum()
    assert distillation.counts(batch) == {"loss_vision": 16, "loss_feature": tokens, "loss_current_token": tokens}
    for name, expected in (("loss_vision", seen), ("loss_feature", feature), ("loss_current_token", current)):
        torch.testing.assert_close(parts[name], torch.as_tensor(expected), atol=1e-4, rtol=1e-4)


def test_teachers_and_language_model_are_no_part_of_stage1(distillation, batch):
    names = set(dict(distillation.named_parameters()))
    assert not [n for n in names if "language" in n or "teacher" in n or "embed_tokens" in n]
    assert {n.split(".")[0] for n in names} == {
        "image_embedding",
        "text_projection",
        "pre_decoder",
        "vision_head",
        "text_head",
    }
    sum(distillation(batch).values()).backward()
    core, teacher, words = distillation._frozen
    assert words.grad is None
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is None for p in core.language_model.layers.parameters())
    assert distillation.image_embedding.patch.weight.grad.abs().max() > 0


def test_every_parameter_takes_part_without_a_picture(distillation, batch):
    image = distillation._frozen[0].config.image_token_id
    batch.input_ids[batch.input_ids == image] = 9
    batch.pixel_values, batch.image_grids = None, []
    parts = distillation(batch)
    assert distillation.counts(batch)["loss_vision"] == 0 == parts["loss_vision"].item()
    sum(parts.values()).backward()
    assert distillation.vision_head.weight.grad is not None


# --- several tiles -------------------------------------------------------------------------------------------------
SHRUNK = ImageGrid(2, 2, 0, 0, 8, 8, 4, 4)
"""Four tiles of which every patch is the mean of 2x2: what a layout with fewer tokens than patches does."""


@pytest.fixture
def tiled(model):
    """A packed row of four pictures of one to four tiles with text between them, and its pictures' places."""
    grids = [place(32, 16, 32, 8, 4).grid, place(64, 64, 32, 8, 4).grid, place(20, 90, 32, 8, 4).grid, SHRUNK]
    image, ids, starts = model.config.image_token_id, [], []
    for number, grid in enumerate(grids):
        ids += [11 + number, 12]
        starts.append(len(ids))
        ids += [image] * grid.tokens(True, True)
    ids += [13, 14]
    documents = torch.zeros(1, len(ids), dtype=torch.long)
    documents[:, starts[2] - 2 :] = 1
    pixels = torch.randn(sum(grid.tiles for grid in grids), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([ids])
    labels = torch.where(ids == image, IGNORE, ids)
    return Batch(ids, labels, documents, pixels, grids, ["a", "b"]), starts


def expected_targets(vision, batch):
    """The teacher's patch for every patch of the pictures, by its own coordinates: [patches, width]."""
    states = vision(batch.pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:].unflatten(1, (4, 4))
    targets, first = [], 0
    for grid in batch.image_grids:
        tiles = states[first : first + grid.tiles]
        first += grid.tiles

        def patch(row, column, tiles=tiles, grid=grid):
            return tiles[row // 4 * grid.tile_columns + column // 4, row % 4, column % 4]

        for row in range(grid.out_rows):
            for column in range(grid.out_columns):
                if grid is SHRUNK:
                    four = [patch(2 * row + r, 2 * column + c) for r in (0, 1) for c in (0, 1)]
                    targets.append(torch.stack(four).mean(0))
                else:
                    targets.append(patch(grid.top + row, grid.left + column))
    return torch.stack(targets)


def test_stage1_compares_every_patch_with_the_teachers_patch_of_its_own_tile(distillation, model, vision, tiled):
    batch, starts = tiled
    assert [grid.tiles for grid in batch.image_grids] == [1, 4, 3, 4]
    assert [(g.top, g.left, g.rows, g.columns) for g in batch.image_grids[:3]] == [
        (0, 1, 4, 2), (0, 0, 8, 8), (0, 0, 3, 12)
    ]  # fmt: skip
    with torch.inference_mode():
        parts = distillation(batch)
        hidden = model.model.pre_decode(batch.input_ids, batch.pixel_values, batch.document_ids, batch.image_grids)[0]
        own = []
        for start, grid in zip(starts, batch.image_grids, strict=True):
            for row in range(grid.out_rows):  # after a class token per tile, every row ends with a newline
                begin = start + grid.tiles + row * (grid.out_columns + 1)
                own += hidden[begin : begin + grid.out_columns]
        targets = expected_targets(vision, batch)
        expected = 1 - functional.cosine_similarity(distillation.vision_head(torch.stack(own)), targets, dim=-1)
    patches = 4 * 2 + 8 * 8 + 3 * 12 + 4 * 4
    assert len(targets) == patches
    counts = distillation.counts(batch)
    assert counts == {"loss_vision": patches, "loss_feature": 10, "loss_current_token": 10}
    # A sum of 124 terms in fp32.
    torch.testing.assert_close(parts["loss_vision"], expected.sum(), atol=1e-4, rtol=1e-5)


def test_stage2_reads_several_tiles_and_its_gradient_reaches_them(model, tiled):
    batch, _ = tiled
    objective = NextToken(model)
    # All ten text tokens but the row's first, which nothing predicts.
    assert objective.counts(batch) == {"loss": 9}
    batch.pixel_values.requires_grad_(True)
    total = objective(batch)["loss"]
    out = model(
        batch.input_ids, batch.pixel_values, batch.image_grids, document_ids=batch.document_ids, labels=batch.labels
    )  # fmt: skip
    torch.testing.assert_close(total / 9, out.loss, atol=1e-6, rtol=1e-5)
    total.backward()
    reached = batch.pixel_values.grad.abs().amax(dim=(1, 2, 3))
    assert (reached > 0).all()
