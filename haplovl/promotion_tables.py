"""Registered versions and promotions as tables in the terminal, or as JSON."""

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from haplovl.errors import UserError
from haplovl.promotion import Verdict, Version, candidate_of, promote, registered, told
from haplovl.settings import load_params
from haplovl.wandb_registry import follow


def print_models(as_json: bool) -> None:
    """Prints every registered version, the oldest first; what DVC no longer has of one is left open."""
    name = load_params().register_.name
    rows = [_row(name, version) for version in registered(name)]
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    if not rows:
        print(f"no version of {name} is registered yet; 'haplovl publish' registers a candidate")
        return
    table = Table(title=f"versions of {name}", title_justify="left")
    for column in ("version", "stages", "accuracy", "recipe", "seed", "data", "model", "commit"):
        table.add_column(column, justify="right" if column == "accuracy" else "left")
    for row in rows:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        hashes = [str(row[key] or "")[:8] for key in ("data_manifest_sha256", "model_sha256", "commit")]
        known = [str(value) if value is not None else "" for value in (row["recipe"], row["seed"])]
        table.add_row(row["version"], ", ".join(row["stages"]), accuracy, *known, *hashes)
    console = Console(highlight=False)
    console.print(table)
    for row in rows:
        if row["missing"]:
            console.print(f"{row['version']}: {row['missing']}", markup=False, soft_wrap=True)


def _row(name: str, version: Version) -> dict[str, Any]:
    try:
        candidate, missing = candidate_of(name, version.name), ""
    except UserError as error:
        candidate, missing = {}, str(error)
    evaluation = candidate.get("metrics", {}).get("evaluation", {})
    return {
        "version": version.name,
        "stages": version.stages,
        "accuracy": evaluation.get("accuracy"),
        "types": {kind: scores["accuracy"] for kind, scores in evaluation.get("types", {}).items()},
        **{key: candidate.get(key) for key in ("recipe", "seed", "data_manifest_sha256", "model_sha256")},
        "commit": version.commit,
        "missing": missing,
    }


def print_promotion(version: str | None, stage: str, force: bool, as_json: bool) -> bool:
    """Promotes, and prints by how much the versions differ; False where the promotion is refused."""
    settings = load_params().register_
    verdict = promote(settings.name, version, stage, force)
    if as_json:
        print(json.dumps({**asdict(verdict), "stage": stage, "promoted": not verdict.reasons}, ensure_ascii=False))
    else:
        _print(verdict, stage)
    if not verdict.reasons:
        follow(settings, verdict.challenger, stage)
    return not verdict.reasons


def _print(verdict: Verdict, stage: str) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if verdict.differences:
        table = Table(title=f"{verdict.challenger} minus {verdict.champion}, the same questions", title_justify="left")
        table.add_column("question type")
        table.add_column("difference (95 % interval)")
        table.add_column("questions", justify="right")
        for kind, difference in verdict.differences.items():
            table.add_row(kind, told(difference), str(difference.questions))
        console.print(table)
    console.print(outcome(verdict, stage), markup=False)


def outcome(verdict: Verdict, stage: str) -> str:
    """One sentence: what is in the stage now, and why."""
    if verdict.reasons:
        why = "; ".join(verdict.reasons)
        return f"{verdict.challenger} is not promoted, {stage} stays {verdict.champion}: {why}"
    if verdict.champion == verdict.challenger:
        return f"{verdict.challenger} is in {stage} already"
    return f"{stage}: {verdict.champion or 'nothing'} → {verdict.challenger}"
