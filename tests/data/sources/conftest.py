"""What the tests of the adapters share: pictures, and a source collected and read back."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from haplovl.data.collect import collect
from haplovl.data.media import Media
from haplovl.data.sources import entries, read_sources
from haplovl.pictures import ImageError
from haplovl.records import RecordError, parse_record
from haplovl.settings import load_params

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """Makes an image file in one shade of gray."""

    def make(shade: int, size: tuple[int, int] = (12, 8), kind: str = "JPEG") -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", size, (shade,) * 3).save(buffer, format=kind)
        return buffer.getvalue()

    return make


class Collected:
    """One source after `collect`: its records, the reasons of what cannot be one, and its pictures' bytes."""

    def __init__(self, raw: Path, name: str) -> None:
        self.raw, self.folder, self.media = raw, raw / name, Media(raw)
        self.source = next(source for source in read_sources(raw) if source.name == name)
        self.items = list(entries(raw, self.source))
        self.records, self.errors = [], []
        for item in self.items:
            try:
                assert item.source == name
                self.records.append(None if item.error else parse_record(item.data))
                self.errors.append(item.error)
            except RecordError as error:
                self.records.append(None)
                self.errors.append(str(error))

    @property
    def skipped(self) -> dict[str, str]:
        lines = (self.folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
        return {row["ref"]: row["reason"] for row in map(json.loads, lines)}

    def pictures(self, index: int) -> list[bytes | str]:
        """The bytes of a record's pictures, or why there are none."""
        return [self.read(ref) for ref in self.records[index].images]

    def read(self, ref: str) -> bytes | str:
        try:
            return self.media.read(self.source.name, ref)
        except ImageError as error:
            return str(error)


@pytest.fixture
def collected(tmp_path: Path) -> Callable[..., Collected]:
    """Collects one source, given as settings, and reads it back."""

    def run(**source: Any) -> Collected:
        params = yaml.safe_load((REPO / "params.yaml").read_text())
        params["collect"]["sources"] = [{"name": "own", "license": "mine", **source}]
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
        collect(load_params(tmp_path / "params.yaml"), tmp_path / "raw")
        return Collected(tmp_path / "raw", "own")

    return run
