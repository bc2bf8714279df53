"""A training stage on nodes that SkyPilot rents: checked, launched as a managed job, followed, and brought home.

SkyPilot is called by its command, as its packages do not fit into this environment: `sky` on PATH, the one of
.venv-infra (`make infra-env`), or what HAPLOVL_SKY names.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.stages import stream
from flows.travel import LOCK_VARIABLE, inputs_of, open_repo, packed_lock, restore
from haplovl.errors import UserError
from haplovl.revisions import git
from haplovl.settings import ComputeProfile

DECIDE = ("dvc.yaml", "params.yaml", ".dvc/config", "haplovl", "flows", "infra", "pyproject.toml", "constraints.txt")
"""Files of git that decide what a node does, beside the stage's own dependencies."""
ENDED = ("SUCCEEDED", "CANCELLED")
"""States of a managed job that has ended, beside those that begin with FAILED."""
NO_CONTROLLER = "ClusterDoesNotExist"
POLL_SECONDS = 10.0
PATIENCE = 30
"""How many times in a row SkyPilot may fail to answer while a job is followed."""
Line = Callable[[str], None]


def run_on_rented_nodes(name: str, profile: ComputeProfile, on_line: Line) -> tuple[int, list[str]]:
    """Runs a stage as a managed job and brings its outs here; returns exit status and last lines as `dvc repro` would.

    A job of the same commit and inputs that still runs is followed instead; ending this function early cancels it.
    """
    try:
        _check_bucket(profile)
        sky, commit = find_sky(), pushed_commit(name)
        send_inputs(name)
        if not (running := find_job(sky, job_name(name, profile, commit))) and restore(name):
            on_line(f"{name} was run before with these inputs; nothing is rented")
        else:
            code, lines = _job(sky, name, profile, commit, running, on_line)
            if code:
                return code, lines
            if not restore(name):
                return 1, [f"the job of {name} succeeded, but its results are not in the DVC remote; see its log"]
    except UserError as error:
        return 1, [str(error)]
    # Everything is in the cache by now: DVC checks the outs out and writes dvc.lock, and no command runs.
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", name]
    return stream(command, {**os.environ, "HAPLOVL_COMPUTE": profile.name}, on_line)


# --- before anything is rented ---------------------------------------------------------------------------------------
def _check_bucket(profile: ComputeProfile) -> None:
    if profile.sky and "CHANGE-ME" in profile.sky.state_bucket:
        raise UserError(
            f"infra/compute/{profile.name}.yaml: sky.state_bucket is still '{profile.sky.state_bucket}'; bucket names "
            "are world-wide, choose one"
        )


def find_sky() -> str:
    """The sky command, once it has said that a cloud is enabled.

    Raises:
        UserError: it is not installed, or no cloud is enabled.
    """
    places = os.environ.get("HAPLOVL_SKY"), shutil.which("sky"), ".venv-infra/bin/sky"
    sky = next((place for place in places if place and Path(place).is_file()), None)
    if sky is None:
        raise UserError("SkyPilot is not installed; 'make infra-env' installs it into .venv-infra")
    clouds = _answer(_sky(sky, "check", "-o", "json"), "sky check")
    if not any(clouds.values() if isinstance(clouds, dict) else clouds):
        raise UserError(f"SkyPilot has no cloud enabled; '{sky} check' says what each of them needs")
    return sky


def pushed_commit(name: str) -> str:
    """The commit that the nodes will fetch from `origin`.

    Raises:
        UserError: files that decide the result are not committed, the commit is not on origin, or DVC has no remote
            that the commit knows.
    """
    repo = open_repo()
    _, code = inputs_of(repo, name)
    remote = repo.config.read("repo").get("core", {}).get("remote")
    repo.close()
    if not remote:
        raise UserError(
            "rented nodes need a DVC remote for data and results; 'dvc remote add -d store s3://BUCKET/haplovl', then "
            "commit .dvc/config"
        )
    origin = git("remote", "get-url", "origin").strip()
    if not origin:
        raise UserError("rented nodes fetch the code from git's remote 'origin', which there is none of")
    if re.search(r"^https?://[^/@\s]+@|://[^/@\s]*:[^/@\s]*@", origin):
        raise UserError(
            "the address of origin holds a password or token, which logs of rented nodes would show; take it out, and "
            "give the nodes HAPLOVL_GIT_TOKEN as infra/sky/README.md says"
        )
    changed = [line[3:] for line in git("status", "--porcelain", "--", *DECIDE, *code).splitlines()]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(f"rented nodes see committed files only; commit and push {changed[0]}{more} first")
    commit = git("rev-parse", "HEAD").strip()
    git("fetch", "--quiet", "origin")
    if not git("for-each-ref", "--contains", commit, "refs/remotes/origin"):
        raise UserError(f"commit {commit[:10]} is not on origin, where rented nodes fetch it; 'git push' sends it")
    return commit


def send_inputs(name: str) -> None:
    """Pushes the data that the stage reads to the DVC remote.

    Raises:
        UserError: the push failed.
    """
    repo = open_repo()
    data, _ = inputs_of(repo, name)
    repo.close()
    done = _run([sys.executable, "-m", "dvc", "push", "--quiet", *data]) if data else None
    if done is not None and done.returncode:
        raise UserError(f"the inputs of '{name}' cannot be pushed to the DVC remote: {_last(done)}")


