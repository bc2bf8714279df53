"""The table of benchmarks, and the YAML files that point lmms-eval's tasks at local data."""

from pathlib import Path

import pytest
import yaml
from published_benchmarks import PUBLISHED

from haplovl.errors import UserError
from haplovl.evaluate.harness.folders import _is_of
from haplovl.evaluate.harness.tasks import NAMES, TASKS, find, task_yaml


class _WithFunctions(yaml.SafeLoader):
    """Reads lmms-eval's !function as its text."""


_WithFunctions.add_constructor("!function", lambda loader, node: f"function {node.value}")


def test_there_are_the_eleven_benchmarks_of_the_paper() -> None:
    assert sorted(NAMES) == sorted(PUBLISHED)
    assert len(NAMES) == 11


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_stand_ins_have_the_columns_that_the_task_reads(task) -> None:
    rows, schema, file = PUBLISHED[task.name]()
    assert 3 <= len(rows) <= 6
    assert Path(file).match(task.files)
    for name, kind in task.columns.items():
        assert _is_of(kind, schema[name]), name


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_task_file_includes_the_stock_task_and_changes_only_the_data(task) -> None:
    files = [Path("/data/a-00000-of-00002.parquet"), Path("/data/a, b.parquet")]
    config = yaml.load(task_yaml(task, Path("/env/lmms_eval/tasks"), files), _WithFunctions)
    assert config.pop("include") == f"/env/lmms_eval/tasks/{task.stock}"
    assert config.pop("task") == f"{task.name}_local"
    assert config.pop("dataset_path") == "parquet"
    assert config.pop("dataset_name") is None
    assert config.pop("dataset_kwargs") == {"data_files": {task.split: [str(file) for file in files]}}
    # What is left chooses or joins rows; prompts, generation settings and scores stay lmms-eval's.
    assert set(config) <= {"process_docs"}
    assert set(config) == ({"process_docs"} if task.name in ("gqa", "seedbench_img") else set())


def test_names_are_taken_once_and_in_a_fixed_order() -> None:
    assert [task.name for task in find(["pope", "gqa", "pope"])] == ["gqa", "pope"]
    assert [task.name for task in find(["all"])] == list(NAMES)


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no benchmark 'mme'; there are gqa, vqav2, .*, mmvp, and all"):
        find(["pope", "mme"])
