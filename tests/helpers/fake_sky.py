#!/usr/bin/env python3
"""A stand-in for the `sky` command that runs a task's setup and run on this machine, one folder for every node.

It knows the words that flows/sky.py says, and no others. Buckets are folders. FAKE_SKY_HOME holds its files; a node
gets a new home for every attempt, as a rented one would. What it prints has the form of SkyPilot 0.14.1.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

HOME = Path(os.environ["FAKE_SKY_HOME"])


def main() -> None:
    words = sys.argv[1:]
    with (HOME / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    if words[:1] == ["check"]:
        clouds = json.loads(os.environ.get("FAKE_SKY_CLOUDS", '{"AWS": ["compute"]}'))
        print(json.dumps({"default": clouds}))
    elif words[:2] == ["jobs", "queue"]:
        if not jobs():
            sys.exit("sky.exceptions.ClusterDoesNotExist: Cluster 'sky-jobs-controller-0' does not exist.")
        print("Fetching managed job statuses...")
        print(json.dumps(jobs(), indent=2))
    elif words[:2] == ["jobs", "launch"]:
        launch(words[2:])
    elif words[:2] == ["jobs", "logs"]:
        follow(int(words[2]))
    elif words[:2] == ["jobs", "cancel"]:
        cancel(words[words.index("--name") + 1])
    elif words[:1] == ["controller"]:
        control(int(words[1]))
    else:
        sys.exit(f"Error: no such command: {words}")


def jobs() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(HOME.glob("job-*.json"))]


def note(job: dict) -> None:
    path = HOME / f"job-{job['job_id']}.json"
    path.with_suffix(".partial").write_text(json.dumps(job))
    path.with_suffix(".partial").replace(path)


def read(number: int) -> dict:
    return json.loads((HOME / f"job-{number}.json").read_text())


def launch(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    for flag in ("--yes", "--detach-run"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--name", required=True)
    parser.add_argument("--num-nodes", type=int)
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--secret", action="append", default=[])
    given = parser.parse_args(words)
    task = yaml.safe_load(Path(given.task).read_text())
    task["num_nodes"] = given.num_nodes or task["num_nodes"]
    task["envs"] |= dict(item.split("=", 1) for item in given.env)
    missing = [name for name, value in task["envs"].items() if value is None]
    assert not missing, f"missing variables: {missing}"
    number = len(jobs()) + 1
    (HOME / f"task-{number}.json").write_text(json.dumps(task))
    note({"job_id": number, "job_name": given.name, "status": "PENDING", "failure_reason": None, "recovery_count": 0})
    subprocess.Popen([sys.executable, __file__, "controller", str(number)], start_new_session=True)
    print(f"Managed Job ID: {number}")


def control(number: int) -> None:
    """What SkyPilot's controller does: nodes, their commands, and another attempt where the task asks for one."""
    task, job = json.loads((HOME / f"task-{number}.json").read_text()), read(number)
    again = task["resources"]["job_recovery"]["recover_on_exit_codes"]
    # Whatever the task mounts is a folder that outlives the nodes.
    mounts = {path: HOME / "buckets" / path.strip("/") for path in task["file_mounts"]}
    for mount in mounts.values():
        mount.mkdir(parents=True, exist_ok=True)
    envs = {name: str(mounts.get(value, value)) for name, value in task["envs"].items()}
    while True:
        homes = [HOME / f"node-{number}-{job['recovery_count']}-{rank}" for rank in range(task["num_nodes"])]
        shared = {"SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * len(homes)), "SKYPILOT_NUM_NODES": str(len(homes))}
        nodes = []
        with (HOME / f"log-{number}").open("ab") as log:
            for rank, home in enumerate(homes):
                home.mkdir()
                own = {**os.environ, **envs, **shared, "HOME": str(home), "SKYPILOT_NODE_RANK": str(rank)}
                subprocess.run(["bash", "-c", task["setup"]], cwd=home, env=own, stdout=log, stderr=log, check=True)
                nodes.append(
                    subprocess.Popen(
                        ["bash", "-c", task["run"]], cwd=home, env=own, stdout=log, stderr=log, start_new_session=True
                    )
                )
            job |= {"status": "RUNNING", "pids": [node.pid for node in nodes]}
            note(job)
            codes = wait(nodes)
        if read(number)["status"] == "CANCELLED":
            return
        if not any(codes):
            note(job | {"status": "SUCCEEDED"})
            return
        if not any(code in again or code < 0 for code in codes):  # below 0: the node was taken away
            worst = max(codes)
            note(job | {"status": "FAILED", "failure_reason": f"Job exited with exit code {worst}. See the log."})
            return
        job |= {"status": "RECOVERING", "recovery_count": job["recovery_count"] + 1}
        note(job)


def wait(nodes: list[subprocess.Popen]) -> list[int]:
    """Exit statuses of the nodes; when one fails the others are ended."""
    while any(node.poll() is None for node in nodes):
        if any(node.poll() for node in nodes):
            time.sleep(2)
            for node in nodes:
                if node.poll() is None:
                    os.killpg(node.pid, signal.SIGKILL)
        time.sleep(0.1)
    return [node.returncode for node in nodes]


def follow(number: int) -> None:
    position = 0
    while True:
        ended = read(number)["status"] in ("SUCCEEDED", "FAILED", "CANCELLED")
        path = HOME / f"log-{number}"
        text = path.read_text(errors="replace") if path.exists() else ""
        print(text[position:], end="", flush=True)
        position = len(text)
        if ended:
            return
        time.sleep(0.2)


def cancel(name: str) -> None:
    for job in jobs():
        if job["job_name"] == name and job["status"] in ("PENDING", "RUNNING", "RECOVERING"):
            note(job | {"status": "CANCELLED"})
            for pid in job.get("pids", []):
                os.kill(pid, signal.SIGTERM)


if __name__ == "__main__":
    main()
