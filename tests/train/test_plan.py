"""`haplovl plan`: full-size recipes in seconds without data or network, figures that follow from named rules."""

import json

import pytest
import torch

from haplovl.errors import UserError
from haplovl.settings import (
    ComputeProfile,
    HubTeacher,
    LoraSettings,
    ModelSettings,
    NoStageSettings,
    OptimizerSettings,
    PretrainingSettings,
    load_compute,
    load_params,
)
from haplovl.train.blueprint import Blueprint, find_teachers, typical_rows
from haplovl.train.memory import Holdings, device_memory
from haplovl.train.meta_run import Footprint, run_on_meta
from haplovl.train.objectives import NextToken
from haplovl.train.plan import dry_run, plan_stage
from haplovl.train.plan_table import print_plan

NOTHING = Footprint(activations=0, logits=0, with_gradients=0, small=0)


@pytest.fixture(autouse=True)
def at_the_root(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def laptop(**changes) -> ComputeProfile:
    return ComputeProfile(**{"name": "test", "micro_batch_rows": 1, "attention": "sdpa", **changes})


@pytest.mark.parametrize(
    ("recipe", "profile", "billions"), [("haplovl-7b", "node-8gpu", 7.05), ("haplovl-8b", "slurm-4x8gpu", 8.34)]
)
def test_full_size_fits_the_profile_that_is_meant_for_it(recipe, profile, billions):
    params, compute = load_params(f"params/{recipe}.yaml"), load_compute(profile)
    plan = plan_stage("stage2", params, compute, mfu=0.5)
    assert sum(plan.weights.values()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert plan.trained == sum(plan.weights.values())
    chosen = [o for o in plan.options if o.zero_stage == compute.zero_stage]
    assert [o.fits for o in chosen] == [True]
    totals = [o.memory.total for o in plan.options]
    assert totals == sorted(totals, reverse=True) and totals[0] > 2 * totals[3]
    # 6 operations per weight and token bound the whole from below, attention adds less than a third.
    tokens = params.stage2.batch.rows * params.stage2.batch.row_tokens
    words = 2 * 4096 * (32003 if "7b" in recipe else 128259)  # looked up, and logits of few positions
    assert 1.0 < plan.flops.model / (6 * (plan.trained - words) * tokens) < 1.33
    seconds = plan.flops.model / (0.5 * 989e12 * compute.processes)
    assert plan.seconds_per_step == pytest.approx(seconds)
    assert plan.price == pytest.approx(seconds * plan.steps / 3600 * compute.processes * compute.price_per_hour)


def test_stage1_counts_its_teachers_apart():
    plan = plan_stage("stage1", load_params("params/haplovl-7b.yaml"), load_compute("node-8gpu"))
    assert plan.trained == plan.weights["embeddings"] + plan.weights["pre_decoder"] + plan.weights["heads"]
    assert plan.flops.hardware == plan.flops.model + plan.flops.teachers + plan.flops.recompute
    assert plan.flops.teachers > 0 and "assumed" in plan.mfu_source
    assert plan.mfu == pytest.approx(0.4 * plan.flops.model / plan.flops.hardware)


def test_memory_by_hand():
    weights = 3 * 10**9
    holdings = Holdings(trained=weights)

    def total(precision, stage, processes=8, **more):
        compute = laptop(device="cuda", zero_stage=stage, processes=processes, **more)
        memory = device_memory(holdings, NOTHING, precision, compute, 2)
        return (memory.total - memory.buffers) / weights, memory.host / weights

    assert total("fp32", 0)[0] == 16
    assert total("bf16", 0)[0] == total("bf16", 1)[0] == 2 + 6 + 12 / 8
    assert total("bf16", 2)[0] == 2 + (4 + 2) / 8 + 12 / 8
    assert total("bf16", 3)[0] == (2 + 4 + 12) / 8
    assert total("bf16", 2, offload="optimizer") == (2, (4 + 12) / 8)
    assert total("bf16", 3, offload="all") == (0, (2 + 4 + 12) / 8)


def test_the_meta_run_counts_what_a_real_run_keeps(model, processor):
    """The bytes that autograd keeps for a real backward pass are those of the meta run, up to short-lived ones."""
    params, settings = load_params(), load_params().stage2
    teachers = find_teachers(params)
    meta = Blueprint.of(params, teachers)
    rows = typical_rows(meta.model.config, params, settings, 2)
    _, footprint = dry_run(meta, settings.model_copy(update={"precision": "fp32"}), laptop(attention="eager"), rows)
    real = type(meta.model)(meta.model.config).train()
    real.set_attn_implementation({"": "eager", "text_config": "eager"})
    rows.pixel_values = torch.randn(rows.pixel_values.shape)
    weights = {p.untyped_storage()._cdata for p in real.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        NextToken(real)(rows)["loss"]
    saved = sum(size for key, size in kept.items() if key not in weights)
    assert saved <= footprint.activations + footprint.logits <= 1.5 * saved


def test_checkpointing_trades_activations_for_recomputation():
    params = load_params("params/haplovl-7b.yaml")
    plain, again = (plan_stage("stage2", params, laptop(activation_checkpointing=on)) for on in (False, True))
    zero2 = [next(o.memory for o in plan.options if o.zero_stage == 2) for plan in (plain, again)]
    assert zero2[1].activations < 0.2 * zero2[0].activations
    assert again.flops.model == plain.flops.model == plain.flops.hardware < again.flops.hardware


def test_adapters_need_less_of_everything_but_weights():
    params = load_params("params/haplovl-7b.yaml")
    lora = params.model_copy(update={"stage2": params.stage2.model_copy(update={"lora": LoraSettings()})})
    whole, adapters = (plan_stage("stage2", p, load_compute("gpu")) for p in (params, lora))
    assert adapters.trained < 0.06 * whole.trained
    assert [o.fits for o in whole.options if o.offload == "none"] == [False] * 4
    assert all(o.fits for o in adapters.options)
    assert adapters.flops.model < 0.75 * whole.flops.model


def test_errors_of_shape_show_before_money_is_spent():
    params = load_params("params/haplovl-7b.yaml")
    long = params.stage2.batch.model_copy(update={"row_tokens": 8192})
    params = params.model_copy(update={"stage2": params.stage2.model_copy(update={"batch": long})})
    with pytest.raises(UserError, match="a step would fail: the sequence has 8192 tokens, more than .* 4096"):
        plan_stage("stage2", params, laptop())


def test_a_wrong_objective_fails_on_the_meta_device(model):
    params = load_params()
    blueprint = Blueprint.of(params, find_teachers(params))
    rows = typical_rows(blueprint.model.config, params, params.stage2, 1)
    blueprint.model.lm_head = torch.nn.Linear(blueprint.model.config.text_config.hidden_size + 1, 10, device="meta")
    with pytest.raises(RuntimeError, match="193"):
        run_on_meta(NextToken(blueprint.model), rows, 512)


def test_a_step_that_cannot_be_split_is_refused():
    with pytest.raises(UserError, match="a step of 12 rows cannot be split over 5 processes"):
        plan_stage("stage2", load_params(), laptop(processes=5))


def test_an_unknown_teacher_offline_is_named():
    params = load_params("params/haplovl-7b.yaml")
    language = HubTeacher(kind="hub", id="nobody/nothing", revision="0" * 40)
    teachers = params.teachers.model_copy(update={"language": language})
    with pytest.raises(UserError, match="nobody/nothing"):
        find_teachers(params.model_copy(update={"teachers": teachers}))


def test_a_measured_mfu_is_preferred(tmp_path, monkeypatch):
    params = load_params()
    log = tmp_path / "runs/training/stage2-0123/log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps({"step": n, "mfu": mfu}) + "\n" for n, mfu in enumerate((0.1, 0.3, 0.31))))
    monkeypatch.chdir(tmp_path)
    plan = plan_stage("stage2", params, laptop(peak_tflops=1.0))
    assert plan.mfu == 0.3 and "measured" in plan.mfu_source
    assert plan_stage("stage1", params, laptop()).mfu_source.startswith("assumed")
    assert plan_stage("stage2", params, laptop(), mfu=0.2).mfu == 0.2


def test_json_for_scripts_and_a_table_for_people(capsys):
    params, compute = load_params(), load_compute("laptop")
    print_plan("both", params, compute, None, as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in data["stages"]] == ["stage1", "stage2"]
    assert data["price"] is None and data["stages"][1]["options"][0]["memory"]["total"] > 0
    print_plan("stage2", params, compute, None, as_json=False)
    text = capsys.readouterr().out
    assert "names no peak_tflops" in text and "0 (profile)" in text
    with pytest.raises(UserError, match="stage3"):
        print_plan("stage3", params, compute, None, as_json=False)


def test_other_designs_are_planned_as_well():
    params, compute = load_params("params/haplovl-7b.yaml"), load_compute("node-8gpu")

    def planned(**model):
        return plan_stage("stage2", params.model_copy(update={"model": ModelSettings(**model)}), compute)

    llava = planned(fusion="tower", image_size=336)
    solo = planned(fusion="patches", image_size=1024, patch_size=32)
    # LLaVA-1.5-7B has 7.06e9 parameters with the tower's last layer (12.6e6), which is left out here.
    assert sum(llava.weights.values()) / 1e9 == pytest.approx(7.05, abs=0.01)
    assert llava.weights["connector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert llava.weights["tower"] / 1e6 == pytest.approx(290.9, abs=0.1) and "pre_decoder" not in llava.weights
    assert solo.weights["embeddings"] == 3 * 32 * 32 * 4096 + 4096  # one bias-free linear layer, and the newline
    assert set(solo.weights) == {"embeddings", "language_model"} == set(solo.flops.forward) - {"logits"}
    assert set(llava.flops.forward) == {"embeddings", "tower", "connector", "language_model", "logits"}
    frozen = OptimizerSettings(learning_rate=1e-3, rate_factors={"tower": 0.0, "language_model": 0.0})
    shared = params.stage1.model_dump(include={"steps", "batch", "mixture"})
    alignment = PretrainingSettings(objective="next_token", optimizer=frozen, **shared)
    changes = {"model": ModelSettings(fusion="tower", image_size=336), "stage1": alignment}
    first = plan_stage("stage1", params.model_copy(update=changes), compute)
    assert first.trained == llava.weights["connector"]  # LLaVA's first stage trains the projector alone
    assert first.flops.backward["tower"] == 0 < first.flops.forward["tower"]
    optimizer = OptimizerSettings(learning_rate=1e-3, rate_factors={"language_model": 0.1})
    with pytest.raises(
        UserError, match="stage1.optimizer.rate_factors names 'language_model', which this model or stage"
    ):
        stage1 = params.stage1.model_copy(update={"optimizer": optimizer})
        plan_stage("stage1", params.model_copy(update={"stage1": stage1}), compute)
    with pytest.raises(UserError, match="trains nothing in stage1"):
        plan_stage("stage1", params.model_copy(update={"stage1": NoStageSettings(objective="none")}), compute)
