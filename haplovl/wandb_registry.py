"""W&B's registry beside git's tags: published versions are linked there, and stages are aliases.

Only online, and git stays the one that decides: what fails here is told, and changes nothing there.
"""

import sys

from haplovl.redaction import without_secrets
from haplovl.settings import RegisterSettings
from haplovl.tracking import keep_wandb_here, wandb_mode, wandb_project


def link(settings: RegisterSettings, version: str, alias: str) -> str:
    """Links a version that W&B has into the registry; returns the collection's path.

    The alias leaves the version that had it before. Raises what W&B raises.
    """
    keep_wandb_here()
    import wandb

    name = settings.name
    place = f"wandb-registry-{settings.wandb_registry}/{name}"
    wandb.Api().artifact(f"{wandb_project(name)}/{name}:{version}", type="model").link(place, aliases=[alias])
    return place


def follow(settings: RegisterSettings, version: str, stage: str) -> None:
    """Moves a stage's alias to the version that git has there now; one line on stderr says how it went."""
    if wandb_mode() != "online" or settings.wandb_registry is None:
        return
    try:
        place = link(settings, version, stage)
    except Exception as error:  # W&B raises many kinds
        reason = without_secrets(" ".join(str(error).split()))
        print(f"W&B's registry does not follow; in git {stage} is {version} all the same: {reason}", file=sys.stderr)
    else:
        print(f"W&B's registry: {stage} of {place} is {version}", file=sys.stderr)
