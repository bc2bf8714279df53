"""The environment of lmms-eval: where it is, whether it fits, and how a program is started in it."""

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haplovl.errors import UserError
from haplovl.evaluate.harness.tasks import Task, task_yaml
from haplovl.files import RUNS, sha256_of

VERSION = "0.7.3"
FOLDER = Path(".venv-eval")
CACHE = RUNS / "cache" / "harness"
"""The datasets library's copies of the tables; may be deleted at any time."""

MAKE = "run 'make eval-env'"
# Of lmms-eval and its tasks: another number of pictures, plugins, judges on the network.
UNWANTED = ("NUM_IMAGE", "LMMS_EVAL_PLUGINS", "API_TYPE", "MODEL_VERSION", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
UNWANTED_PREFIXES = ("OPENAI_", "AZURE_", "LMMS_EVAL_", "WANDB_")


@dataclass(frozen=True)
class Environment:
    """An installed lmms-eval: its Python, and its folder of tasks."""

    python: Path
    tasks: Path


def find_environment(folder: Path = FOLDER) -> Environment:
    """The environment that `make eval-env` makes.

    Raises:
        UserError: it is missing, or holds another version of lmms-eval.
    """
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        raise UserError(f"there is no {folder} with lmms-eval {VERSION}; {MAKE}")
    packages = next(iter(sorted(folder.absolute().glob("lib/python*/site-packages"))), folder)
    found = sorted(path.stem.removeprefix("lmms_eval-") for path in packages.glob("lmms_eval-*.dist-info"))
    if found != [VERSION]:
        held = f"lmms-eval {found[0]}" if found else "no lmms-eval"
        raise UserError(f"{folder} holds {held}, but {VERSION} is needed; {MAKE}")
    return Environment(python, packages / "lmms_eval" / "tasks")


def probe(environment: Environment) -> dict[str, Any]:
    """What the module `probe` tells from within the environment: device, number of GPUs, versions.

    Raises:
        UserError: the environment cannot load this project's code, or what that needs.
    """
    command = [str(environment.python), "-m", "haplovl.evaluate.harness.probe"]
    done = subprocess.run(command, capture_output=True, text=True, env=variables({}))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(f"the environment of lmms-eval cannot load this project and its libraries ({last}); {MAKE}")
    return json.loads(done.stdout.splitlines()[-1])


def variables(own: dict[str, str], data_sha256: str = "") -> dict[str, str]:
    """The environment variables of a program that must not reach the network, or read what other projects set.

    `data_sha256` names the folder in which the datasets library keeps its copy of the tables: by itself, it knows a
    file again by its path and time, and would hand out what stood there before.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in UNWANTED and not name.startswith(UNWANTED_PREFIXES)
    }
    cache = CACHE.absolute()
    copies = str(cache / (data_sha256 or "datasets"))
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "DO_NOT_TRACK": "1",
        "HF_HOME": str(cache / "hub"),
        "HF_DATASETS_CACHE": copies,
        "LMMS_EVAL_DATASETS_CACHE": copies,
        "TOKENIZERS_PARALLELISM": "false",
        **own,
    }


def task_sha256(task: Task, stock_tasks: Path) -> str:
    """sha256 over what defines a task: lmms-eval's files in its folder and in `_task_utils`, and our YAML."""
    folders = [(stock_tasks / task.stock).parent, stock_tasks / "_task_utils"]
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file() and _defines(path))
    digest = hashlib.sha256(task_yaml(task, Path(), [Path(task.files)]).encode())
    for path in files:
        digest.update(f"{path.relative_to(stock_tasks).as_posix()}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _defines(path: Path) -> bool:
    return path.suffix in (".py", ".yaml") or path.name.endswith("_yaml")
