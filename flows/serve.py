"""`python -m flows.serve`: a Prefect server and a worker for this checkout, on this machine alone.

Brings up the server on loopback, deploys prefect.yaml, starts a worker in this folder, and ends both when it ends. Runs
that fall silent (their machine or worker died) are marked as crashed by an automation of the server.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil

from haplovl.errors import UserError
from haplovl.processes import INTERRUPT_SECONDS

POOL = "haplovl"
HOST = "127.0.0.1"
HOME = Path("runs/prefect-server")
HEARTBEAT_SECONDS = 30
SILENT_SECONDS = 3 * HEARTBEAT_SECONDS
ZOMBIES = f"haplovl: mark runs that are silent for {SILENT_SECONDS} s as crashed"
START_SECONDS = 180.0
END_SECONDS = 20
PREFECT = [sys.executable, "-m", "prefect"]


def environment(port: int) -> dict[str, str]:
    """What server, worker and flow runs see. A database is the user's own where Prefect's variable names one."""
    return {
        **os.environ,
        "PREFECT_HOME": str(HOME.absolute()),
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # dvc.yaml calls haplovl
    }


@contextmanager
def running(command: list[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, its output in a file; ended with all its children at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        end(process.pid)


def end(pid: int) -> None:
    """Ends a process and all its descendants, stages that run in groups of their own too: training saves its state."""
    try:
        parent = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    end_all([parent, *parent.children(recursive=True)])


def end_all(family: list[psutil.Process]) -> None:
    """Ends processes: asks first, and kills those that are still there after a while; training may write its state."""
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(family, timeout=END_SECONDS)
    if busy := [process for process in left if _trains(process)]:
        print("waiting for training to write a checkpoint ...", flush=True)
        psutil.wait_procs(busy, timeout=INTERRUPT_SECONDS)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=END_SECONDS)


def _trains(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return {"haplovl", "train"} <= set(process.cmdline())
    return False


def wait_for(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Waits until the server answers.

    Raises:
        UserError: it ended, or is silent for minutes.
    """
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        try:
            with urlopen(f"{url}/health", timeout=5):
                return
        except (URLError, OSError):
            if server.poll() is not None:
                raise UserError(f"the server ended at once; {log} ends with:\n{tail(log)}") from None
            time.sleep(0.3)
    raise UserError(f"the server did not answer within {START_SECONDS:.0f} s; see {log}")


def set_up(env: dict[str, str]) -> None:
    """The work pool, the deployments of prefect.yaml, the automation, and runs of a worker that is no more.

    Raises:
        UserError: Prefect refuses.
    """
    _prefect(env, "work-pool", "create", POOL, "--type", "process", "--overwrite")
    # One checkout, one DVC lock: whatever is deployed, one run at a time.
    _prefect(env, "work-pool", "set-concurrency-limit", POOL, "1")
    _prefect(env, "--no-prompt", "deploy", "--all")
    done = subprocess.run([sys.executable, "-m", "flows.serve", "--settle"], env=env, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the server could not be set up: {done.stderr.strip().splitlines()[-1]}")
    print(done.stdout, end="", flush=True)


def settle() -> None:
    """What needs Prefect's client; in a process of its own, as Prefect reads its URL when it is imported."""
    mark_lost_runs()
    make_automation()


def mark_lost_runs() -> None:
    """Marks runs as crashed that were under way when the pool's last worker died.

    No worker runs yet, so nobody works on them. Left as they are, they would hold the pool's only place.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    under_way = filters.FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
    state = filters.FlowRunFilterState(type=under_way)
    pool = filters.WorkPoolFilter(name=filters.WorkPoolFilterName(any_=[POOL]))
    with get_client(sync_client=True) as client:
        lost = client.read_flow_runs(flow_run_filter=filters.FlowRunFilter(state=state), work_pool_filter=pool)
        parents = filters.FlowRunFilterParentFlowRunId(any_=[run.id for run in lost])
        inner = filters.FlowRunFilter(state=state, parent_flow_run_id=parents)
        within = client.read_flow_runs(flow_run_filter=inner) if lost else []
        for run in [*within, *lost]:
            client.set_flow_run_state(run.id, Crashed(message="its worker died; run it again to go on"))
            print(f"marked  run {run.name} as crashed: its worker died")


def make_automation() -> None:
    """Creates the automation for silent runs, once: a new one would know nothing of runs that are silent already."""
    from prefect.automations import Automation
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    with suppress(ValueError):  # there is none yet
        Automation.read(name=ZOMBIES)
        return
    heartbeat = "prefect.flow-run.heartbeat"
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    Automation(
        name=ZOMBIES,
        trigger=EventTrigger(
            after={heartbeat, "prefect.flow-run.Running"},  # a run may die before its first sign of life
            expect={heartbeat, *ends},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message=f"no sign of life for {SILENT_SECONDS} s; run it again to go on"
            )
        ],
    ).create()


def _prefect(env: dict[str, str], *arguments: str) -> None:
    done = subprocess.run([*PREFECT, *arguments], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"prefect {' '.join(arguments)} failed:\n{(done.stderr or done.stdout).strip()}")


def tail(log: Path, lines: int = 8) -> str:
    """The last lines of a file."""
    return "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-lines:])


def serve(port: int) -> None:
    """Runs until Ctrl-C or SIGTERM.

    Raises:
        UserError: another server has the port, the server or the worker ends, or Prefect refuses a deployment.
    """
    HOME.mkdir(parents=True, exist_ok=True)
    env = environment(port)
    url = env["PREFECT_API_URL"]
    try:
        with urlopen(f"{url}/health", timeout=2):
            raise UserError(f"a server runs on port {port} already; give another one: make serve PORT=4201")
    except (URLError, OSError):
        pass
    server_log, worker_log = HOME / "server.log", HOME / "worker.log"
    with ExitStack() as stack:
        print("starting the server (half a minute) ...", flush=True)
        server = stack.enter_context(
            running([*PREFECT, "server", "start", "--host", HOST, "--port", str(port)], env, server_log)
        )
        wait_for(server, url, server_log)
        set_up(env)
        worker = stack.enter_context(running([*PREFECT, "worker", "start", "--pool", POOL], env, worker_log))
        print(
            f"open      http://{HOST}:{port}\n"
            f"run       PREFECT_API_URL={url} prefect deployment run haplovl-full/haplovl-full\n"
            f"new data  PREFECT_API_URL={url} prefect event emit haplovl.data.changed --resource-id haplovl.data\n"
            f"logs      {server_log}, {worker_log}\n"
            "Ctrl-C ends server, worker and what they run",
            flush=True,
        )
        below: list[psutil.Process] = []
        stack.callback(lambda: end_all(below))
        while True:
            # A worker that is killed leaves its run behind, which has no parent then by which to find it.
            with suppress(psutil.NoSuchProcess):
                below[:] = psutil.Process(worker.pid).children(recursive=True) or below
            for process, name, log in ((server, "server", server_log), (worker, "worker", worker_log)):
                if process.poll() is not None:
                    raise UserError(f"the {name} ended; {log} ends with:\n{tail(log)}")
            time.sleep(1)


def main() -> None:
    """Parses the command line and serves."""
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description="Server and worker on this machine.")
    parser.add_argument("--port", type=int, default=4200)
    parser.add_argument("--settle", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.settle:
        settle()
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        serve(arguments.port)
    except KeyboardInterrupt:
        print("\nended")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
