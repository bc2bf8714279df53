"""The golden scores: hand-made records, answers, and what the public scorers make of them (tests/golden/scores/)."""

import json
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "golden" / "scores"


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.json"


@cache
def _content(name: str) -> str:
    return path_of(name).read_text(encoding="utf-8")


def golden(name: str) -> dict[str, Any]:
    """A fresh copy of a benchmark's golden file."""
    return json.loads(_content(name))


def answered(name: str) -> list[dict[str, Any]]:
    """Its records with their predictions, flat, as a user's file has them."""
    return [{**item["record"], "prediction": item["prediction"]} for item in golden(name)["records"]]
