"""What a training run has on disk, looked at while it writes and prunes."""

import json


def step_folders(folder):
    """The folders of all checkpoints, whole or not, with their files; those that vanish meanwhile are left out."""
    found = {}
    for step in (path for run in folder.glob("runs/training/*") for path in run.iterdir()):
        try:
            if step.name.startswith("step-"):
                found[step.name] = list(step.iterdir())
        except FileNotFoundError:
            continue  # pruned
    return found


def complete(folder):
    """Steps of all complete checkpoints."""
    steps = set()
    for name, files in step_folders(folder).items():
        try:
            worlds = [json.loads(path.read_text())["world"] for path in files if path.suffix == ".json"]
        except (OSError, ValueError):
            continue  # being replaced or pruned
        if worlds and len(worlds) == worlds[0]:
            steps.add(int(name.removeprefix("step-")))
    return steps


def being_written(folder):
    """Whether a rank's file is there without its marker."""
    for files in step_folders(folder).values():
        names = {path.name for path in files}
        if any(name.endswith(".safetensors") and name.replace(".safetensors", ".json") not in names for name in names):
            return True
    return False
