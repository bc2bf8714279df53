"""One rank of a distributed training run, as tests need it: `python worker.py JOB.json`.

The job names a model folder and the runs to make, one after the other; rank 0 writes for each of them the gradients of
the first step, the losses of all steps and the weights at the end.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import CLIPVisionModel

from haplovl.data.loader import IGNORE, Batch
from haplovl.model import HaploForConditionalGeneration
from haplovl.model.layout import single_tile
from haplovl.settings import BatchSettings, ComputeProfile, OptimizerSettings, StageSettings
from haplovl.train.checkpoint import RunFolder
from haplovl.train.engine import accumulate, global_counts, make_engine, start_distributed, update
from haplovl.train.objectives import Distillation, NextToken
from haplovl.train.state import full_weights

ROWS, LENGTH = 4, 72
PICTURES = ((0,), (1, 2), (0,), (3,), (2, 1), (0,), (0,), (1,))
"""Pictures in the documents of a row: some rows have none, so that some ranks have none."""


def row(config, generator, pictures):
    """One row of documents with pictures and padding at its end."""
    ids, labels, documents = torch.zeros(LENGTH, dtype=torch.long), torch.full((LENGTH,), IGNORE), []
    position, tokens = 0, config.tokens_per_image
    for number, count in enumerate(pictures):
        words = int(torch.randint(6, 12, (), generator=generator))
        size = count * tokens + words
        if position + size > LENGTH:
            break
        ids[position : position + count * tokens] = config.image_token_id
        text = torch.randint(5, 200, (words,), generator=generator)
        ids[position + count * tokens : position + size] = text
        labels[position + size - words // 2 : position + size] = text[words - words // 2 :]
        documents += [number] * size
        position += size
    documents += [-1] * (LENGTH - position)
    placed = int((ids == config.image_token_id).sum()) // tokens
    pixels = torch.randn(placed, 3, 32, 32, generator=generator) if placed else None
    return ids, labels, torch.tensor(documents), pixels, placed


def batches(config, step, rank, world):
    """The micro-batches of one row of a rank: contiguous rows of the step."""
    rows = []
    for index in range(ROWS):
        generator = torch.Generator().manual_seed(100 * step + index)
        rows.append(row(config, generator, PICTURES[(step + index) % len(PICTURES)]))
    own = rows[rank * ROWS // world : (rank + 1) * ROWS // world]
    return [
        Batch(ids[None], labels[None], documents[None], pixels, [single_tile(4, 4)] * placed, ["x"])
        for ids, labels, documents, pixels, placed in own
    ]


def objective_of(job):
    torch.manual_seed(0)
    model = HaploForConditionalGeneration.from_pretrained(job["model"], dtype=torch.float32).train()
    if job.get("checkpointing"):
        model.gradient_checkpointing_enable()
    if job["objective"] == "instruction":
        return model, NextToken(model)
    return model, Distillation(model, CLIPVisionModel.from_pretrained(job["vision"]), -1, 0.1)


def run(job, part, settings):
    """One training run; `part` names the ZeRO stage, the file to write, and a folder to save to or to resume from."""
    from deepspeed.utils import safe_get_full_grad

    rank, world, zero = dist.get_rank(), dist.get_world_size(), part["zero"]
    compute = ComputeProfile(name="x", micro_batch_rows=1, zero_stage=zero, offload=job["offload"] if zero else "none")
    model, objective = objective_of(job)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05) if job["optimizer"] == "sgd" else None
    engine = make_engine(objective, settings, compute, ROWS // world, optimizer)
    losses, gradients = [], {}
    start = RunFolder(Path(part["resume"]), {}).resume(engine, 0) if "resume" in part else 0
    for step in range(start, settings.steps):
        own = batches(model.config, step, rank, world)
        losses.append(sum(accumulate(engine, own, global_counts(objective, own)).values()))
        if step == 0:
            gradients = {name: safe_get_full_grad(p).clone() for name, p in objective.named_parameters()}
        update(engine)
        if step + 1 == settings.steps // 2 and "save" in part:
            folder = RunFolder(Path(part["save"]), {})
            Path(part["save"]).mkdir(exist_ok=True)
            folder.save(engine, step + 1)
            folder.finish_writing()
    weights = {name: value.clone() for name, value in full_weights(objective)}
    if rank == 0:
        torch.save({"start": start, "losses": losses, "gradients": gradients, "weights": weights}, part["out"])
    engine.destroy()


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    settings = StageSettings(
        steps=job["steps"],
        precision=job["precision"],
        batch=BatchSettings(rows=ROWS, row_tokens=LENGTH),
        optimizer=OptimizerSettings(learning_rate=job["rate"]),
    )
    torch.set_num_threads(1)
    start_distributed(ComputeProfile(name="x", micro_batch_rows=1))
    for part in job["runs"]:
        run(job, part, settings)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
