"""All that is known of a registered version, from git, DVC and its record, as a table in the terminal or as JSON."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from haplovl.errors import UserError
from haplovl.files import STAGE2
from haplovl.lineage import recorded
from haplovl.promotion import candidate_of, known, registered
from haplovl.revisions import commit_of, git, hashes, lock_of
from haplovl.settings import load_params

NO_RECORD = "unknown: this version has no lineage.json"


def lineage(name: str, version: str) -> dict[str, Any]:
    """Everything that is known of a version, from git, DVC and the record.

    Raises:
        UserError: there is no such version.
    """
    version = known(name, version)
    commit = commit_of(f"{name}@{version}")
    record, lock = recorded(commit), lock_of(commit)
    try:
        candidate, missing = candidate_of(name, version), ""
    except UserError as error:
        candidate, missing = {}, str(error)
    evaluation = candidate.get("metrics", {}).get("evaluation", {})
    outs = {path: digest for stage in lock.values() for path, digest in hashes(stage.get("outs")).items()}
    runs = {
        **record.get("training", {}),
        "evaluate": record.get("evaluation", {}),
        "publish": record.get("publish", {}),
    }
    return {
        "version": version,
        "stages": next(found.stages for found in registered(name) if found.name == version),
        "commit": commit,
        "code": {
            "haplovl": git("rev-parse", "--verify", "--quiet", f"{commit}:./haplovl").strip(),
            "uncommitted": record.get("uncommitted"),
        },
        "data": {
            "outs": {path: digest for path, digest in outs.items() if path.startswith("data/")},
            "manifest_sha256": candidate.get("data_manifest_sha256"),
            "sources": candidate.get("data", {}).get("sources", {}),
        },
        "params": candidate.get("params"),
        "params_sha256": candidate.get("params_fingerprint"),
        "teachers": candidate.get("teachers"),
        "model": {"models": outs.get(STAGE2.as_posix()), "sha256": candidate.get("model_sha256")},
        "metrics": {
            "accuracy": evaluation.get("accuracy"),
            "types": {kind: scores["accuracy"] for kind, scores in evaluation.get("types", {}).items()},
        },
        "training": record.get("training"),
        "evaluation": record.get("evaluation"),
        "wandb": {job: told["wandb"] for job, told in runs.items() if told.get("wandb")},
        "environment": record.get("environment"),
        "machine": record.get("machine"),
        "missing": [missing] if missing else [],
    }


def print_lineage(version: str, as_json: bool) -> None:
    """Prints where a version comes from."""
    found = lineage(load_params().register_.name, version)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    table = Table(title=f"lineage of {found['version']}", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = [
        ("stages", ", ".join(found["stages"])),
        ("commit", found["commit"]),
        *_made_of(found),
        *((f"trained: {name}", _trained(told)) for name, told in (found["training"] or {}).items()),
        *((f"W&B: {job}", _wandb(place)) for job, place in found["wandb"].items()),
        *_made_by(found),
        *(("metrics", line) for line in _scores(found["metrics"])),
        *(("missing", why) for why in found["missing"]),
    ]
    previous = ""
    for name, value in rows:
        table.add_row("" if name == previous else name, value)
        previous = name
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print("--json shows all of it: every setting and package", soft_wrap=True)


def _made_of(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Code, data, settings, teachers and model."""
    rows = [("code", f"{found['code']['haplovl']} (git tree of haplovl/)" if found["code"]["haplovl"] else "")]
    if found["code"]["uncommitted"]:
        rows.append(("code", f"not committed then: {', '.join(found['code']['uncommitted'])}"))
    rows += [("data", f"{path} {digest}") for path, digest in found["data"]["outs"].items()]
    for source, splits in found["data"]["sources"].items():
        counts = ", ".join(f"{count} {split}" for split, count in splits.items() if count)
        rows.append(("data", f"{source}: {counts}"))
    params = found["params"] or {}
    rows.append(("params", f"recipe {params['recipe']}, seed {params['seed']}" if params else ""))
    rows.append(("params", f"sha256 {found['params_sha256']}"))
    for role, teacher in (found["teachers"] or {}).items():
        source = teacher.get("id") or teacher.get("path") or teacher["kind"]
        revision = f" at {teacher['revision']}" if "revision" in teacher else ""
        rows.append((f"teacher: {role}", f"{source}{revision}, sha256 {teacher['sha256']}"))
    return [*rows, ("model", f"sha256 {found['model']['sha256']}")]


def _trained(told: dict[str, Any]) -> str:
    if "places" not in told:
        return str(told.get("note", ""))
    lines = [f"{told['run']}, code {told.get('code', {}).get('sha256', '')[:16]}"]
    for place in told["places"]:
        profile, machine = place["compute"], place["machine"]
        lines.append(
            f"from step {place['after_step'] + 1}: profile {profile['name']}, {place['world_size']} processes of "
            f"{machine['threads']} threads on {profile['device']}: {', '.join(machine['gpus']) or machine['cpu']}"
        )
    return "\n".join(lines)


def _wandb(place: dict[str, str]) -> str:
    return f"{place['project']}/{place['id']}" + (f" in {place['path']}" if place["path"] else "")


def _made_by(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Environment and machine, as they were when the version was published."""
    environment, machine = found["environment"], found["machine"]
    if not environment or not machine:
        return [("environment", NO_RECORD), ("machine", NO_RECORD)]
    packages = len(environment["packages"])
    return [
        ("environment", f"Python {environment['python']}, {packages} packages, torch {machine['torch']}"),
        ("machine", f"{machine['system']} ({machine['libc']}), {machine['cpu']}, {machine['kernels']} kernels"),
        ("machine", f"instruction sets: {' '.join(machine['instructions']) or 'unknown'}"),
        ("machine", f"GPUs: {', '.join(machine['gpus']) or 'none'}"),
    ]


def _scores(metrics: dict[str, Any]) -> list[str]:
    if metrics["accuracy"] is None:
        return []
    return [f"accuracy {metrics['accuracy']:.3f}", *(f"{kind} {value:.3f}" for kind, value in metrics["types"].items())]
