"""Data of a test's own making, collected and validated in this process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from small_data import Outcome, params_of

from haplovl.data.collect import collect
from haplovl.data.validate import validate


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Validates records with their pictures: `check(records, images, processes=…, near_duplicates=…, **settings)`."""
    monkeypatch.chdir(tmp_path)

    def run(
        records: list[dict],
        images: dict[str, bytes] | None = None,
        processes: int = 1,
        near: int | None = None,
        **settings,
    ) -> Outcome:
        source = tmp_path / "source"
        for name, data in (images or {}).items():
            path = source / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (source / "images").mkdir(parents=True, exist_ok=True)
        (source / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
        own = {"name": "own", "format": "llava", "license": "mine", "near_duplicates": near}
        own |= {"annotations": [str(source / "records.jsonl")], "images": str(source / "images")}
        params = params_of([own], **settings)
        collect(params)
        validate(params, processes=processes)
        return Outcome(tmp_path)

    return run
