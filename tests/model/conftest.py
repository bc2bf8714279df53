"""One thread for tiny models, and checkpoint folders of the authors' layout, made of the public reference's vectors."""

import json
import shutil
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that share tiny matrices wait for each other: on a busy machine one is several times faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the public reference's vectors, see its README.md."""
    return GOLDEN


@pytest.fixture(scope="session")
def released_source():
    """`build(folder, model, **settings)`: a released checkpoint with its processor, its settings overridden."""

    def build(folder: Path, model: str = "model", **settings) -> Path:
        shutil.copytree(GOLDEN / model, folder)
        shutil.copytree(GOLDEN / "processor", folder, dirs_exist_ok=True)
        for name in ("config.json", "preprocessor_config.json"):
            content = json.loads((folder / name).read_text())
            parts = [content, content["base_config"]] if name == "config.json" else [content]
            for part in parts:
                part.update({key: value for key, value in settings.items() if name == "config.json" or key in part})
            (folder / name).write_text(json.dumps(content))
        return folder

    return build
