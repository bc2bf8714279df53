"""Trains one stage: builds model, objective, data and engine, then steps, logs and checkpoints until done."""

import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from haplovl.data.loader import Batch, PackedLoader, PreparedRecords
from haplovl.data.prepare import read_manifest
from haplovl.errors import UserError
from haplovl.files import write_json
from haplovl.settings import ComputeProfile, Params, StageSettings
from haplovl.tracking import code_version, description, grouping
from haplovl.train.alone import alone_in
from haplovl.train.checkpoint import RunFolder, barrier, is_main, say
from haplovl.train.engine import (
    DTYPES,
    accumulate,
    global_counts,
    make_engine,
    reduce_sum,
    require_gpus,
    start_distributed,
    update,
)
from haplovl.train.flops import Work
from haplovl.train.image_path import attention_to_images, patch_gradient
from haplovl.train.launch import EXIT_PREEMPTED, StopSignals, adopt_slurm, launch
from haplovl.train.monitor import Monitor, StepFigures, monitor
from haplovl.train.objectives import Distillation
from haplovl.train.optim import learning_rate, set_learning_rate
from haplovl.train.places import places
from haplovl.train.stage import OUTPUTS, Stage, build_stage, save_stage
from haplovl.train.validation import Validation


def train_stage(name: str, params: Params, compute: ComputeProfile, resume_from: Path | None = None) -> None:
    """Trains `stage1` or `stage2` and writes its transformers folder; continues a killed run by itself.

    `resume_from` is a checkpoint of this very run to go on from, instead of the newest one.

    Raises:
        UserError: an unknown stage, missing inputs, settings or a checkpoint that do not fit, or a loss that is no
            number.
    """
    if name not in OUTPUTS:
        raise UserError(f"there is no training stage '{name}'; choose {' or '.join(OUTPUTS)}")
    if not isinstance(getattr(params, name), StageSettings):
        if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:  # one process has all there is to do
            save_stage(build_stage(name, params), OUTPUTS[name], [], False)
        return
    adopt_slurm()
    if compute.processes > 1 and "RANK" not in os.environ:
        require_gpus(compute, compute.processes)
        explicit = ["--resume-from", str(resume_from)] if resume_from else []
        launch(["train", name, "--compute", compute.name, *explicit], compute.processes)
    device = start_distributed(compute)
    try:
        stage = build_stage(name, params)
        # By name: the pre-decoder has a configuration, but is no transformers model of its own to be asked.
        stage.model.set_attn_implementation({"": compute.attention, "text_config": compute.attention})
        if compute.activation_checkpointing:
            stage.model.gradient_checkpointing_enable()
        with alone_in(RunFolder.named(name, stage.identity).path):
            folder = RunFolder.of(name, stage.identity)
            rows = _run(stage, folder, params, compute, device, resume_from)
            # A job's result waits beside its state: DVC may delete the stage's out before anybody asks for it.
            target = folder.result if "HAPLOVL_JOB" in os.environ else OUTPUTS[name]
            save_stage(stage, target, rows, params.model.connector == "text_head")
            folder.finish(target)
            barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _run(
    stage: Stage,
    folder: RunFolder,
    params: Params,
    compute: ComputeProfile,
    device: torch.device,
    resume_from: Path | None,
) -> list[dict[str, Any]]:
    """Steps from the last checkpoint to the end; returns the whole log."""
    seed = params.seed
    loader = _loader("train", stage, seed, compute)
    held_out = read_manifest()["totals"]["validation"]["records"]
    validation = Validation(_loader("validation", stage, seed, compute)) if held_out else None
    if isinstance(stage.objective, Distillation):
        stage.objective.frozen_to(device, DTYPES[stage.settings.precision])
    engine = make_engine(stage.objective, stage.settings, compute, loader.micro_batches)
    step = folder.resume(engine, seed, resume_from)
    say(f"{stage.name}: {'continuing after step ' + str(step) if step else 'starting'}, state in {folder.path}")
    stop, total, every = StopSignals(), stage.settings.steps, stage.settings.checkpoint_every
    earlier, tried_again = folder.keep_log(step), False
    unscored = validation and earlier and step % every == 0 and "validation_loss" not in earlier[-1]
    # The main rank decides for all: on a mounted bucket the others may see an older log.
    if validation and reduce_sum(torch.tensor([float(bool(unscored) and is_main())])).item():
        # A stop signal left no time for it; the run is to end as if nobody had stopped it.
        score = validation.loss(engine, stage.objective, device)
        if score is not None:
            folder.note_validation(step, score, earlier)
    with monitor(
        stage.name, total, folder.path, folder.key, device, rank=dist.get_rank(), peak_tflops=compute.peak_tflops,
        earlier=earlier, config=_description(stage, params, compute, folder, step) if is_main() else {},
        grouping=grouping(params, stage.name),
    ) as watch:  # fmt: skip
        ended = time.perf_counter()
        for batches in loader.steps(step, total):
            try:
                figures, looks = _step(stage, engine, batches, step, device, watch)
            except FloatingPointError as error:
                score = watch.rows[-1].get("validation_loss") if watch.rows else None
                raise _not_finite(stage, engine, folder, batches, step, score, error) from None
            step += 1
            seconds = time.perf_counter() - ended
            lost = folder.write_error()
            mine = [figures[name] for name in ("tokens", "total_flops", "records")]
            mine += [int(stop.asked), int(lost is not None)]
            summed = reduce_sum(torch.tensor(mine, dtype=torch.float64)).tolist()
            tokens, flops, records, stops, failed = map(int, summed)
            if failed and tried_again:
                raise lost or OSError(errno.EIO, "another rank could not write its part of a checkpoint")
            stopping = bool(stops) and step < total  # all ranks after the same step
            due = step == total or step % every == 0
            saving = stopping or due or bool(failed)
            if failed:
                say(f"a checkpoint could not be written ({lost or 'by another rank'}); trying again after step {step}")
            tried_again = bool(failed) or (tried_again and not saving)
            # A job that must stop has little time left, so it does without the validation loss.
            score = validation.loss(engine, stage.objective, device) if validation and due and not stopping else None
            looks |= {} if score is None else {"validation_loss": score}
            figures |= {
                "tokens": tokens,
                "total_flops": flops,
                "records": records,
                "seconds": seconds,
                "wait": loader.waited,
            }
            watch.record(StepFigures(**figures), _ids(batches), looks)
            if saving:
                folder.save(engine, step, score)
            if stopping:
                folder.finish_writing()
                barrier()  # a launcher ends the others once the first has gone
                without = " without --resume-from" if resume_from else ""
                say(f"stopped by signal after step {step}; the same command{without} goes on from here")
                sys.exit(EXIT_PREEMPTED)
            ended = time.perf_counter()
    folder.finish_writing()
    return watch.rows


