"""How a stage's inputs and results travel between the flow's machine and rented nodes.

Code comes from git at a commit, data and models from the DVC remote. `dvc.lock`, which the flow changes as it goes and
commits at its end, travels in an environment variable (`python -m flows.travel` prints its value); results are found
again through DVC's run cache.
"""

import base64
import binascii
import gzip
import os
from pathlib import Path
from typing import Any

from haplovl.errors import UserError
from haplovl.files import write_whole

LOCK = Path("dvc.lock")
LOCK_VARIABLE = "HAPLOVL_LOCK"


def packed_lock() -> str:
    """dvc.lock as a word for an environment variable; the same lock gives the same word."""
    return base64.b64encode(gzip.compress(LOCK.read_bytes() if LOCK.exists() else b"", mtime=0)).decode()


def unpack_lock(word: str) -> None:
    """Writes the dvc.lock that `packed_lock` packed.

    Raises:
        UserError: the word was cut or changed on its way.
    """
    try:
        text = gzip.decompress(base64.b64decode(word, validate=True)).decode()
    except (binascii.Error, EOFError, OSError, ValueError) as error:
        raise UserError(f"{LOCK_VARIABLE} does not hold a packed dvc.lock: {error}; launch the job again") from None
    if text:
        write_whole(LOCK, text)


def open_repo() -> Any:
    """The DVC project in the current folder.

    Raises:
        UserError: there is none.
    """
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        return Repo(".")
    except DvcException as error:
        raise UserError(f"no usable DVC project here: {error}") from None


def load_stage(repo: Any, name: str) -> Any:
    """DVC's own object of a stage.

    Raises:
        UserError: dvc.yaml has no such stage.
    """
    from dvc.exceptions import DvcException

    try:
        return repo.stage.load_one(name=name)
    except DvcException as error:
        raise UserError(f"there is no stage '{name}' to run: {error}") from None


def inputs_of(repo: Any, name: str) -> tuple[list[str], list[str]]:
    """What a stage reads: the outs of other stages, which DVC keeps, and the files that git keeps."""
    from dvc.dependency import ParamsDependency

    made = [out.fs_path for out in repo.index.outs]
    data, code = [], []
    for dependency in load_stage(repo, name).deps:
        path = dependency.fs_path
        if not isinstance(dependency, ParamsDependency):
            by_dvc = any(path == out or path.startswith(out + os.sep) for out in made)
            (data if by_dvc else code).append(os.path.relpath(path, repo.root_dir))
    return data, code


def restore(name: str) -> bool:
    """Brings the outs of a stage from the remote, if somebody ran it with exactly these inputs; nothing is run."""
    from dvc.exceptions import DvcException
    from dvc.stage.cache import RunCacheNotFoundError

    repo = open_repo()
    try:
        with repo.lock:
            repo.stage_cache.pull(None)
            repo.stage_cache.restore(load_stage(repo, name), pull=True)
    except RunCacheNotFoundError:
        return False
    except DvcException as error:
        raise UserError(f"the results of '{name}' cannot be looked up in the DVC remote: {error}") from None
    finally:
        repo.close()
    return True


if __name__ == "__main__":
    print(packed_lock())
