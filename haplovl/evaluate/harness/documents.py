"""What the YAML files of two tasks call inside lmms-eval: rows of a data set → rows of the benchmark."""

import os
from pathlib import Path
from typing import Any

from haplovl.evaluate.harness.tasks import GQA_PICTURES, find


def with_gqa_pictures(questions: Any) -> Any:
    """GQA's questions with the column `image`.

    lmms-eval's own function loads the pictures from the hub and stores them decoded; this one takes the local files and
    copies their bytes, which decode to the same pixels.
    """
    from datasets import Image, load_dataset

    (task,) = find(["gqa"])
    files = sorted(str(path) for path in Path(os.environ[GQA_PICTURES]).glob(task.picture_files))
    pictures = load_dataset("parquet", data_files=files, split="train").cast_column("image", Image(decode=False))
    content = {row["id"]: row["image"]["bytes"] for row in pictures}
    features = questions.features.copy() | {"image": Image()}
    return questions.map(
        lambda row: {"image": {"bytes": content[row["imageId"]], "path": None}},
        features=type(questions.features)(features),
        desc="GQA pictures",
    )


def only_seed_images(rows: Any) -> Any:
    """SEED-Bench's questions about single pictures: SEED-Bench-IMG."""
    (task,) = find(["seedbench_img"])
    column, value = task.keep or ("", "")
    return rows.filter(lambda found: found == value, input_columns=[column])
