"""A small project under git and DVC, of its own and apart from the user's settings."""

import os
import subprocess
from pathlib import Path

from dvc.repo import Repo

ROOT = Path(__file__).parents[2]


def git(*arguments: str) -> str:
    """Output of a git command with somebody's identity."""
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    done = subprocess.run(["git", *identity, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def make_project(tmp_path: Path, monkeypatch, dvc_yaml: str) -> Path:
    """Makes a project with this dvc.yaml and the real params.yaml, and goes there; nothing is committed. W&B is off."""
    for name in [name for name in os.environ if name.startswith(("GIT_", "DVC_", "AWS_", "WANDB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.chdir(root)
    git("init", "-q")
    Repo.init(".")
    Path("dvc.yaml").write_text(dvc_yaml)
    Path("params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    folders = ("data", "models", "candidate", "reports", "metrics", "runs", "got*")
    Path(".gitignore").write_text("".join(f"/{name}/\n" for name in folders))
    return root
