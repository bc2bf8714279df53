"""W&B's client with its own signatures and no server; as a command, what `haplovl.wandb_registry` runs to follow."""

import json
import os
import time
from pathlib import Path
from unittest.mock import create_autospec

import wandb


def stand_in():
    """A `wandb.Api` whose one artifact can be linked."""
    api = create_autospec(wandb.Api)
    api.return_value.artifact.return_value = create_autospec(wandb.Artifact, instance=True)
    return api


if __name__ == "__main__":
    from haplovl.wandb_registry import main

    wandb.Api = stand_in()
    client, fails = wandb.Api.return_value, os.environ.get("FAILS")
    if fails == "hang":
        time.sleep(600)
    if fails:
        client.artifact.side_effect = wandb.errors.CommError(fails)
    main()
    (artifact,), (linked,) = client.artifact.call_args_list, client.artifact.return_value.link.call_args_list
    row = {"artifact": artifact.args[0], "place": linked.args[0], **linked.kwargs}
    with Path(os.environ["ASKED"]).open("a") as log:
        log.write(json.dumps(row) + "\n")
