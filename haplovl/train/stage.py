"""A stage of training before and after its steps: built from what the pipeline made, saved as a transformers folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from haplovl.errors import UserError
from haplovl.files import HEADS, PREPARED, STAGE1, STAGE2, TEACHERS, require, sha256_of, sha256_of_folder, whole_folder
from haplovl.model import HaploForConditionalGeneration, HaploProcessor
from haplovl.model.inherit import inherit, vision_part
from haplovl.records import write_jsonl
from haplovl.settings import DistillationSettings, Params, Stage1Settings, Stage2Settings, StageSettings, fingerprint
from haplovl.teachers import load_language, load_vision, recipe_processor, seed_everything
from haplovl.train.checkpoint import is_main, say
from haplovl.train.engine import DTYPES
from haplovl.train.flops import StepFlops
from haplovl.train.lora import add_adapters, merged_weights
from haplovl.train.monitor import without_measurements
from haplovl.train.objectives import Distillation, NextToken
from haplovl.train.optim import freeze_parts
from haplovl.train.state import full_weights

OUTPUTS = {"stage1": STAGE1, "stage2": STAGE2}
STARTS = {"stage1": (TEACHERS, "teachers"), "stage2": (STAGE1, "train stage1")}
"""Where a stage's first weights are, and the command that makes them."""


@dataclass
class Stage:
    """Everything a stage needs apart from the engine."""

    name: str
    settings: Stage1Settings | Stage2Settings
    model: HaploForConditionalGeneration
    objective: nn.Module | None
    """None where the recipe has no such stage."""
    processor: HaploProcessor
    flops: StepFlops | None
    identity: dict[str, Any]
    """What decides the result, by name."""


def build_stage(name: str, params: Params, from_teachers: bool = False) -> Stage:
    """Model and objective of `stage1` or `stage2`.

    `from_teachers` builds stage 2 on the model that stage 1 starts from, to count what it costs before stage 1 ran.

    Raises:
        UserError: inputs are missing, or settings and teachers do not fit.
    """
    seed_everything(params.seed)
    identity = stage_identity(name, params, "stage1" if from_teachers else name)
    settings = getattr(params, name)
    build = _stage1 if name == "stage1" or from_teachers else _stage2
    processor, model, make_objective = build(params)
    objective, flops = None, None
    if isinstance(settings, StageSettings):
        objective, flops = make_objective(settings)
    return Stage(name, settings, model, objective, processor, flops, identity)


def stage_identity(name: str, params: Params, start: str | None = None) -> dict[str, Any]:
    """What decides a stage's result, by name: settings, data, first weights (those of stage `start`) and code.

    Raises:
        UserError: inputs are missing.
    """
    return {
        name: getattr(params, name).model_dump(mode="json"),
        "seed": params.seed,
        "model": params.model.model_dump(mode="json"),
        "data (manifest)": sha256_of(require(PREPARED / "manifest.json", "prepare")),
        "initial weights": sha256_of_folder(require(*STARTS[start or name])),
        "code": _code_hash(),
    }


def _stage1(params: Params) -> tuple[Any, ...]:
    processor = recipe_processor(params)
    vision = load_vision(TEACHERS / "vision")
    ids = processor.image_token_id, len(processor.tokenizer), processor.video_token_id
    try:
        model = inherit(vision, load_language(TEACHERS / "language"), params.model, *ids)
    except ValueError as error:
        raise UserError(f"the model cannot be built from its teachers: {error}") from None
    # Generation must end where training ended its answers.
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id

    def objective(settings: StageSettings) -> tuple[nn.Module, StepFlops]:
        if isinstance(settings, DistillationSettings):
            taught = settings.taught_state(vision_part(vision.config).num_hidden_layers + 1)
            made = Distillation(model, vision, settings.vision_layer, settings.temperature, settings.losses)
            _freeze(made, settings, "stage1")
            return made, StepFlops.stage1(model, vision.config, settings.losses, taught)
        return _next_token(model, settings, "stage2" if isinstance(settings, Stage2Settings) else "stage1")

    return processor, model.train(), objective


def _stage2(params: Params) -> tuple[Any, ...]:
    processor = HaploProcessor.from_pretrained(STAGE1)
    model = HaploForConditionalGeneration.from_pretrained(STAGE1, dtype=torch.float32)
    if params.stage2.lora is not None:
        add_adapters(model, params.stage2.lora, params.seed)
    return processor, model.train(), lambda settings: _next_token(model, settings, "stage2")


def _next_token(
    model: HaploForConditionalGeneration, settings: StageSettings, stage: str
) -> tuple[nn.Module, StepFlops]:
    objective = NextToken(model)
    _freeze(objective, settings, stage)
    return objective, StepFlops.stage2(model)  # what is frozen costs less, so it is counted afterwards


def _freeze(objective: nn.Module, settings: StageSettings, stage: str) -> None:
    try:
        freeze_parts(objective, settings.optimizer)
    except ValueError as error:
        raise UserError(f"{stage}.{error}") from None


def _code_hash() -> str:
    """Hash of the code that decides a training result, so that no run continues a state of other code."""
    package = Path(__file__).parent.parent
    files = sorted(
        [package / "pictures.py", *package.glob("model/*.py"), *package.glob("train/*.py"), *package.glob("data/*.py")]
    )
    return fingerprint([[str(f.relative_to(package)), sha256_of(f)] for f in files])


def _heads(objective: nn.Module | None) -> dict[str, torch.Tensor]:
    """Weights of the throw-away heads that an objective has, in float32; all ranks call it."""
    found = {name: getattr(objective, name, None) for name in ("vision_head", "text_head")}
    return {
        f"{head}.{name}": value.to(torch.float32, copy=True)
        for head, module in found.items()
        if module is not None
        for name, value in full_weights(module)
    }


def save_stage(stage: Stage, target: Path, rows: list[dict[str, Any]], connector_is_text_head: bool) -> None:
    """Writes the stage's transformers folder: weights, processor and the log without its timings; all ranks call it.

    Stage 1 leaves the language model in float32; one type for the whole folder.
    """
    precision = torch.float32 if stage.name == "stage1" else DTYPES[stage.settings.precision]
    weights = {name: value.to(precision) for name, value in full_weights(stage.model) if is_main()}
    heads = _heads(stage.objective)
    if not is_main():
        return
    if connector_is_text_head:
        for name, value in heads.items():
            if name.startswith("text_head."):
                weights[name.replace("text_head", "model.connector")] = value.to(precision)
    if stage.name == "stage2" and stage.settings.lora is not None:
        weights = merged_weights(weights, stage.settings.lora)
    stage.model.config.dtype = precision
    with whole_folder(target) as folder:
        stage.model.eval().save_pretrained(folder, state_dict=weights)
        stage.processor.save_pretrained(folder)
        if heads:
            # One entry only: safetensors writes several in any order.
            save_file(heads, folder / HEADS, {"vision_layer": str(stage.settings.vision_layer)})
        write_jsonl(folder / "training_log.jsonl", map(without_measurements, rows))
    how = f"loss {rows[-1]['loss']:.4f} after {len(rows)} steps" if rows else "nothing to train in this recipe"
    say(f"{stage.name}: {how} -> {target}")
