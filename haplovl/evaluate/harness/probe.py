"""Run in the harness's environment: prints what answers there will depend on, as one JSON object."""

import json

import torch
import transformers


def facts() -> dict[str, str | int]:
    """The device that a model is put on, how many of it there are, and the versions of what computes."""
    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_gpu else "cpu",
        "gpus": torch.cuda.device_count() if has_gpu else 0,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    print(json.dumps(facts()))
