"""Trains one stage: builds model, objective, data and engine, then steps, logs and checkpoints until done."""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from haplovl.data.loader import Batch, PackedLoader, PreparedRecords
from haplovl.data.prepare import read_manifest
from haplovl.errors import UserError
from haplovl.files import (
    PREPARED,
    STAGE1,
    STAGE2,
    TEACHERS,
    require,
    sha256_of,
    sha256_of_folder,
    whole_folder,
    write_json,
)
from haplovl.model import HaploForConditionalGeneration, HaploProcessor
from haplovl.model.inherit import inherit
from haplovl.progress import reporter
from haplovl.records import write_jsonl
from haplovl.settings import ComputeProfile, Params, Stage1Settings, Stage2Settings, fingerprint
from haplovl.teachers import load_language, load_vision, seed_everything
from haplovl.train.checkpoint import RunFolder, barrier, is_main, say
from haplovl.train.engine import DTYPES, global_counts, make_engine, reduce_sum, start_distributed, take_step
from haplovl.train.launch import EXIT_PREEMPTED, STOP_SIGNALS, adopt_slurm, launch
from haplovl.train.objectives import Distillation, InstructionTuning
from haplovl.train.optim import learning_rate
from haplovl.train.state import full_weights
from haplovl.train.validation import Validation

OUTPUTS = {"stage1": STAGE1, "stage2": STAGE2}


@dataclass
class Stage:
    """Everything a stage needs apart from the engine."""

    name: str
    settings: Stage1Settings | Stage2Settings
    model: HaploForConditionalGeneration
    objective: nn.Module
    processor: HaploProcessor
    identity: dict[str, Any]
    """What decides the result, by name."""


def train_stage(name: str, params: Params, compute: ComputeProfile, resume_from: Path | None = None) -> None:
    """Trains `stage1` or `stage2` and writes its transformers folder; continues a killed run by itself.

    `resume_from` is a checkpoint of this very run to go on from, instead of the newest one.

    Raises:
        UserError: an unknown stage, missing inputs, settings or a checkpoint that do not fit, or a loss that is no
            number.
    """
    if name not in OUTPUTS:
        raise UserError(f"there is no training stage '{name}'; choose {' or '.join(OUTPUTS)}")
    adopt_slurm()
    if compute.processes > 1 and "RANK" not in os.environ:
        explicit = ["--resume-from", str(resume_from)] if resume_from else []
        launch(["train", name, "--compute", compute.name, *explicit], compute.processes)
    device = start_distributed(compute)
    try:
        stage = _build(name, params)
        # By name: the pre-decoder has a configuration, but is no transformers model of its own to be asked.
        stage.model.set_attn_implementation({"": compute.attention, "text_config": compute.attention})
        if compute.activation_checkpointing:
            stage.model.gradient_checkpointing_enable()
        folder = RunFolder.of(name, stage.identity)
        rows = _run(stage, folder, params.seed, compute, device, resume_from)
        _save(stage, rows, params.model.connector == "text_head")
        folder.finish()
        barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _build(name: str, params: Params) -> Stage:
    """Model, objective and the key of the run's state."""
    seed_everything(params.seed)
    manifest = sha256_of(require(PREPARED / "manifest.json", "prepare"))
    settings: Any
    if name == "stage1":
        settings, start = params.stage1, require(TEACHERS, "teachers")
        processor = HaploProcessor.from_pretrained(TEACHERS / "processor")
        vision = load_vision(TEACHERS / "vision")
        try:
            model = inherit(
                vision,
                load_language(TEACHERS / "language"),
                params.model,
                processor.image_token_id,
                len(processor.tokenizer),
                processor.video_token_id,
            )
        except ValueError as error:
            raise UserError(f"the model cannot be built from its teachers: {error}") from None
        # Generation must end where training ended its answers.
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        objective: nn.Module = Distillation(model, vision, settings.vision_layer, settings.temperature)
    else:
        settings, start = params.stage2, require(STAGE1, "train stage1")
        processor = HaploProcessor.from_pretrained(STAGE1)
        model = HaploForConditionalGeneration.from_pretrained(STAGE1, dtype=torch.float32)
        objective = InstructionTuning(model)
    identity = {
        name: settings.model_dump(mode="json"),
        "seed": params.seed,
        "model": params.model.model_dump(mode="json"),
        "data (manifest)": manifest,
        "initial weights": sha256_of_folder(start),
        "code": _code_hash(),
    }
    return Stage(name, settings, model.train(), objective.train(), processor, identity)


def _code_hash() -> str:
    """Hash of the code that decides a training result, so that no run continues a state of other code."""
    package = Path(__file__).parent.parent
    files = sorted(
        [package / "pictures.py", *package.glob("model/*.py"), *package.glob("train/*.py"), *package.glob("data/*.py")]
    )
    return fingerprint([[str(f.relative_to(package)), sha256_of(f)] for f in files])


