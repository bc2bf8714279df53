"""Small local stand-ins of the eleven benchmarks: golden records with drawn pictures, as Parquet or as JSON."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from golden_scores import golden
from PIL import Image

from haplovl.evaluate.benchmarks import find


def picture_bytes(name: str, number: int) -> list[bytes]:
    """The encoded pictures of one row: SEED-Bench's are lists of them."""
    contents = []
    for place in range(2 if name == "seedbench_img" else 1):
        image = Image.new("RGB", (32 + number, 32), (9 * number, 20 * len(name), 90 * place))
        image.paste((250, 250, 7), (place, number % 8, place + 9, number % 8 + 5))
        buffer = io.BytesIO()
        image.save(buffer, "png")
        contents.append(buffer.getvalue())
    return contents


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    return [item["record"] for item in golden(name)["records"][:count]]


def write_parquet_folder(
    name: str,
    folder: Path,
    count: int = 4,
    records: list[dict[str, Any]] | None = None,
    without: str = "",
    spoil: tuple[int, bytes | None] | None = None,
) -> Path:
    """A folder with one shard as the hub has it. `spoil` puts other bytes (None: null) into a row's first picture."""
    table = []
    for number, record in enumerate(rows_of(name, count) if records is None else records):
        contents: list[bytes | None] = list(picture_bytes(name, number))
        if spoil is not None and spoil[0] == number:
            contents[0] = spoil[1]
        cells = [None if content is None else {"bytes": content, "path": f"{number}.png"} for content in contents]
        column = "image_1" if name == "mmmu_val" else "image"
        table.append({**record, column: cells if name == "seedbench_img" else cells[0]})
        table[-1].pop(without, None)
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(table), folder / f"{find(name).split}-00000-of-00001.parquet", row_group_size=2)
    return folder


def write_json_folder(name: str, folder: Path, count: int = 4) -> Path:
    """A folder with NAME.json and its pictures in images/."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, record in enumerate(rows_of(name, count)):
        paths = []
        for place, content in enumerate(picture_bytes(name, number)):
            paths.append(f"images/{number}_{place}.png")
            (folder / paths[-1]).write_bytes(content)
        column = "image_1" if name == "mmmu_val" else "image"
        rows.append({**record, column: paths if name == "seedbench_img" else paths[0]})
    (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder
