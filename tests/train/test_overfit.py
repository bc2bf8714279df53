"""`--overfit N`: passes where the records can be learnt, fails in plain words where they cannot, and writes nothing."""

import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from haplovl.data.validated import ImageFile, ValidatedRecord, write_validated
from haplovl.errors import UserError
from haplovl.files import RAW, VALIDATED, sha256_of
from haplovl.records import Record, Turn
from haplovl.settings import StageMixture
from haplovl.train.overfit import AIMS, FirstRecords, Verdict, in_words


def haplovl(*words, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "haplovl", *words], cwd=cwd, capture_output=True, text=True, timeout=200, env=environment
    )


def everything_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def project(tmp_path_factory, vision, language, processor, tiny_model_dir, request):
    """Prepared records whose answers only the picture tells, then two that contradict each other; a stage-1 model."""
    root = request.config.rootpath
    folder = tmp_path_factory.mktemp("project")
    params = yaml.safe_load((root / "params.yaml").read_text())
    for stage in ("stage1", "stage2"):
        params[stage].update(precision="fp32", batch={"rows": 4, "row_tokens": 96})
        params[stage]["optimizer"]["learning_rate"] = 2e-3
    params["prepare"]["max_tokens"] = 96
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.copytree(root / "infra", folder / "infra")
    for name, processes, zero in (("one", 1, 0), ("two", 2, 1)):
        text = f"name: {name}\nthreads: 1\nprocesses: {processes}\nzero_stage: {zero}\nmicro_batch_rows: 2\n"
        (folder / f"infra/compute/{name}.yaml").write_text(text)
    os.makedirs(folder / RAW / "a/media")
    os.makedirs(folder / VALIDATED)
    rows, noise = [], np.random.default_rng(0)
    answers = ["yes", "no", "top left", "two", "one", "four", "three", "7"]
    pictures = noise.integers(0, 255, (9, 32, 32, 3)).astype(np.uint8)
    for n in range(10):
        Image.fromarray(pictures[min(n, 8)]).save(folder / RAW / "a/media" / f"{n}.png")
        digest = sha256_of(folder / RAW / "a/media" / f"{n}.png")
        turns = (Turn("<image>\nWhich digit is red?", answers[n % len(answers)]),)
        record = Record(f"r{n}", (f"file:{n}.png",), turns, split="train")
        rows.append(ValidatedRecord(record, (ImageFile(f"file:{n}.png", digest, 32, 32),), "a"))
    write_validated(folder / VALIDATED, rows)
    vision.save_pretrained(folder / "models/teachers/vision")
    language.save_pretrained(folder / "models/teachers/language")
    processor.save_pretrained(folder / "models/teachers/processor")
    shutil.copytree(tiny_model_dir, folder / "models/stage1")
    done = haplovl("prepare", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


TWO = pytest.param("stage2", "two", 2, marks=pytest.mark.slow)


@pytest.mark.parametrize(("stage", "compute", "count"), [("stage1", "one", 8), ("stage2", "one", 8), TWO])
def test_records_are_learnt_by_heart(stage, compute, count, project):
    before = everything_below(project)
    done = haplovl("train", stage, "--overfit", str(count), "--compute", compute, cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"passed: {stage} knows {count} records by heart" in done.stdout
    assert everything_below(project) == before


def test_records_that_contradict_each_other_fail_in_plain_words(project):
    before = everything_below(project)
    done = haplovl("train", "stage2", "--overfit", "10", "--compute", "one", cwd=project)
    assert done.returncode == 1 and done.stderr == "", done.stdout + done.stderr
    assert "failed: stage2 did not learn 10 records by heart" in done.stdout
    assert "different answers" in done.stdout and "r0, r1" in done.stdout
    assert everything_below(project) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stage3", "--overfit", "8"], "there is no training stage 'stage3'"),
        (["stage2", "--overfit", "11", "--compute", "one"], "holds only 10 records"),
    ],
)
def test_what_cannot_be_tried_ends_with_one_sentence(words, expected, project):
    done = haplovl("train", *words, cwd=project)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and expected in done.stderr, done.stderr


def test_records_with_pictures_come_first_and_unused_kinds_stay_out():
    class Records(list):
        kinds = ["text", "caption", "instruction", "text", "instruction", "caption"]
        lengths = images = range(6)

    records = Records(range(6))
    both = StageMixture(instruction=1.0, caption=0.5, text=1.0)
    assert [FirstRecords(records, both, 3)[i] for i in range(3)] == [1, 2, 4]
    assert FirstRecords(records, both, 5).kinds == ["text", "caption", "instruction", "instruction", "caption"]
    assert FirstRecords(records, StageMixture(instruction=1.0, text=0.0), 2).lengths == [2, 4]
    with pytest.raises(UserError, match="only 4 records"):
        FirstRecords(records, StageMixture(instruction=1.0, text=1.0), 5)


def test_each_way_to_fail_names_what_to_look_at():
    names = tuple(f"r{n}" for n in range(20))
    flat = in_words("stage2", AIMS["next token"], Verdict(False, 500, 5.0, 4.9, names), 2e-5)
    assert "hardly fell" in flat and "2e-05" in flat and "and 4 more" in flat
    assert "no finite number" in in_words("stage2", AIMS["next token"], Verdict(False, 3, 5.0, math.nan, names), 2e-5)
    assert "stood still at a level" in in_words(
        "stage1", AIMS["distillation"], Verdict(False, 500, 1.0, 0.3, names), 2e-5
    )
