"""The files of infra/ against the schemas of their own tools, and that these tell a mistake; needs .venv-infra."""

import json
import os
import re
import string
import subprocess
from pathlib import Path

import pytest
import yaml

from flows.sky import _ended
from haplovl.settings import load_compute
from haplovl.train.launch import EXIT_PREEMPTED

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-infra/bin/python"
KUBERNETES = ROOT / "infra/kubernetes"
FILLED_IN = {"STAGE": "stage1", "REPO": "https://example.org/x.git", "COMMIT": "a" * 40, "LOCK": "H4sIAAAA"}

pytestmark = pytest.mark.infra


@pytest.fixture(autouse=True, scope="module")
def environment():
    if not PYTHON.exists():
        pytest.skip("no .venv-infra; run 'make test-infra'")


@pytest.fixture
def check(tmp_path):
    """`check(kind, text)`: what the tool read; fails with its message where it does not fit."""

    def run(kind, text, fits=True):
        (tmp_path / "file").write_text(text)
        done = subprocess.run(
            [PYTHON, ROOT / "tests/helpers/check_infra.py", kind, tmp_path / "file"],
            capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)},
        )  # fmt: skip
        assert (done.returncode == 0) == fits, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1]) if fits else done.stderr

    return run


def kubernetes_file(name):
    values = {f"HAPLOVL_{key}": value for key, value in FILLED_IN.items()}
    return string.Template((KUBERNETES / name).read_text().replace('"$HAPLOVL', '"$$HAPLOVL')).substitute(values)


def test_skypilot_reads_the_task(check):
    text = (ROOT / "infra/sky/train.yaml").read_text()
    read = check("sky", text)
    assert read["recovery"]["recover_on_exit_codes"] == [EXIT_PREEMPTED]
    assert read["spot"] and read["accelerators"] == {"H100": 8} and read["storage"] == ["a-bucket", "MOUNT_CACHED"]
    assert "use_spott" in check("sky", text.replace("use_spot:", "use_spott:"), fits=False)
    assert "MOUNT_CASHED" in check("sky", text.replace("MOUNT_CACHED", "MOUNT_CASHED"), fits=False)
    assert "setups" in check("sky", text.replace("setup:", "setups:"), fits=False)


def test_skypilot_speaks_as_the_flow_expects(check):
    """States, names and kinds of what `sky jobs queue -o json` prints."""
    read = check("sky-states", "")
    assert {"job_id", "job_name", "status", "failure_reason"} <= set(read["record"])
    assert read["record"]["status"] == "FAILED"
    assert all(_ended({"status": status}) == ended for status, ended in read["ended"].items())


def test_skypilot_knows_the_words_that_the_flow_says(tmp_path):
    sky = str(PYTHON.parent / "sky")
    for command, flags in {
        "check": ["--output"],
        "jobs launch": ["--name", "--num-nodes", "--env", "--secret", "--detach-run", "--yes"],
        "jobs queue": ["--refresh", "--verbose", "--all", "--output"],
        "jobs logs": ["--tail", "--follow"],
        "jobs cancel": ["--name", "--yes", "--graceful"],
    }.items():
        own = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
        done = subprocess.run([sky, *command.split(), "--help"], capture_output=True, text=True, env=own)
        assert all(re.search(rf"{flag}\b", done.stdout) for flag in flags), command


