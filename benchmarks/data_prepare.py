"""Preparation and loader: records a second, memory and time to the first batch at a million records.

    python benchmarks/data_prepare.py [--json FILE] [--photographs N] [--million N]

Every part runs in a process of its own, in a folder that is deleted afterwards. Photographs are synthetic: smooth
colours with noise, 640×480, JPEG of about 50 KB. Bare decoding is what the loader has to do for a picture and nothing
else: the same image processor, on as many threads, with the files' bytes in memory already. Memory is the sum of the
resident sets of all processes, sampled every 50 ms: pages that several share count for each.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

TEXT = "where is the red digit left of top what colour has picture many are there seven two blue one green"
WORDS = TEXT.split()
THREADS = 2
WIDTH, HEIGHT = 640, 480
ROW_TOKENS = 4096
IMAGE_SIZE, PATCH_SIZE = 336, 14
FAR_STEP = 10_000_000
DIFFERENT = 64
"""Different photographs; every record's file is one of them with a comment of its own."""


def photograph(seed: int) -> bytes:
    """A JPEG file of 640×480 pixels and about 50 KB."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = smooth + random.normal(0, 9, smooth.shape)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=80)
    return file.getvalue()


def words(random: Random, count: int) -> str:
    """A text of `count` words."""
    return " ".join(random.choices(WORDS, k=count))


def write_project(records: int, with_pictures: bool) -> Any:
    """A project in this folder with validated records and a processor; returns its settings."""
    from haplovl.data.conversation import TEMPLATES
    from haplovl.data.validated import ImageFile, ValidatedRecord, write_validated
    from haplovl.files import RAW, TEACHERS, VALIDATED
    from haplovl.model import HaploImageProcessor, HaploProcessor
    from haplovl.records import Record, Turn
    from haplovl.settings import load_params
    from haplovl.teacher_training import train_tokenizer

    media = RAW / "photographs/media"
    media.mkdir(parents=True)
    VALIDATED.mkdir(parents=True)
    files = [photograph(seed) for seed in range(DIFFERENT)] if with_pictures else []

    def images(number: int) -> tuple[ImageFile, ...]:
        if not files:
            return ()
        data = files[number % DIFFERENT] + b"%09d" % number  # after the end of a JPEG: read, not decoded
        (media / f"{number}.jpg").write_bytes(data)
        return (ImageFile(f"file:{number}.jpg", hashlib.sha256(data).hexdigest(), WIDTH, HEIGHT),)

    def rows() -> Iterator[ValidatedRecord]:
        random = Random("records")
        for number in range(records):
            own = images(number)
            first = "<image>\n" if own else ""
            turns = tuple(Turn((first if not turn else "") + words(random, 12), words(random, 20)) for turn in range(2))
            yield ValidatedRecord(Record(f"r{number}", tuple(i.path for i in own), turns, "train"), own, "photographs")

    write_validated(VALIDATED, rows())
    tokenizer = train_tokenizer([words(Random(1), 200)], 400, "plain")
    processor = HaploProcessor(
        HaploImageProcessor(IMAGE_SIZE, PATCH_SIZE), tokenizer, chat_template=TEMPLATES["plain"].jinja()
    )
    processor.save_pretrained(TEACHERS / "processor")
    params = load_params(Path(__file__).parents[1] / "params.yaml")
    prepare = params.prepare.model_copy(update={"max_tokens": ROW_TOKENS})
    return params.model_copy(update={"prepare": prepare})


class Peak:
    """The most memory that this process and its children had at once, in GiB."""

    def __init__(self) -> None:
        self.gib = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        this = psutil.Process()
        while not self._over.wait(0.05):
            total = 0
            for process in (this, *this.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            self.gib = max(self.gib, total / 2**30)


def prepare_photographs(records: int) -> dict[str, float]:
    """Records a second with the pictures copied as they are; again with one percent of new records; and the loader."""
    from haplovl.data.prepare import prepare
    from haplovl.data.validated import read_validated, write_validated
    from haplovl.files import VALIDATED

    params = write_project(records, with_pictures=True)
    rows = list(read_validated())
    write_validated(VALIDATED, rows[: records - records // 100])
    first = timed(lambda: prepare(params))
    write_validated(VALIDATED, rows)
    again = timed(lambda: prepare(params))
    figures = {
        "prepare_records_per_s": (records - records // 100) / first,
        "prepare_one_percent_more_s": again,
    }
    return figures | loader_share()


def loader_share(seconds: float = 20.0) -> dict[str, float]:
    """Pictures a second of the loader, and the same as shares of bare decoding and of Pillow's decoder alone."""
    import pyarrow.parquet as pq
    import torch

    from haplovl.data.loader import PackedLoader, PreparedRecords
    from haplovl.files import PREPARED, TEACHERS
    from haplovl.model import HaploProcessor
    from haplovl.settings import BatchSettings, StageMixture

    torch.set_num_threads(1)
    processor = HaploProcessor.from_pretrained(TEACHERS / "processor")
    table = pq.ParquetFile(next(iter(sorted(PREPARED.glob("train-*.parquet"))))).read_row_groups(range(10))
    pictures = [data for images in table["images"].to_pylist() for data in images]

    def bare(work: Callable[[bytes], Any]) -> float:
        done, began = 0, time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            while time.perf_counter() - began < seconds / 3:
                done += len(list(pool.map(work, pictures)))
        return done / (time.perf_counter() - began)

    # In turn, several times, since other work on the machine comes and goes.
    records = PreparedRecords("train", processor)
    batch = BatchSettings(rows=2 * THREADS, row_tokens=ROW_TOKENS)
    loader = PackedLoader(records, batch, StageMixture(caption=1.0), 1, 1, workers=THREADS)
    decoded, loaded, plain = [], [], []
    for turn in range(3):
        plain.append(bare(lambda data: Image.open(io.BytesIO(data)).convert("RGB")))
        decoded.append(bare(lambda data: processor.image_processor([data], return_tensors="pt")))
        seen, began = 0, 0.0
        for number, step in enumerate(loader.steps(100 * turn, 100_000)):
            if number == 1:  # the first step waited for the threads to start
                seen, began = 0, time.perf_counter()
            seen += sum(len(one.image_grids) for one in step)
            if number > 2 and time.perf_counter() - began > seconds / 3:
                break
        loaded.append(seen / (time.perf_counter() - began))
    loaded_, decoded_, plain_ = (float(np.median(values)) for values in (loaded, decoded, plain))
    return {
        "loader_pictures_per_s": loaded_,
        "bare_decode_pictures_per_s": decoded_,
        "pillow_pictures_per_s": plain_,
        "loader_decode_share": loaded_ / decoded_,
    }


