"""Runs on disk as trainings and evaluations leave them, with chosen losses and answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from haplovl.files import sha256_of_folder

REPO = Path(__file__).resolve().parents[2]
KINDS = {"colour": ("red", "blue"), "count": ("one", "two", "three")}


def settings(recipe: str = "haplovl", seed: int = 17, **changes: Any) -> dict[str, Any]:
    """The default params with changes by dotted name."""
    whole = yaml.safe_load((REPO / "params.yaml").read_text()) | {"recipe": recipe, "seed": seed}
    for name, value in changes.items():
        *sections, last = name.split("__")
        place = whole
        for section in sections:
            place = place[section]
        place[last] = value
    return whole


def predictions(accuracy: float, seed: int = 0, per_kind: int = 150, **changed: Any) -> list[dict[str, Any]]:
    """Rows of predictions.jsonl; about as many are right as `accuracy` says. `changed` goes into the first row."""
    random, rows = np.random.default_rng(seed), []
    for kind, answers in KINDS.items():
        for i in range(per_kind):
            answer = answers[i % len(answers)]
            right = random.random() < accuracy
            rows.append(
                {
                    "id": f"{kind}-{i:03}#0",
                    "kind": kind,
                    "question": f"Which {kind} is it in picture {i}?",
                    "answer": answer,
                    "prediction": answer if right else "no idea",
                    "blank_prediction": answers[0],
                    "source": "own",
                    "images": [f"file:{i}.png"],
                    "image_sha256": [f"{i:064x}"],
                    "correct": bool(right),
                    "confidence": -0.25,
                }
            )
    rows[0] |= changed
    return rows


def log_rows(steps: int = 40, level: float = 1.0, measured: bool = True) -> list[dict[str, Any]]:
    """A falling curve with two held-out losses."""
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": level * (1 + 9 / step), "learning_rate": 1e-4, "tokens": 100}
        if measured:
            row |= {"seconds": 1.8, "tokens_per_s": 2000.0 + step % 3, "tflops": 0.05, "memory_gib": 1.5}
        if step in (steps // 2, steps):
            row["validation_loss"] = level * 1.1
        rows.append(row)
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def project(folder: Path, accuracy: float, level: float = 1.0, **changes: Any) -> Path:
    """A project with a trained and evaluated model, and the state folder that its stage 2 came from."""
    params = settings(**changes)
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    write_lines(folder / "models/stage1/training_log.jsonl", log_rows(20, level, measured=False))
    write_lines(folder / "models/stage2/training_log.jsonl", log_rows(40, level, measured=False))
    state = folder / f"runs/training/stage2-{params['seed']:016x}"
    write_lines(state / "log.jsonl", log_rows(40, level))
    about = {
        "recipe": params["recipe"],
        "seed": params["seed"],
        "params": params,
        "data": {"manifest_sha256": "d" * 64},
    }
    code = {"sha256": "c" * 64, "git_commit": "1234567890abcdef", "git_dirty": True}
    (state / "run.json").write_text(json.dumps({"stage": "stage2", **about, "code": code}))
    models = {stage: sha256_of_folder(folder / "models" / stage) for stage in ("stage1", "stage2")}
    write_lines(folder / "reports/evaluation/predictions.jsonl", predictions(accuracy, params["seed"]))
    (folder / "reports/evaluation/run.json").write_text(json.dumps({"stage": "evaluate", **about, "models": models}))
    return folder
