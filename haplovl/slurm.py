"""A training stage as a Slurm job: submits it, streams its log, follows it through requeues, ends as it ends.

The job's id is kept beside the training state, under the key of what decides the result. So the same command, started
again after its process or machine died, finds the job that still runs, or the result that it left.
"""

import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from haplovl.errors import UserError
from haplovl.files import RUNS, read_json, write_json
from haplovl.settings import ComputeProfile, Params, StageSettings
from haplovl.train.checkpoint import RunFolder
from haplovl.train.launch import EXIT_PREEMPTED, StopSignals
from haplovl.train.stage import OUTPUTS, stage_identity
from haplovl.train.trainer import train_stage

SCRIPT = Path("infra/slurm/train.sbatch")
ACTIVE = {
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING", "SIGNALING", "STAGE_OUT",
    "STOPPED", "PREEMPTED", "REQUEUE_HOLD", "SPECIAL_EXIT",
}  # fmt: skip
POLL_SECONDS = 2.0
UNREACHABLE_SECONDS = 600.0
"""How long Slurm's controller may be silent, as while it is restarted."""
CANCEL_SECONDS = 60.0


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job."""

    state: str
    reason: str
    exit_code: int
    restarts: int

    @property
    def active(self) -> bool:
        """Whether it runs or will."""
        return self.state in ACTIVE

    @classmethod
    def parse(cls, text: str) -> "JobState":
        """Reads a line of `scontrol show job --oneliner`; a process that died of signal N counts as 128 + N."""
        fields = dict(re.findall(r"(\w+)=(\S*)", text))
        status, killed = (int(part) for part in fields["ExitCode"].split(":"))
        return cls(fields["JobState"], fields.get("Reason", ""), status or (128 + killed if killed else 0),
                   int(fields.get("Restarts", 0)))  # fmt: skip


class Job:
    """One stage's job of one result; its id and log are files in `runs/slurm`."""

    def __init__(self, stage: str, key: str) -> None:
        self.stage = stage
        base = RUNS / "slurm" / f"{stage}-{key[:16]}"
        self.file, self.log = base.with_suffix(".json"), base.with_suffix(".log")
        self.id: str | None = str(read_json(self.file)["job"]) if self.file.is_file() else None

    def submit(self, compute: ComputeProfile) -> None:
        """Queues the job.

        Raises:
            UserError: sbatch is missing or refuses.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        command = ["sbatch", "--parsable", f"--job-name=haplovl-{self.file.stem}", f"--output={self.log.absolute()}",
                   *sbatch_options(compute), str(SCRIPT), sys.executable, self.stage, compute.name,
                   str(compute.slurm.most_requeues)]  # fmt: skip
        self.id = _slurm(*command).strip().split(";")[0]
        write_json(self.file, {"job": self.id, "compute": compute.name})

    def state(self) -> JobState | None:
        """What Slurm says now; None where it has forgotten the job.

        Raises:
            UserError: the controller does not answer for minutes, or there is no scontrol.
        """
        until = time.monotonic() + UNREACHABLE_SECONDS
        while True:
            try:
                return JobState.parse(_slurm("scontrol", "show", "job", "--oneliner", self.id))
            except UserError as error:
                if "Invalid job id" in str(error):
                    return None
                if time.monotonic() > until or "is not installed" in str(error):
                    raise
            time.sleep(POLL_SECONDS)

    def cancel(self, stop_seconds: int) -> None:
        """Ends the job and waits until it is over; training has `stop_seconds` to write a checkpoint first.

        `scancel` alone would leave it the cluster's KillWait, half a minute as a rule.
        """
        state = self.state()
        if state and state.state == "RUNNING":
            with suppress(UserError):  # the job may end meanwhile
                _slurm("scontrol", "update", f"JobId={self.id}", "Requeue=0")
                _slurm("scancel", "--signal=USR1", self.id)
                self._wait(stop_seconds)
        _slurm("scancel", self.id)
        self._wait(CANCEL_SECONDS)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and (state := self.state()) and state.active:
            time.sleep(0.5)

    def follow(self, stop: StopSignals, stop_seconds: int) -> JobState:
        """Prints the job's log as it grows, until the job is over.

        Raises:
            UserError: Slurm forgot the job.
        """
        position, waiting, finals = 0, "", 0
        while True:
            if stop.asked:
                self.cancel(stop_seconds)
                self._print(position)
                print(f"job {self.id} cancelled; the same command goes on from its last checkpoint", flush=True)
                sys.exit(EXIT_PREEMPTED)
            state = self.state()
            position = self._print(position)
            if state is None:
                raise UserError(f"Slurm no longer knows job {self.id}; run the same command again to go on")
            # A job that dies with its node, or queues again, may look finished for a moment.
            finals = 0 if state.active else finals + 1
            if finals == 2:
                return state
            if state.state == "PENDING" and state.reason != waiting:
                print(f"job {self.id} waits ({state.reason})", flush=True)
            waiting = state.reason if state.state == "PENDING" else ""
            time.sleep(POLL_SECONDS)

    def _print(self, position: int) -> int:
        """Passes on what the log has gained; returns its new end."""
        if not self.log.is_file():
            return position
        with self.log.open("rb") as file:
            file.seek(position)
            sys.stdout.write(file.read().decode(errors="replace"))
            sys.stdout.flush()
            return file.tell()


def sbatch_options(compute: ComputeProfile) -> list[str]:
    """A profile in sbatch's words."""
    slurm = compute.slurm
    per_node = compute.processes // slurm.nodes
    given = {
        "partition": slurm.partition,
        "account": slurm.account,
        "time": slurm.time_limit,
        "cpus-per-task": compute.threads,
        "gpus-per-node": per_node if compute.device == "cuda" else None,
    }
    return [
        f"--nodes={slurm.nodes}",
        f"--ntasks-per-node={per_node}",
        f"--signal=USR1@{slurm.stop_seconds}",
        *(f"--{name}={value}" for name, value in given.items() if value is not None),
        *slurm.options,
    ]