def prepare_million(records: int) -> dict[str, float]:
    """Memory and time of preparing text-only records, and a process's time to the first batch of them."""
    params = write_project(records, with_pictures=False)
    from haplovl.data.prepare import prepare

    with Peak() as peak:
        seconds = timed(lambda: prepare(params))
    command = [
        sys.executable,
        __file__,
        "--part",
        "first_batch",
    ]
    fresh = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    return {
        "prepare_million_peak_gib": peak.gib,
        "prepare_text_records_per_s": records / seconds,
        **fresh,
    }


def first_batch(_: int) -> dict[str, float]:
    """From opening the records to a batch: the first one, one thousands of epochs on, and the same once more."""
    from haplovl.data.loader import PackedLoader, PreparedRecords
    from haplovl.files import TEACHERS
    from haplovl.model import HaploProcessor
    from haplovl.settings import BatchSettings, StageMixture

    processor = HaploProcessor.from_pretrained(TEACHERS / "processor")

    def first(step: int) -> float:
        began = time.perf_counter()
        batch = BatchSettings(rows=8, row_tokens=ROW_TOKENS)
        loader = PackedLoader(PreparedRecords("train", processor), batch, StageMixture(), 1, 2, workers=THREADS)
        next(loader.steps(step, step + 10))
        return time.perf_counter() - began

    return {"first_batch_s": first(0), "far_batch_s": first(FAR_STEP), "far_batch_again_s": first(FAR_STEP)}


def timed(work: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


PARTS = {"photographs": prepare_photographs, "million": prepare_million, "first_batch": first_batch}


def measure(part: str, records: int) -> dict[str, float]:
    """Runs one part in a process and a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="haplovl-") as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--records", str(records)]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"the part '{part}' failed")
        return json.loads(done.stdout.splitlines()[-1])


def figures(photographs: int = 20_000, million: int = 1_000_000) -> dict[str, float]:
    """All figures of preparation and loader."""
    found = measure("photographs", photographs) if photographs else {}
    return found | (measure("million", million) if million else {})


def main() -> None:
    """Measures and prints; or is one part's process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--photographs", type=int, default=20_000, help="records with a photograph (default: 20000)")
    parser.add_argument("--million", type=int, default=1_000_000, help="text-only records (default: 1000000)")
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--records", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.records)))
        return
    found = figures(options.photographs, options.million)
    for name, value in found.items():
        print(f"{name:30} {value:10.3f}")
    if options.json:
        settings = {"photographs": options.photographs, "million": options.million, "cores": os.cpu_count()}
        Path(options.json).write_text(json.dumps({"figures": found, "settings": settings}, indent=2) + "\n")


if __name__ == "__main__":
    main()
