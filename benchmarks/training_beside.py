"""What runs beside the steps of training: reading and decoding the next records, and writing checkpoints."""

import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lengths import PICTURE_TOKENS, draw
from PIL import Image
from training_ways import ATTENTION, OPTIMIZER, ROW_TOKENS, ROWS, build

from haplovl.data.conversation import TEMPLATES
from haplovl.data.loader import Batch, PackedLoader, PreparedRecords
from haplovl.data.prepare import ROW_GROUP, SCHEMA
from haplovl.files import sha256_of, write_json
from haplovl.model import HaploImageProcessor, HaploProcessor
from haplovl.settings import BatchSettings, ComputeProfile, StageMixture, StageSettings
from haplovl.train.checkpoint import RunFolder
from haplovl.train.engine import DTYPES, global_counts, make_engine, start_distributed, take_step
from haplovl.train.objectives import NextToken

RECORDS = 96
PICTURE_SIZE = (640, 480)
"""Width and height of a photograph as COCO has them: decoding and shrinking it is the loader's work."""
STEPS = 5
WORKERS = 2


def beside(precision: str) -> None:
    """Answers one line on stdin with `data_wait_share` and `checkpoint_stall_share`."""
    sys.stdin.readline()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(precision, Path(folder))), flush=True)


def measure(precision: str, folder: Path) -> dict[str, float]:
    """Shares of a step's time: waiting for data (with two workers), and what one checkpoint adds (1: a whole step)."""
    from haplovl.teacher_training import train_tokenizer

    tokenizer = train_tokenizer(["What is in the picture? It shows a red digit."], 300, "plain")
    processor = HaploProcessor(HaploImageProcessor(336, 14), tokenizer, chat_template=TEMPLATES["plain"].jinja())
    write_records(folder, processor)
    model = build(32_000, processor.image_token_id)
    model.set_attn_implementation({"": ATTENTION[precision], "text_config": ATTENTION[precision]})
    compute = ComputeProfile(name="benchmark", micro_batch_rows=1, loader_workers=WORKERS)
    start_distributed(compute)
    batch = BatchSettings(rows=ROWS, row_tokens=ROW_TOKENS)
    settings = StageSettings(steps=STEPS, precision=precision, batch=batch, optimizer=OPTIMIZER)
    objective = NextToken(model)
    engine = make_engine(objective, settings, compute, ROWS)

    def step(batches: list[Batch]) -> None:
        batches = [as_type(batch, DTYPES[precision]) for batch in batches]
        take_step(engine, batches, global_counts(objective, batches))

    loader = PackedLoader(PreparedRecords("train", processor, folder), batch, StageMixture(), 0, 1, workers=WORKERS)
    waits, times, batches = [], [], []
    began = time.perf_counter()
    for batches in loader.steps(0, STEPS):
        step(batches)
        waits.append(loader.waited)
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
    run = RunFolder(folder / "run", {})
    run.path.mkdir()
    return {
        # The first step has nobody computing beside it.
        "data_wait_share": sum(waits[1:]) / sum(times[1:]),
        "first_data_wait_seconds": waits[0],
        "checkpoint_stall_share": stall(lambda: step(batches), lambda number: run.save(engine, number), run),
    }


def as_type(batch: Batch, dtype: torch.dtype) -> Batch:
    """The model's precision for the pictures."""
    if batch.pixel_values is not None:
        batch.pixel_values = batch.pixel_values.to(dtype)
    return batch


def stall(step: Callable[[], None], save: Callable[[int], None], run: RunFolder) -> float:
    """How many steps' time a checkpoint takes: copying the state, and slower steps while a thread writes it."""

    def seconds(work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    plain, added = [], []
    for number in range(2):
        plain += [seconds(step) for _ in range(2)]
        added.append(seconds(lambda number=number: (save(number), step(), step(), run.finish_writing())))
    usual = statistics.median(plain)
    return (statistics.median(added) - 2 * usual) / usual


def write_records(folder: Path, processor: HaploProcessor) -> None:
    """Prepared shards of records like LLaVA-665K's, with photographs cut out of those that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(np.asarray(image)) for image in load_sample_images().images]
    random, rows = Random(0), []
    for number, sample in enumerate(draw(RECORDS)):
        text = max(2, sample.length - PICTURE_TOKENS * sample.images)
        ids = [random.randrange(5, 200) for _ in range(text)]
        if sample.images:
            ids.insert(1, processor.image_token_id)
        picture = [_photograph(random.choice(photographs), random)] * sample.images
        rows.append(
            {
                "id": str(number),
                "kind": "instruction" if sample.images else "text",
                "input_ids": ids,
                "spans": [len(ids) - min(sample.supervised, text - 1), len(ids)],
                "images": picture,
                "sizes": list(PICTURE_SIZE) * sample.images,
                "tokens": len(ids),
                "supervised": sample.supervised,
            }  # fmt: skip
        )
    path = folder / "train-00000.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, compression="zstd", row_group_size=ROW_GROUP)
    shard = {"file": path.name, "split": "train", "records": len(rows), "sha256": sha256_of(path)}
    write_json(folder / "manifest.json", {"shards": [shard]})


def _photograph(source: Image.Image, random: Random) -> bytes:
    """A JPEG file of a random part of a photograph."""
    left, top = random.randrange(source.width // 3), random.randrange(source.height // 3)
    part = source.crop((left, top, left + source.width * 2 // 3, top + source.height * 2 // 3)).resize(PICTURE_SIZE)
    file = io.BytesIO()
    part.save(file, "JPEG", quality=90)
    return file.getvalue()