def train_as_job(stage: str, params: Params, compute: ComputeProfile) -> None:
    """Trains `stage1` or `stage2` as a Slurm job and fetches its result; exits with the job's status where it failed.

    A job for the same result that is queued or runs is followed instead of submitting another one, and a result that
    nobody fetched is fetched.

    Raises:
        UserError: an unknown stage, missing inputs, or Slurm is missing or refuses the job.
    """
    if stage not in OUTPUTS or not isinstance(getattr(params, stage), StageSettings):
        train_stage(stage, params, compute)  # refuses it, or has nothing to train
        return
    folder = RunFolder.named(stage, stage_identity(stage, params))
    job, stop = Job(stage, folder.key), StopSignals()
    if not folder.result.is_dir():
        state = job.state() if job.id else None
        if state and state.active:
            print(f"{stage}: following job {job.id}, which is {state.state.lower()} already", flush=True)
        else:
            job.submit(compute)
            print(f"{stage}: submitted job {job.id}, log in {job.log}", flush=True)
        _check(job, job.follow(stop, compute.slurm.stop_seconds))
    target = OUTPUTS[stage]
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder.result, target)
    print(f"{stage}: result of job {job.id} -> {target}", flush=True)


def _check(job: Job, state: JobState) -> None:
    """Exits with the job's status unless it completed."""
    if state.state == "COMPLETED":
        return
    why = {
        "CANCELLED": "was cancelled",  # by somebody else, who will not want it to be tried again
        "TIMEOUT": "met its time limit; give it more (slurm.time_limit), or more time to stop (slurm.stop_seconds)",
        "OUT_OF_MEMORY": "had not enough memory",
        "NODE_FAIL": "lost a node and could not queue again",
    }.get(state.state, f"failed with exit status {state.exit_code}")
    print(f"error: job {job.id} {why}; its log is {job.log}", file=sys.stderr, flush=True)
    sys.exit(state.exit_code if state.state == "FAILED" else 1)


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not installed here: a profile with launcher: slurm is used on a machine that submits to "
            "a Slurm cluster"
        ) from None
    if done.returncode:
        raise UserError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