def _run(
    stage: Stage,
    folder: RunFolder,
    seed: int,
    compute: ComputeProfile,
    device: torch.device,
    resume_from: Path | None,
) -> list[dict[str, Any]]:
    """Steps from the last checkpoint to the end; returns the whole log."""
    settings = stage.settings
    loader = _loader("train", stage, seed, compute)
    held_out = read_manifest()["totals"]["validation"]["records"]
    validation = Validation(_loader("validation", stage, seed, compute)) if held_out else None
    if isinstance(stage.objective, Distillation):
        stage.objective.frozen_to(device, DTYPES[settings.precision])
    engine = make_engine(stage.objective, settings, compute, loader.micro_batches)
    step = folder.resume(engine, seed, resume_from)
    rows = folder.keep_log(step)
    say(f"{stage.name}: {'continuing after step ' + str(step) if step else 'starting'}, state in {folder.path}")
    stop = _StopSignals()
    total = settings.steps
    with reporter(stage.name, total, step) as report, folder.log.open("a", encoding="utf-8") as log:
        for batches in loader.steps(step, total):
            batches = [batch.to(device) for batch in batches]
            try:
                row = _step(stage, engine, batches, step)
            except FloatingPointError as error:
                raise _not_finite(stage, engine, folder, batches, step, error) from None
            step += 1
            rows.append(row)
            if is_main():
                log.write(json.dumps(row) + "\n")
                log.flush()
                report.update(step, f"loss {row['loss']:.3f} {row['tokens_per_s']:,.0f} tokens/s")
            stopping = step < total and stop.asked_anywhere()
            if stopping or step == total or step % settings.checkpoint_every == 0:
                # A job that must stop has little time left, so it does without the validation loss.
                score = validation.loss(engine, stage.objective, device) if validation and not stopping else None
                folder.save(engine, step, score)
            if stopping:
                folder.finish_writing()
                say(f"stopped by signal after step {step}; the same command goes on from here")
                sys.exit(EXIT_PREEMPTED)
    folder.finish_writing()
    return rows


def _loader(split: str, stage: Stage, seed: int, compute: ComputeProfile) -> PackedLoader:
    return PackedLoader(
        PreparedRecords(split, stage.processor),
        stage.settings.batch,
        stage.settings.mixture,
        seed,
        compute.micro_batch_rows,
        dist.get_rank(),
        dist.get_world_size(),
        stage.settings.curriculum,
    )


def _step(stage: Stage, engine: Any, batches: list[Batch], step: int) -> dict[str, Any]:
    """One optimiser step and its log row (`step` counts from 1 in the log).

    Raises:
        FloatingPointError: a loss or gradient that is no finite number; the weights have not moved.
    """
    began = time.perf_counter()
    rate = learning_rate(stage.settings.optimizer, step, stage.settings.steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    counts = global_counts(stage.objective, batches)
    parts, norm = take_step(engine, batches, counts)
    seconds = time.perf_counter() - began
    tokens = sum(int((batch.document_ids >= 0).sum()) for batch in batches) * dist.get_world_size()
    return {
        "step": step + 1,
        "loss": sum(parts.values()),
        **({} if list(parts) == ["loss"] else parts),
        "learning_rate": rate,
        "grad_norm": norm,
        "supervised_tokens": int(max(counts.values())),
        "tokens_per_s": tokens / seconds,
    }


def _not_finite(
    stage: Stage, engine: Any, folder: RunFolder, batches: list[Batch], step: int, error: FloatingPointError
) -> UserError:
    """Keeps what is needed to find out why a step has no finite loss or gradient: its records and the state before."""
    ids = [name for batch in batches for name in batch.record_ids]
    found = folder.path / f"bad_batch_{dist.get_rank()}.json"
    write_json(found, {"step": step + 1, "error": str(error), "records": ids})
    folder.save(engine, step)
    folder.finish_writing()
    barrier()
    return UserError(
        f"{stage.name} stopped before step {step + 1}: {error}; its records are in {folder.path}/bad_batch_*.json and "
        f"the state before it in {folder.path}/step-{step}: look at the records (haplovl inspect ID), or lower "
        f"{stage.name}.optimizer.learning_rate"
    )


class _StopSignals:
    """Remembers SIGTERM, SIGUSR1 and Ctrl-C, so that the step in progress can end and be saved."""

    def __init__(self) -> None:
        self.asked = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def asked_anywhere(self) -> bool:
        """Whether any rank was asked: all of them must stop after the same step."""
        return bool(reduce_sum(torch.tensor([float(self.asked)])).item())


def _save(stage: Stage, rows: list[dict[str, Any]], connector_is_text_head: bool) -> None:
    """Writes the stage's transformers folder: weights, processor and the log without its timings.

    Stage 1 leaves the language model in float32; one type for the whole folder.
    """
    precision = torch.float32 if stage.name == "stage1" else DTYPES[stage.settings.precision]
    weights = {name: value.to(precision) for name, value in full_weights(stage.model) if is_main()}
    heads = dict(full_weights(stage.objective.text_head)) if isinstance(stage.objective, Distillation) else {}
    if not is_main():
        return
    if heads and connector_is_text_head:
        weights |= {f"model.connector.{name}": value.to(precision) for name, value in heads.items()}
    stage.model.config.dtype = precision
    with whole_folder(OUTPUTS[stage.name]) as folder:
        stage.model.eval().save_pretrained(folder, state_dict=weights)
        stage.processor.save_pretrained(folder)
        write_jsonl(folder / "training_log.jsonl", ({k: v for k, v in r.items() if k != "tokens_per_s"} for r in rows))
    say(f"{stage.name}: loss {rows[-1]['loss']:.4f} after {len(rows)} steps -> {OUTPUTS[stage.name]}")