# --- the job ---------------------------------------------------------------------------------------------------------
def job_name(name: str, profile: ComputeProfile, commit: str) -> str:
    """The same for the same stage, code, inputs and profile, so that a restarted flow finds its job again."""
    what = json.dumps([commit, packed_lock(), profile.model_dump(mode="json")])
    return f"haplovl-{name}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"


def queue(sky: str) -> list[dict[str, Any]]:
    """All managed jobs; none before the first one has brought up SkyPilot's controller.

    Raises:
        UserError: SkyPilot cannot tell.
    """
    done = _sky(sky, "jobs", "queue", "--refresh", "--verbose", "--all", "-o", "json")
    if done.returncode and NO_CONTROLLER in done.stderr + done.stdout:
        return []
    return _answer(done, "sky jobs queue")


def find_job(sky: str, job: str) -> dict[str, Any] | None:
    """The newest job of this name that has not ended."""
    own = [entry for entry in queue(sky) if entry["job_name"] == job and not _ended(entry)]
    return max(own, key=lambda entry: entry["job_id"], default=None)


def launch_command(sky: str, name: str, profile: ComputeProfile, commit: str) -> list[str]:
    """What launches the stage: the profile's task with this commit, these inputs and this state."""
    settings = profile.sky
    assert settings is not None  # the profile's own check
    variables = {
        "HAPLOVL_STAGE": name,
        "HAPLOVL_COMPUTE": profile.name,
        "HAPLOVL_REPO": git("remote", "get-url", "origin").strip(),
        "HAPLOVL_COMMIT": commit,
        "HAPLOVL_STATE_BUCKET": settings.state_bucket,
        LOCK_VARIABLE: packed_lock(),
    }
    words = [sky, "jobs", "launch", settings.task, "--yes", "--detach-run"]
    words += ["--name", job_name(name, profile, commit), "--num-nodes", str(settings.nodes)]
    words += [word for item in variables.items() for word in ("--env", "=".join(item))]
    return words + [word for secret in settings.secrets if secret in os.environ for word in ("--secret", secret)]


def _job(
    sky: str, name: str, profile: ComputeProfile, commit: str, running: dict[str, Any] | None, on_line: Line
) -> tuple[int, list[str]]:
    """Launches the job, or takes the one that runs, and follows it to its end."""
    job = job_name(name, profile, commit)
    try:
        if running:
            on_line(f"{name} is running already as job {running['job_id']}, {job}")
        else:
            on_line(f"launching {job}; the first line of its log may take many minutes")
            code, lines = stream(launch_command(sky, name, profile, commit), _quiet(), on_line)
            if code:
                return code, lines
        return _follow(sky, job, on_line)
    except UserError as error:
        raise UserError(f"{error}; {job} goes on, and the same command follows it again") from None
    except BaseException:
        on_line(f"cancelling {job}")
        _sky(sky, "jobs", "cancel", "--name", job, "--yes", "--graceful")
        raise


def _follow(sky: str, job: str, on_line: Line) -> tuple[int, list[str]]:
    """Passes the log of the newest job of a name on until it has ended, through recoveries and lost connections."""
    tail, failures = "0", 0
    while True:
        try:
            entries = [entry for entry in queue(sky) if entry["job_name"] == job]
            failures = 0
        except UserError:
            failures += 1
            if failures == PATIENCE:
                raise
            entries = []
        if entries:
            entry = max(entries, key=lambda entry: entry["job_id"])
            _, lines = stream([sky, "jobs", "logs", str(entry["job_id"]), "--tail", tail], _quiet(), on_line)
            tail = "20"  # a log that is opened again need not begin again
            if _ended(entry):
                return _status(entry), [*lines, *_reason(entry)]
        time.sleep(POLL_SECONDS)


def _ended(entry: dict[str, Any]) -> bool:
    return entry["status"] in ENDED or entry["status"].startswith("FAILED")


def _status(entry: dict[str, Any]) -> int:
    """The exit status of the job's own command where SkyPilot tells it, else 1."""
    if entry["status"] == "SUCCEEDED":
        return 0
    found = re.search(r"exit codes? \[?(\d+)", entry.get("failure_reason") or "")
    return int(found[1]) or 1 if found else 1


def _reason(entry: dict[str, Any]) -> list[str]:
    if entry["status"] == "SUCCEEDED":
        return []
    return [f"job {entry['job_id']} ended as {entry['status']}: {entry.get('failure_reason') or 'no reason given'}"]


# --- commands --------------------------------------------------------------------------------------------------------
def _quiet() -> dict[str, str]:
    return {**os.environ, "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=_quiet())


def _sky(sky: str, *words: str) -> subprocess.CompletedProcess[str]:
    return _run([sky, *words])


def _answer(done: subprocess.CompletedProcess[str], what: str) -> Any:
    """The JSON that a command of SkyPilot printed; other lines may stand before it."""
    start = re.search(r"^[\[{]", done.stdout, re.MULTILINE)
    if done.returncode or not start:
        raise UserError(f"'{what}' failed: {_last(done)}")
    return json.JSONDecoder().raw_decode(done.stdout[start.start() :])[0]


def _last(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {done.returncode}"
