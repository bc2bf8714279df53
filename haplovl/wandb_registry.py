"""W&B's registry beside git's tags: published versions are linked there, and stages are aliases.

Only online, and git stays the one that decides: what fails here is told, and changes nothing there.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress

from haplovl.redaction import without_secrets
from haplovl.settings import RegisterSettings
from haplovl.tracking import keep_wandb_here, wandb_mode, wandb_project

LINK = [sys.executable, "-m", "haplovl.wandb_registry"]
"""The command that `follow` gives a name, a registry, a version and an alias."""
TIMEOUT = 60.0
"""Seconds that following may take: without a network, W&B's client may block for minutes, when it ends most of all."""


def link(name: str, registry: str, version: str, alias: str) -> str:
    """Links a version that W&B has into the registry; returns the collection's path.

    The alias leaves the version that had it before. Raises what W&B raises.
    """
    keep_wandb_here()
    import wandb

    place = f"wandb-registry-{registry}/{name}"
    wandb.Api().artifact(f"{wandb_project(name)}/{name}:{version}", type="model").link(place, aliases=[alias])
    return place


def follow(settings: RegisterSettings, version: str, stage: str) -> None:
    """Moves a stage's alias to the version that git has there now; one line on stderr says how it went."""
    if wandb_mode() != "online" or settings.wandb_registry is None:
        return
    place, reason = _linked_elsewhere(settings.name, settings.wandb_registry, version, stage)
    if reason:
        print(f"git has {version} in {stage}; W&B's registry was not updated: {reason}", file=sys.stderr)
    else:
        print(f"W&B's registry: {stage} of {place} is {version}", file=sys.stderr)


def _linked_elsewhere(*arguments: str) -> tuple[str, str]:
    """`link` in a process of its own, which can be ended; the collection's path, and why it failed if it did."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*LINK, *arguments], **pipes, text=True, start_new_session=True)
    try:
        said, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {TIMEOUT:.0f} seconds"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # W&B's own service, too, which may outlive its client
        process.wait()
    if process.returncode:
        lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
        return "", without_secrets(lines[-1])
    return said.strip().splitlines()[-1], ""


def main() -> None:
    """Links what the arguments name, and prints the collection's path, or why not in one line."""
    try:
        print(link(*sys.argv[1:]))
    except Exception as error:  # W&B raises many kinds
        sys.exit(without_secrets(" ".join(str(error).split())) or type(error).__name__)


if __name__ == "__main__":
    main()
