"""How fast data is validated, prepared and loaded, beside the decoder's own speed, and what a million records take.

    python benchmarks/data.py [--json FILE] [--photographs N] [--texts N] [--processes N]

Photographs are synthetic: 640x480 JPEGs of about 50 KB, each a file of its own, with two turns of text per record.
Validation is timed as a whole: reading, decoding to the last pixel, hashing (sha256 and perceptual), comparing, Great
Expectations, data docs, writing. The ceiling is the better of two runs, before and after, of as many processes that
read and decode the same files and do nothing else. `validate_decode_share` compares it with the speed of validation
beyond its fixed part, which a few records show (the suite, the docs: `validate_start_seconds`);
`validate_decode_cpu_share` compares processor time, which other work on the machine moves less. Memory is the sum over
all processes, sampled every tenth of a second. Preparation and the loader: data_prepare.py, which also runs alone.
"""

import argparse
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import data_prepare
import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from haplovl.data.collect import collect
from haplovl.data.validate import validate
from haplovl.settings import Params, load_params

PARAMS = Path(__file__).resolve().parents[1] / "params.yaml"
DIFFERENT = 400
"""Different pictures; files beyond repeat their pixels under other bytes."""


FEW = 64
"""Records whose validation shows its fixed part."""


def write_photographs(folder: Path, count: int) -> int:
    """Writes `count` JPEG files of unlike content; returns their mean size in bytes."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    pictures, total = [], 0
    for number in range(count):
        if number < DIFFERENT:
            pictures.append(_photograph(random))
        # What follows a picture's end is not read, but makes the file's bytes its own.
        data = pictures[number % DIFFERENT] + f"\nfile {number}".encode()
        (folder / f"{number:06d}.jpg").write_bytes(data)
        total += len(data)
    return total // count


def _photograph(random: np.random.Generator) -> bytes:
    """Soft shapes under the noise of a sensor: as large as a photograph of this size, and no harder to decode."""
    shapes = Image.fromarray(random.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((640, 480))
    noisy = np.asarray(shapes, dtype=np.int16) + random.normal(0, 8, (480, 640, 1)).astype(np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=60)
    return file.getvalue()


WORDS = (
    "the",
    "red",
    "green",
    "small",
    "large",
    "dog",
    "cat",
    "tree",
    "house",
    "river",
    "stands",
    "runs",
    "near",
    "two",
)


def write_records(path: Path, count: int, with_picture: bool) -> None:
    """Writes records of two turns in the layout of LLaVA's JSON lines."""
    random = np.random.default_rng(1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            words = [WORDS[i] for i in random.integers(0, len(WORDS), 60)]
            place = "<image>\n" if with_picture else ""
            messages = [
                {"from": "human", "value": f"{place}What about {' '.join(words[:8])} in case {number}?"},
                {"from": "gpt", "value": " ".join(words[8:30]) + "."},
                {"from": "human", "value": f"And what else, {' '.join(words[30:36])}?"},
                {"from": "gpt", "value": " ".join(words[36:]) + "."},
            ]
            image = {"image": f"{number:06d}.jpg"} if with_picture else {}
            file.write(json.dumps({"id": f"{number:08d}", **image, "conversations": messages}) + "\n")


def decode_all(paths: list[Path]) -> int:
    """Reads and decodes files to the last pixel, as plain Pillow does it."""
    for path in paths:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            image.load()
    return len(paths)


def decoder_ceiling(folder: Path, processes: int) -> tuple[float, float]:
    """Pictures per second that this many processes decode, their start not counted, and processor seconds of each."""
    paths = sorted(folder.iterdir())
    began = time.process_time()
    decode_all(paths[: len(paths) // 10])
    cpu = (time.process_time() - began) / (len(paths) // 10)
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(decode_all, [paths[:20]] * processes))
        began = time.perf_counter()
        done = sum(pool.map(decode_all, [paths[i : i + 64] for i in range(0, len(paths), 64)]))
        return done / (time.perf_counter() - began), cpu


def params_for(source: dict[str, Any]) -> Params:
    """The default params with another source."""
    params = load_params(PARAMS).model_dump(mode="json", by_alias=True)
    params["collect"] = {"sources": [source]}
    return Params.model_validate(params)


@contextmanager
def memory_watched() -> Iterator[dict[str, float]]:
    """Yields a dictionary that holds, after the block, `gib`: the most that all processes took together meanwhile."""
    peak, over = {"gib": 0.0}, threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            peak["gib"] = max(peak["gib"], _resident() / 2**30)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _resident() -> int:
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def validate_timed(source: dict[str, Any], work: Path, processes: int) -> tuple[float, float, float]:
    """Collects and validates a source: seconds of the validation, processor seconds, and GiB at its peak."""
    params = params_for(source)
    collect(params, work / "raw")
    outs = [
        work / name for name in ("validated", "quarantine", "docs", "metrics.json", "profile.json", "accepted.json")
    ]
    with memory_watched() as peak:
        began, before = time.perf_counter(), sum(os.times()[:4])
        validate(params, work / "raw", *outs, processes=processes)
        seconds, cpu = time.perf_counter() - began, sum(os.times()[:4]) - before
    return seconds, cpu, peak["gib"]


def measure_photographs(work: Path, count: int, processes: int) -> dict[str, float]:
    """Validation of records with a photograph each, and the decoder alone."""
    size = write_photographs(work / "images", count)
    write_records(work / "records.jsonl", count, with_picture=True)
    source = {"name": "photographs", "format": "llava", "license": "none", "annotations": [str(work / "records.jsonl")]}
    # Every picture is compared with every other one, within one split: nothing is held out, nothing clashes.
    source |= {"images": str(work / "images"), "near_duplicates": 4, "split": "train"}
    ceiling, decode_cpu = decoder_ceiling(work / "images", processes)
    write_records(work / "few.jsonl", FEW, with_picture=True)
    few = source | {"annotations": [str(work / "few.jsonl")]}
    validate_timed(few, work, processes)  # loads Great Expectations, once for all
    start, start_cpu, _ = validate_timed(few, work, processes)
    seconds, cpu, gib = validate_timed(source, work, processes)
    ceiling = max(ceiling, decoder_ceiling(work / "images", processes)[0])
    return {
        "validate_records_per_s": count / seconds,
        "validate_start_seconds": start,
        "validate_decode_share": (count - FEW) / (seconds - start) / ceiling,
        "validate_decode_cpu_share": decode_cpu / ((cpu - start_cpu) / (count - FEW)),
        "decode_images_per_s": ceiling,
        "validate_peak_gib": gib,
        "image_bytes": size,
    }


def measure_texts(work: Path, count: int, processes: int) -> dict[str, float]:
    """Validation of records without pictures."""
    write_records(work / "texts.jsonl", count, with_picture=False)
    source = {"name": "texts", "format": "llava", "license": "none", "annotations": [str(work / "texts.jsonl")]}
    seconds, _, gib = validate_timed(source, work, processes)
    name = "million" if count == 1_000_000 else "texts"
    return {f"{name}_peak_gib": gib, f"{name}_validate_seconds": seconds, "validate_texts_per_s": count / seconds}


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--photographs", type=int, default=20_000, help="records with a picture (default: 20000)")
    parser.add_argument("--texts", type=int, default=1_000_000, help="records without (default: 1000000)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one per core")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    for measure, count in ((measure_photographs, options.photographs), (measure_texts, options.texts)):
        if count:
            work = Path(tempfile.mkdtemp(prefix="haplovl-data-"))
            try:
                figures |= measure(work, count, options.processes)
            finally:
                shutil.rmtree(work)
    figures |= data_prepare.figures(options.photographs, options.texts)
    if "million_peak_gib" in figures:  # of validation so far
        figures["million_peak_gib"] = max(figures["million_peak_gib"], figures["prepare_million_peak_gib"])
    table = Table(title=f"{options.photographs} photographs, {options.texts} texts, {options.processes} processes")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.3f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if options.json:
        machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
        report = {"figures": figures, "settings": vars(options) | {"json": None}, "machine": machine}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