@pytest.mark.parametrize("name", ["sky-8gpu", "sky-32gpu"])
def test_profiles_rent_what_the_task_has(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    profile = load_compute(name)
    task = yaml.safe_load(Path(profile.sky.task).read_text())
    gpus = int(task["resources"]["accelerators"].split(":")[1])
    assert profile.processes == profile.sky.nodes * gpus


def test_parallelcluster_reads_the_cluster(check):
    text = (ROOT / "infra/aws/cluster.yaml").read_text()
    read = check("pcluster", text)
    assert read["instances"] == "p5.48xlarge" and read["efa"] and read["storage"] == ["fsx"]
    assert "MaxCounts" in check("pcluster", text.replace("MaxCount:", "MaxCounts:"), fits=False)
    assert "DeploymentType" in check("pcluster", text.replace("PERSISTENT_2", "PERSISTENT_9"), fits=False)


def test_kubeflow_and_kubernetes_read_their_files(check):
    for name, kinds in {
        "runtime": ["TrainingRuntime"],
        "train": ["TrainJob"],
        "storage": ["PersistentVolumeClaim"],
        "checkout": ["Job"],
    }.items():
        assert check("kubernetes", kubernetes_file(f"{name}.yaml")) == kinds
    train, runtime = kubernetes_file("train.yaml"), kubernetes_file("runtime.yaml")
    assert "numNodess" in check("kubernetes", train.replace("numNodes:", "numNodess:"), fits=False)
    assert "podFailurePolicies" in check(
        "kubernetes", runtime.replace("podFailurePolicy:", "podFailurePolicies:"), fits=False
    )
    assert "accessMode" in check(
        "kubernetes", kubernetes_file("storage.yaml").replace("accessModes", "accessMode"), fits=False
    )


def test_the_runtime_starts_again_after_a_checkpoint_on_a_signal():
    runtime = yaml.safe_load((KUBERNETES / "runtime.yaml").read_text())
    job = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert EXIT_PREEMPTED in job["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]


def test_the_work_pool_template_fits_prefect_and_makes_a_job(check):
    """Variables as Prefect's server checks them, the same top keys as its own template, and a valid Job in the end."""
    from prefect.server.api.collections_data import views
    from prefect.utilities.schema_tools.validation import validate
    from prefect.utilities.templating import apply_values

    template = json.loads((KUBERNETES / "work-pool.json").read_text())
    own = json.loads((Path(views.__path__[0]) / "aggregate-worker-metadata.json").read_text())
    own = own["prefect-kubernetes"]["kubernetes"]["default_base_job_configuration"]
    assert set(template["job_configuration"]) <= set(own["job_configuration"])
    values = {
        name: entry["default"] for name, entry in template["variables"]["properties"].items() if "default" in entry
    }
    validate(values, template["variables"], raise_on_error=True)
    values |= {"name": "run", "command": "prefect flow-run execute", "labels": {"a": "b"}}
    made = apply_values(template["job_configuration"], values, remove_notset=True)
    manifest = made["job_manifest"]
    pod = manifest["spec"]["template"]["spec"]
    # Prefect's worker (prefect-kubernetes 0.8.0) insists on both in this place, where Kubernetes ignores them.
    assert pod.pop("parallelism") == 1 and pod.pop("completions") == 1
    container = pod["containers"][0]
    # The worker turns these two from what it templates into what Kubernetes wants.
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    container["args"] = container["args"].split()
    assert check("kubernetes", json.dumps(manifest)) == ["Job"]


def test_hadolint_reads_the_container_recipe():
    recipe = ROOT / "infra/container/Dockerfile"
    done = subprocess.run([PYTHON.parent / "hadolint", recipe], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stdout


def test_the_container_pins_what_decides_the_numbers():
    recipe = (ROOT / "infra/container/Dockerfile").read_text()
    gpu = (ROOT / "infra/container/constraints-gpu.txt").read_text()
    pinned = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^FROM nvidia/cuda:\d+\.\d+\.\d+-cudnn-devel-ubuntu\d", recipe, re.MULTILINE)
    assert re.search(r"^flash-attn-4==\S+$", gpu, re.MULTILINE) and "deepspeed==" in pinned
    torch = re.search(r"^torch==(\S+)$", pinned, re.MULTILINE)[1]
    cuda = re.search(r"cuda:(\d+)\.(\d+)", recipe)
    assert f"torch=={torch}+cu{cuda[1]}{cuda[2]}" in gpu
