"""Stages of other recipes through the command: parts that are frozen, stages that are left out, other objectives."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from haplovl.data.packing import draw_documents
from haplovl.settings import CurriculumPhase, DistillationLosses, OptimizerSettings, StageMixture
from haplovl.train.objectives import Distillation, NextToken
from haplovl.train.optim import freeze_parts, make_optimizer, part_of, set_learning_rate

STEPS = 3
NEXT_TOKEN = {
    "objective": "next_token",
    "steps": STEPS,
    "batch": {"rows": 2, "row_tokens": 96},
    "optimizer": {"learning_rate": 1e-2},
    "mixture": {"instruction": 1.0},
}
LLAVA = {"fusion": "tower", "class_token": False, "image_newline": False, "post_mask": "causal", "connector": "random"}
SOLO = {"fusion": "patches", "patch_size": 8, "class_token": False, "post_mask": "causal", "connector": "random"}


@pytest.fixture(scope="module")
def project(make_project, vision, language, processor, tmp_path_factory):
    stage = {"steps": STEPS, "precision": "fp32", "checkpoint_every": 3, "batch": {"rows": 2, "row_tokens": 96}}
    return make_project(tmp_path_factory.mktemp("project"), vision, language, processor, stage)


def trained(project, model, stage1, stage2=None, stages=("stage1",)):
    """The recipe's weights after its stages, and what the commands printed."""
    params = yaml.safe_load((project / "params.yaml").read_text())
    base = {"image_size": 32, "pre_rotary_increment": 0.0, "post_rotary_increment": 1.0}
    params |= {"model": base | model, "stage1": stage1}
    params["stage2"] = {**params["stage2"], "optimizer": {"learning_rate": 8e-4}, **(stage2 or {})}
    params.pop("compare", None)
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    printed = ""
    for stage in stages:
        command = [sys.executable, "-m", "haplovl", "train", stage, "--compute", "one"]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        printed += done.stdout
    return load_file(project / f"models/{stages[-1]}/model.safetensors"), printed


def changed(before, after):
    """Parts of the model of which a weight differs."""
    return {part_of(name) for name, value in after.items() if not torch.equal(value, before[name])}


def test_llava_trains_its_projector_first_and_everything_then(project):
    start, printed = trained(project, LLAVA, {"objective": "none"})
    assert "nothing to train in this recipe" in printed
    assert (project / "models/stage1/training_log.jsonl").read_text() == ""
    frozen = {"rate_factors": {"tower": 0.0, "language_model": 0.0}}
    aligning = NEXT_TOKEN | {"optimizer": {"learning_rate": 1e-2, **frozen}}
    first, _ = trained(project, LLAVA, aligning)
    assert changed(start, first) == {"connector"}
    second, _ = trained(
        project, LLAVA, NEXT_TOKEN | {"optimizer": {"learning_rate": 1e-2, **frozen}}, stages=("stage2",)
    )
    assert changed(first, second) == {"tower", "connector", "language_model"}
    rows = [json.loads(line) for line in (project / "models/stage2/training_log.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS and all(row["flops"] > 0 and row["records"] > 0 for row in rows)


def test_solo_trains_raw_patches_and_the_language_model_in_both_stages(project):
    start, _ = trained(project, SOLO, {"objective": "none"})
    after, _ = trained(project, SOLO, NEXT_TOKEN, stages=("stage1", "stage2"))
    assert changed(start, after) == {"image_embedding", "language_model"}


def test_a_stage_that_is_left_out_gives_what_the_teachers_gave(project, vision):
    start, _ = trained(project, {"connector": "random"}, {"objective": "none"})
    own = vision.state_dict()
    name = next(name for name in own if name.endswith("encoder.layers.0.mlp.fc1.weight"))
    assert torch.equal(start["model.pre_decoder.layers.0.fc1.weight"], own[name])


def test_parts_have_their_factor_of_the_learning_rate(model):
    objective = NextToken(model)
    settings = OptimizerSettings(learning_rate=1.0, rate_factors={"connector": 0.5, "pre_decoder": 0.0})
    freeze_parts(objective, settings)
    optimizer = make_optimizer(objective, settings)
    set_learning_rate(optimizer, 0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in objective.named_parameters():
        expected = {"connector": 0.05, "pre_decoder": None}.get(part_of(name), 0.1)
        assert rates.get(id(parameter)) == (None if expected is None else pytest.approx(expected)), name
    assert sum(group["weight_decay"] > 0 for group in optimizer.param_groups) == 0


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ({"tower": 0.5}, "names 'tower', which this model or stage does not have"),
        (
            dict.fromkeys(("image_embedding", "text_projection", "pre_decoder", "connector", "language_model"), 0.0),
            "nothing would be trained",
        ),
    ],
)
def test_factors_that_make_no_sense_are_refused(factors, words, model):
    with pytest.raises(ValueError, match=words):
        freeze_parts(NextToken(model), OptimizerSettings(learning_rate=1.0, rate_factors=factors))


def test_a_loss_of_weight_zero_is_left_out_with_its_head(model, vision, packed):
    batch = packed(model)
    both = Distillation(model, vision, -1, 0.5)
    one = Distillation(model, vision, -1, 0.5, DistillationLosses(vision=0.0, current_token=2.0))
    assert set(both(batch)) == set(both.counts(batch)) == {"loss_vision", "loss_feature", "loss_current_token"}
    assert set(one(batch)) == set(one.counts(batch)) == {"loss_feature", "loss_current_token"}
    assert one.vision_head is None and one.weights == {"loss_feature": 1.0, "loss_current_token": 2.0}
    assert Distillation(model, vision, -1, 0.5, DistillationLosses(feature=0.0, current_token=0.0)).text_head is None


def test_weights_scale_the_gradient_of_their_loss(model, vision, packed):
    """The engine's sum is linear in the weights: gradients of single losses add up with their factors."""
    from types import SimpleNamespace

    from haplovl.settings import ComputeProfile
    from haplovl.train.engine import accumulate, start_distributed

    start_distributed(ComputeProfile(name="one", micro_batch_rows=2, threads=1))
    batch = packed(model)

    def gradient(**weights):
        torch.manual_seed(0)
        objective = Distillation(model, vision, -1, 0.5, DistillationLosses(**weights))
        model.zero_grad()
        counts = {name: float(count) for name, count in objective.counts(batch).items()}

        class Engine(SimpleNamespace):
            module = objective

            def __call__(self, given):
                return objective(given)

            def backward(self, loss, **_):
                loss.backward()

        accumulate(Engine(), [batch], counts)
        return model.model.pre_decoder.layers[0].fc1.weight.grad.clone()

    vision_only, heavier = (
        gradient(feature=0.0, current_token=0.0),
        gradient(vision=3.0, feature=0.0, current_token=0.0),
    )
    torch.testing.assert_close(heavier, 3 * vision_only, rtol=1e-5, atol=1e-7)
    torch.distributed.destroy_process_group()


def test_a_phase_may_have_a_mixture_of_its_own():
    kinds, lengths = ["caption", "text", "instruction"] * 10, [4] * 30
    phase = CurriculumPhase(share=1.0, epochs=1, mixture=StageMixture(instruction=0.0, caption=1.0, text=0.0))
    drawn = draw_documents(kinds, lengths, phase.mixture, 16, 0, 0)
    assert {kinds[index] for document in drawn for index in document} == {"caption"}
