"""Git revisions of the project, and what DVC kept of them."""

import subprocess
from pathlib import Path

from haplovl.errors import UserError
from haplovl.redaction import without_secrets

LOCK = "dvc.lock"


def fetch(version: str, path: Path, target: Path) -> None:
    """Brings a file or folder of a version from DVC's cache or the default remote.

    Raises:
        UserError: the revision is unknown, or what is asked for is in neither.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc_data.index import DataIndexDirError
    from scmrepo.exceptions import SCMError

    commit_of(version)
    try:
        # With today's remotes: those of an old version may not exist yet, or no longer.
        files = DVCFileSystem(".", rev=version, config=dict(Repo(".").config))
        if files.isdir(path.as_posix()):
            files.get(path.as_posix(), str(target), recursive=True)
        else:
            files.get_file(path.as_posix(), str(target))
    except FileNotFoundError:
        raise UserError(
            f"{path} of '{version}' cannot be found: that version has none, or it is neither in DVC's cache nor in the "
            f"default remote (dvc remote list)"
        ) from None
    except RecursionError:  # what DVC makes of a listing with `..`
        raise UserError(f"{path} of '{version}' cannot be read: what DVC keeps of it is damaged") from None
    except (DvcException, SCMError, DataIndexDirError, OSError) as error:
        reason = without_secrets(" ".join(str(error).split()))  # which may name the remote
        raise UserError(f"{path} of '{version}' cannot be read: {reason}") from None


def commit_of(version: str) -> str:
    """The commit of a revision.

    Raises:
        UserError: there is none of this name.
    """
    found = git("rev-parse", "--verify", "--quiet", f"{version}^{{commit}}").strip()
    if not found:
        raise UserError(f"there is no git revision '{version}' here; 'git tag' and 'git log' list them")
    return found


def git(*arguments: str) -> str:
    """Output of a git command, empty if it fails.

    Raises:
        UserError: git is not installed.
    """
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise UserError("versions need git, which is not installed") from None
    return "" if done.returncode else done.stdout
