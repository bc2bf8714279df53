"""Where a run was trained: compute profile, number of processes and machine, which move the last bits of weights."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from haplovl.files import RUN_FILE, read_json
from haplovl.machine import machine
from haplovl.settings import ComputeProfile


def places(folder: Path, step: int, compute: ComputeProfile) -> list[dict[str, Any]]:
    """All places of the run in `folder`, this one the last; the earlier ones are those of the steps up to `step`.

    A run that goes on where it was has one place still.
    """
    here = {"world_size": dist.get_world_size(), "compute": compute.model_dump(mode="json"), "machine": machine()}
    told = read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}
    earlier = [place for place in told.get("places", []) if place["after_step"] < step]
    if earlier and {**earlier[-1], "after_step": 0} == {**here, "after_step": 0}:
        return earlier
    return [*earlier, {"after_step": step, **here}]
