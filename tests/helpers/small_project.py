"""A small project with tiny teachers and prepared records, in which the commands of training run for real."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from PIL import Image

from haplovl.data.validated import ImageFile, ValidatedRecord, write_validated
from haplovl.files import RAW, VALIDATED, sha256_of
from haplovl.records import Record, Turn

ROOT = Path(__file__).resolve().parents[2]
PROFILES = {"one": (1, 0, 1), "two": (2, 1, 2), "three": (2, 3, 1)}
"""Compute profiles of a test project: processes, ZeRO stage, rows of a micro-batch."""


def make_project(folder, vision, language, processor, stage):
    """Teachers and prepared records in `folder`, ready to train.

    Text takes the paper's path. `stage` are settings of both stages. A fifth of the records have no picture; ten are
    held out for validation.
    """
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["model"].update(text_path="connector", connector="text_head")
    for name in ("stage1", "stage2"):
        params[name].update(curriculum=[], **stage)
    params["prepare"]["max_tokens"] = stage["batch"]["row_tokens"]
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.copytree(ROOT / "infra", folder / "infra")
    for name, (processes, zero, rows) in PROFILES.items():
        profile = {"device": "cpu", "processes": processes, "zero_stage": zero, "micro_batch_rows": rows}
        (folder / f"infra/compute/{name}.yaml").write_text(yaml.safe_dump({"name": name, "threads": 1, **profile}))
    write_records(folder)
    vision.save_pretrained(folder / "models/teachers/vision")
    language.save_pretrained(folder / "models/teachers/language")
    processor.save_pretrained(folder / "models/teachers/processor")
    done = subprocess.run([sys.executable, "-m", "haplovl", "prepare"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def write_records(folder):
    """Ninety records with pictures of one colour, some of them text alone, ten of them for validation."""
    os.makedirs(folder / RAW / "a/media")
    os.makedirs(folder / VALIDATED)
    rows = []
    for n in range(90):
        split = "validation" if n >= 80 else "train"
        if n % 5 == 4:
            record = Record(f"r{n}", (), (Turn("Is one and one two?", "yes"), Turn("Is it 7?", "no")), split=split)
            rows.append(ValidatedRecord(record, (), "a"))
            continue
        Image.new("RGB", (32, 32), (n * 2, 255 - n * 2, n)).save(folder / RAW / "a/media" / f"{n}.png")
        digest = sha256_of(folder / RAW / "a/media" / f"{n}.png")
        turns = (Turn("<image>\nWhere is the 3?", "top left"), Turn("Is there a 7?", "yes" if n % 2 else "no"))
        record = Record(f"r{n}", (f"file:{n}.png",), turns, split=split)
        rows.append(ValidatedRecord(record, (ImageFile(f"file:{n}.png", digest, 32, 32),), "a"))
    write_validated(folder / VALIDATED, rows)
