"""The eleven benchmarks: where the published data lie, what they hold, and the lmms-eval task that each follows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from haplovl.errors import UserError
from haplovl.evaluate.benchmarks.catalogue import BENCHMARKS

GQA_PICTURES = "HAPLOVL_GQA_PICTURES"
"""Environment variable: the folder of GQA, for the function that joins its two data sets (lmms-eval names none)."""


@dataclass(frozen=True)
class Task:
    """One benchmark. `stock` is the task's YAML file below lmms-eval's tasks; `files` and `picture_files` are patterns
    below the data folder, as the published data set `source` has them.

    `columns` maps what the task reads to its kind (see `folders.py`); `keep` is the (column, value) of the rows that
    belong to the benchmark; `metric` the figure that papers quote, which counts up to `scale`.
    """

    name: str
    title: str
    source: str
    stock: str
    split: str
    files: str
    columns: dict[str, str]
    metric: str
    scale: float = 1.0
    picture_files: str = ""
    keep: tuple[str, str] | None = None
    overrides: dict[str, str] = field(default_factory=dict)

    @property
    def local(self) -> str:
        """The name under which lmms-eval knows the task on local data; stock names belong to the hub's."""
        return f"{self.name}_local"

    @property
    def published(self) -> int:
        """The number of questions of the published data set."""
        return BENCHMARKS[self.name].published


ID, TEXT, NUMBER = "text or whole number", "text", "whole number"
TEXTS, ANSWERS, PICTURE, PICTURES = "list of texts", "list of answers", "picture", "list of pictures"

TASKS = (
    Task(
        "gqa",
        "GQA",
        "lmms-lab/GQA",
        "gqa/gqa.yaml",
        "testdev",
        "testdev_balanced_instructions/testdev-*.parquet",
        {"id": ID, "imageId": ID, "question": TEXT, "answer": TEXT},
        "exact_match,none",
        picture_files="testdev_balanced_images/testdev-*.parquet",
        overrides={"process_docs": "haplovl.evaluate.harness.documents.with_gqa_pictures"},
    ),
    Task(
        "vqav2",
        "VQAv2 (validation)",
        "lmms-lab/VQAv2",
        "vqav2/vqav2_val.yaml",
        "validation",
        "data/validation-*.parquet",
        {"question_id": ID, "question": TEXT, "answers": ANSWERS, "image": PICTURE},
        "exact_match,none",
    ),
    Task(
        "scienceqa_img",
        "ScienceQA-IMG",
        "lmms-lab/ScienceQA",
        "scienceqa/scienceqa_img.yaml",
        "test",
        "ScienceQA-IMG/test-*.parquet",
        {"question": TEXT, "choices": TEXTS, "answer": NUMBER, "hint": TEXT, "image": PICTURE},
        "exact_match,none",
    ),
    Task(
        "ai2d",
        "AI2D",
        "lmms-lab/ai2d",
        "ai2d/ai2d.yaml",
        "test",
        "data/test-*.parquet",
        {"question": TEXT, "options": TEXTS, "answer": TEXT, "image": PICTURE},
        "exact_match,flexible-extract",
    ),
    Task(
        "mmbench_en_dev",
        "MMBench-EN-dev",
        "lmms-lab/MMBench",
        "mmbench/mmbench_en_dev_static.yaml",
        "dev",
        "en/dev-*.parquet",
        {
            **dict.fromkeys(("question", "hint", "answer", "A", "B", "C", "D"), TEXT),
            **dict.fromkeys(("category", "L2-category", "source", "split"), TEXT),
            "index": NUMBER,
            "image": PICTURE,
        },
        "gpt_eval_score,none",
        scale=100.0,
    ),
    Task(
        "mmmu_val",
        "MMMU (validation)",
        "lmms-lab/MMMU",
        "mmmu/mmmu_val.yaml",
        "validation",
        "data/validation-*.parquet",
        {
            **dict.fromkeys(("id", "question", "options", "answer", "question_type"), TEXT),
            **{f"image_{number}": PICTURE for number in range(1, 8)},
        },
        "mmmu_acc,none",
    ),
    Task(
        "realworldqa",
        "RealWorldQA",
        "lmms-lab/RealWorldQA",
        "realworldqa/realworldqa.yaml",
        "test",
        "data/test-*.parquet",
        {"question": TEXT, "answer": TEXT, "image": PICTURE},
        "exact_match,none",
    ),
    Task(
        "mmstar",
        "MMStar",
        "Lin-Chen/MMStar",
        "mmstar/mmstar.yaml",
        "val",
        "mmstar.parquet",
        {
            **dict.fromkeys(("question", "answer", "category", "l2_category"), TEXT),
            "index": ID,
            "image": PICTURE,
        },
        "average,none",
    ),
    Task(
        "pope",
        "POPE",
        "lmms-lab/POPE",
        "pope/pope.yaml",
        "test",
        "data/test-*.parquet",
        {"question_id": ID, "question": TEXT, "answer": TEXT, "category": TEXT, "image": PICTURE},
        "pope_accuracy,none",
    ),
    Task(
        "seedbench_img",
        "SEED-Bench-IMG",
        "lmms-lab/SEED-Bench",
        "seedbench/seedbench.yaml",
        "test",
        "data/test-*.parquet",
        {
            "question_id": ID,
            **dict.fromkeys(("question", "answer", "data_type"), TEXT),
            **dict.fromkeys(("choice_a", "choice_b", "choice_c", "choice_d"), TEXT),
            "image": PICTURES,
        },
        "seed_image,none",
        keep=("data_type", "image"),
        overrides={"process_docs": "haplovl.evaluate.harness.documents.only_seed_images"},
    ),
    Task(
        "mmvp",
        "MMVP",
        "lmms-lab-eval/MMVP",
        "mmvp/mmvp.yaml",
        "train",
        "data/train-*.parquet",
        {"Index": NUMBER, "Question": TEXT, "Options": TEXT, "Correct Answer": TEXT, "image": PICTURE},
        "mmvp_pair_accuracy,none",
    ),
)
NAMES = tuple(task.name for task in TASKS)


def find(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, each once; `all` stands for all eleven.

    Raises:
        UserError: there is no such task.
    """
    unknown = [name for name in names if name not in (*NAMES, "all")]
    if unknown:
        raise UserError(f"there is no benchmark '{unknown[0]}'; there are {', '.join(NAMES)}, and all")
    return [task for task in TASKS if task.name in names or "all" in names]


def task_yaml(task: Task, stock_tasks: Path, files: Sequence[Path]) -> str:
    """The YAML file that runs lmms-eval's own task on local files: it includes the task and redirects its data.

    `stock_tasks` is lmms-eval's folder of tasks.
    """
    config = {
        "include": str(stock_tasks / task.stock),
        "task": task.local,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {task.split: [str(path) for path in files]}},
    }
    lines = [f"{key}: !function {function}\n" for key, function in task.overrides.items()]
    return yaml.safe_dump(config, sort_keys=False, width=1000) + "".join(lines)
