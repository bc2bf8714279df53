"""Runs in .venv-infra, where the tools of infra/ are: checks a file with its own tool's schema, prints what it read.

`python check_infra.py KIND FILE` exits with 1 and the tool's message where the file does not fit.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"
os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-2")  # pcluster wants one; nothing is asked of it


def sky(text: str) -> Any:
    """SkyPilot's own parser of tasks, with its schemas for tasks, resources and storage."""
    import sky

    given = {name: "x" for name, value in yaml.safe_load(text)["envs"].items() if value is None}
    given["HAPLOVL_STATE_BUCKET"] = "a-bucket"
    task = sky.Task.from_yaml_config(yaml.safe_load(text), env_overrides=list(given.items()))
    resources, storage = next(iter(task.resources)), next(iter(task.storage_mounts.values()))
    return {
        "recovery": resources.job_recovery,
        "accelerators": resources.accelerators,
        "spot": resources.use_spot,
        "storage": [storage.name, storage.mode.value],
        "round trip": sorted(task.to_yaml_config()),
    }


def sky_states(_: str) -> Any:
    """A record of SkyPilot's queue as `sky jobs queue -o json` prints it, and all states of a job."""
    from sky.jobs.state import ManagedJobStatus
    from sky.schemas.api.responses import ManagedJobRecord

    record = ManagedJobRecord(job_id=1, job_name="j", status=ManagedJobStatus.FAILED, failure_reason="why")
    ended = {status.value: status.is_terminal() for status in ManagedJobStatus}
    return {"record": json.loads(json.dumps(record.model_dump(mode="json"))), "ended": ended}


def pcluster(text: str) -> Any:
    """AWS ParallelCluster's schema of cluster files."""
    from pcluster.schemas.cluster_schema import ClusterSchema

    cluster = ClusterSchema(cluster_name="haplovl").load(yaml.safe_load(text))
    queue = cluster.scheduling.queues[0]
    return {
        "os": cluster.image.os,
        "queue": queue.name,
        "capacity": queue.capacity_type.value,
        "instances": queue.compute_resources[0].instance_type,
        "efa": queue.compute_resources[0].efa.enabled,
        "storage": [storage.shared_storage_type.value for storage in cluster.shared_storage],
    }


def kubernetes(text: str) -> Any:
    """Kubernetes' own objects by its published JSON schemas, Kubeflow's by the models that its project publishes."""
    kinds = []
    for document in yaml.safe_load_all(text):
        kinds.append(document["kind"])
        if document["kind"] in ("TrainJob", "TrainingRuntime"):
            _kubeflow(document)
        else:
            import kubernetes_validate

            kubernetes_validate.validate(document, "1.32", strict=True)
    return kinds


def _kubeflow(document: dict[str, Any]) -> None:
    import kubeflow_trainer_api.models as models

    kind = {"TrainJob": models.TrainerV1alpha1TrainJob, "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime}
    assert document["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    read = kind[document["kind"]].from_dict(document)
    # The models leave out what they do not know, so whatever they lost was misspelt.
    lost = sorted(_lost(document, json.loads(read.to_json())))
    assert not lost, f"unknown keys: {lost}"


def _lost(given: Any, read: Any, name: str = "") -> set[str]:
    if isinstance(given, dict) and isinstance(read, dict):
        return {lost for key in given for lost in _lost(given[key], read.get(key), f"{name}.{key}")}
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        return {lost for number, item in enumerate(given) for lost in _lost(item, read[number], f"{name}.{number}")}
    return set() if given == read else {name}


if __name__ == "__main__":
    check = {"sky": sky, "sky-states": sky_states, "pcluster": pcluster, "kubernetes": kubernetes}[sys.argv[1]]
    try:
        print(json.dumps(check(Path(sys.argv[2]).read_text()), default=str))
    except Exception as error:
        sys.exit(f"{sys.argv[2]}: {type(error).__name__}: {error}")