def _description(stage: Stage, params: Params, compute: ComputeProfile, folder: RunFolder, step: int) -> dict[str, Any]:
    """What people and `haplovl compare` need to know about the run: settings, data, code and where it runs."""
    return {
        "stage": stage.name,
        **description(params),
        "initial_weights_sha256": stage.identity["initial weights"],
        "code": code_version(stage.identity["code"]),
        "compute": compute.model_dump(mode="json"),
        "places": places(folder.path, step, compute),
    }


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
        compute.loader_workers,
    )


def _step(
    stage: Stage, engine: Any, batches: list[Batch], step: int, device: torch.device, watch: Monitor
) -> tuple[dict[str, Any], dict[str, float]]:
    """One optimiser step: its figures (`step` counts from 1), and those of a look at the image path where one is due.

    Raises:
        FloatingPointError: a loss or gradient that is no finite number; the weights have not moved.
    """
    work = sum((Work.of(batch, stage.model.config) for batch in batches), Work())
    rate = learning_rate(stage.settings.optimizer, step, stage.settings.steps)
    set_learning_rate(engine.optimizer, rate)
    counts, flops = global_counts(stage.objective, batches), stage.flops.of(work)
    moved = [batch.to(device) for batch in batches]
    losses = accumulate(engine, moved, counts)
    due = watch.watch.due(step + 1)
    patches = patch_gradient(engine.module) if due else None
    norm = update(engine)
    looks = {}
    if due:
        looks = attention_to_images(stage.model, moved[0], engine.module)
        if patches is not None and work.patches and norm:
            looks["patch_gradient_share"] = patches / norm
    figures = {
        "step": step + 1,
        "losses": losses,
        "weights": stage.objective.weights,
        "learning_rate": rate,
        "grad_norm": norm,
        "supervised_tokens": int(max(counts.values())),
        "tokens": work.tokens,
        "records": len(_ids(batches)),
        "flops": flops.model,
        "total_flops": flops.model + flops.teachers,
    }
    return figures, looks


def _ids(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.record_ids]


def _not_finite(
    stage: Stage,
    engine: Any,
    folder: RunFolder,
    batches: list[Batch],
    step: int,
    score: float | None,
    error: FloatingPointError,
) -> UserError:
    """Keeps what is needed to find out why a step has no finite loss or gradient: its records and the state before."""
    found = folder.path / f"bad_batch_{dist.get_rank()}.json"
    write_json(found, {"step": step + 1, "error": str(error), "records": _ids(batches)})
    folder.save(engine, step, score)
    folder.finish_writing()
    barrier()
    return UserError(
        f"{stage.name} stopped before step {step + 1}: {error}; its records are in {folder.path}/bad_batch_*.json and "
        f"the state before it in {folder.path}/step-{step}: look at the records, or lower "
        f"{stage.name}.optimizer.learning_rate"
    )
