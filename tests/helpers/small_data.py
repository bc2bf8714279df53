"""Small data of a test's own making, and what validation makes of it."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from haplovl.data.validated import ValidatedRecord, read_validated
from haplovl.settings import Params, load_params

REPO = Path(__file__).resolve().parents[2]


def photograph(seed: int, quality: int = 90, size: tuple[int, int] = (160, 120)) -> bytes:
    """A JPEG of soft shapes; the same seed gives the same picture, whatever its quality and size."""
    random = np.random.default_rng(seed)
    shapes = Image.fromarray(random.integers(0, 255, (9, 12, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
    file = io.BytesIO()
    shapes.save(file, "JPEG", quality=quality)
    return file.getvalue()


def record(
    id_: str, image: str | None = None, answer: str = "A square.", question: str = "What is it?", **more
) -> dict:
    """A LLaVA-style record of one turn."""
    asked = f"<image>\n{question}" if image else question
    talk = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": id_, **({"image": image} if image else {}), "conversations": talk, **more}


@dataclass
class Outcome:
    """What validation made of a project's data."""

    folder: Path

    @property
    def accepted(self) -> dict[str, ValidatedRecord]:
        """The accepted records by id."""
        return {row.record.id: row for row in read_validated(self.folder / "data/validated")}

    @property
    def reasons(self) -> dict[str | None, list[str]]:
        """The reasons of the quarantined ones by id."""
        return {row["id"]: row["reasons"] for row in self.quarantine}

    @property
    def quarantine(self) -> list[dict[str, Any]]:
        """The quarantine's lines."""
        with (self.folder / "data/quarantine/records.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    @property
    def metrics(self) -> dict[str, Any]:
        """metrics/validation.json."""
        return json.loads((self.folder / "metrics/validation.json").read_text())

    def files(self) -> dict[str, bytes]:
        """The bytes of every out."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for out in ("data/validated", "data/quarantine", "reports", "metrics")
            for path in sorted((self.folder / out).rglob("*"))
            if path.is_file()
        }


def params_of(sources: list[dict], **settings: Any) -> Params:
    """The default params with other sources and validate settings."""
    params = load_params(REPO / "params.yaml").model_dump(mode="json", by_alias=True)
    params["collect"] = {"sources": sources}
    params["validate"] |= {"max_quarantined_share": 1.0, **settings}
    return Params.model_validate(params)
