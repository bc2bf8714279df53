"""`make serve`: a real server and worker that the test starts; deployments, an event, one run at a time, a dead run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import Request, urlopen

import psutil
import pytest
from sockets import listening, open_to_others

ROOT = Path(__file__).parents[2]
DVC_YAML = """
stages:
  only:
    cmd: sleep 2; cp source.txt out.txt; echo $HAPLOVL_COMPUTE > compute.txt
    deps: [source.txt]
    outs: [out.txt]
"""
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "project"
    root.mkdir()
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "source.txt").write_text("first\n")
    (root / ".gitignore").write_text("/runs/\n/out.txt\n/compute.txt\n/flows/\n")
    shutil.copy(ROOT / "prefect.yaml", root)
    (root / "infra/compute").mkdir(parents=True)
    for name in ("elsewhere", "laptop"):
        (root / f"infra/compute/{name}.yaml").touch()
    shutil.copytree(ROOT / "flows", root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=root, check=True)
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "start"], cwd=root, check=True)
    return root


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(root, status=0):
    """Server and worker; yields a function that asks `prefect` about them, and the port. They end with this status."""
    port = free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    command = [sys.executable, "-m", "flows.serve", "--port", str(port)]
    log = (root.parent / "serve.log").open("w+")
    served = subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=log, start_new_session=True)

    def said():
        log.seek(0)
        return log.read()

    def prefect(*arguments):
        url = {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "COLUMNS": "250", "NO_COLOR": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments], cwd=root, env={**env, **url}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        wait_until(lambda: "Ctrl-C ends" in said() or served.poll() is not None, 240)
        assert served.poll() is None, said()
        sockets = listening(served.pid)
        assert sockets and open_to_others(sockets) == []
        yield prefect, port
    finally:
        served.send_signal(signal.SIGINT)
        served.wait(60)
    assert served.returncode == status, said()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def wait_until(happened, seconds):
    until = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.5)
    return found


def test_deployments_run_here_one_at_a_time_and_new_data_starts_the_second(project):
    with serving(project) as (prefect, port):
        # Only this machine may connect.
        others = [address for *_, address in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)]
        for host, _ in others:
            if not host.startswith("127."):
                with pytest.raises(OSError):
                    socket.create_connection((host, port), timeout=2)

        with pytest.raises(AssertionError, match="nowhere"):
            prefect("deployment", "run", "haplovl-full/haplovl-full", "-p", "compute=nowhere")
        prefect("deployment", "run", "haplovl-full/haplovl-full", "-p", "compute=elsewhere", "--watch")
        assert (project / "out.txt").read_text() == "first\n"
        assert (project / "compute.txt").read_text() == "elsewhere\n"

        (project / "source.txt").write_text("second\n")
        prefect("event", "emit", "haplovl.data.changed", "--resource-id", "haplovl.data")
        wait_until(lambda: (project / "out.txt").exists() and (project / "out.txt").read_text() == "second\n", 120)

        pool = json.loads(prefect("work-pool", "inspect", "haplovl", "--output", "json"))
        assert pool["concurrency_limit"] == 1
        assert "nightly" in prefect("deployment", "inspect", "haplovl-retrain/haplovl-retrain")
        assert "silent for 90 s as crashed" in prefect("automation", "ls")


def test_the_end_of_serving_ends_the_stage_that_runs(project):
    (project / "dvc.yaml").write_text(DVC_YAML.replace("sleep 2;", "echo $$ > pid; exec sleep 300;"))
    with serving(project) as (prefect, _):
        prefect("deployment", "run", "haplovl-full/haplovl-full")
        pid = int(wait_until(lambda: (project / "pid").exists() and (project / "pid").read_text().strip(), 120))
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_a_run_whose_machine_died_is_marked_as_crashed_and_the_next_one_goes_on(project):
    """The worker and its run are killed at once; the server, which stands for another machine, lives on."""
    waits = "test -f again || { echo $$ > pid; exec sleep 300; };"
    (project / "dvc.yaml").write_text(DVC_YAML.replace("sleep 2;", waits))
    with serving(project, status=1) as (prefect, port):
        prefect("deployment", "run", "haplovl-full/haplovl-full")
        stage = psutil.Process(int(wait_until(lambda: (project / "pid").exists() and read(project / "pid"), 120)))
        served = next(one for one in stage.parents() if "flows.serve" in " ".join(one.cmdline()))
        worker = next(one for one in served.children() if "prefect worker start" in " ".join(one.cmdline()))
        family = [worker, *worker.children(recursive=True)]
        time.sleep(40)  # a heartbeat comes every half a minute, and the run must have shown one
        served.suspend()  # it would end the server as well
        try:
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            wait_until(lambda: states(port) == ["CRASHED"], 240)
        finally:
            served.resume()
        wait_until(lambda: served.status() == psutil.STATUS_ZOMBIE, 60)  # it has noticed, too
    (project / "again").touch()
    with serving(project) as (prefect, port):
        prefect("deployment", "run", "haplovl-full/haplovl-full", "--watch")
        assert states(port) == ["COMPLETED", "CRASHED"]
    assert (project / "out.txt").read_text() == "first\n"


def read(path):
    return path.read_text().strip()


def states(port):
    """The types of all flow runs' states."""
    request = Request(
        f"http://127.0.0.1:{port}/api/flow_runs/filter", data=b"{}", headers={"Content-Type": "application/json"}
    )
    with urlopen(request, timeout=10) as answer:
        return sorted(run["state_type"] for run in json.load(answer))
