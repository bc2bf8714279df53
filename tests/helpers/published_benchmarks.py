"""Stand-ins of the eleven benchmarks: a few hand-made questions each, in the columns and files of the published sets.

The questions are our own and the pictures are drawn here; only the layout is the published one.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COLOURS = ("red", "green", "blue", "orange", "purple", "black")


def picture(number: int) -> dict[str, Any]:
    """A coloured square on white, as the cell of a table; every number gives another picture."""
    image = Image.new("RGB", (40 + 4 * number, 36), "white")
    ImageDraw.Draw(image).rectangle([4, 4, 20 + number, 24], fill=COLOURS[number % len(COLOURS)])
    content = io.BytesIO()
    image.save(content, "PNG")
    return {"bytes": content.getvalue(), "path": f"{number}.png"}


def write_benchmark(name: str, data: Path, change: Callable[[list[dict[str, Any]]], Any] = lambda rows: None) -> Path:
    """Writes `data`/NAME as the hub has it. `change` may spoil the rows of questions first."""
    rows, schema, file = PUBLISHED[name]()
    change(rows)
    write_table(data / name / file, rows, schema)
    if name == "gqa":
        pictures = [{"id": image, "image": picture(number)} for number, image in enumerate(("n1", "n2", "unused"))]
        file = "testdev_balanced_images/testdev-00000-of-00001.parquet"
        write_table(data / name / file, pictures, {"id": pa.string(), "image": PICTURE})
    return data / name


def write_table(path: Path, rows: list[dict[str, Any]], schema: dict[str, pa.DataType]) -> None:
    """A Parquet file that the datasets library reads with its features, as the published ones."""
    features = {name: _feature(kind) for name, kind in schema.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.Table.from_pylist(rows, pa.schema(list(schema.items()), metadata=metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)


def _feature(kind: pa.DataType) -> Any:
    if kind == PICTURE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    return {"dtype": str(kind), "_type": "Value"}


def _texts(*names: str) -> dict[str, pa.DataType]:
    return dict.fromkeys(names, pa.string())


Published = tuple[list[dict[str, Any]], dict[str, pa.DataType], str]


def gqa() -> Published:
    asked = [
        ("Is the square red?", "yes", "n1"),
        ("What colour is the square?", "green", "n2"),
        ("Is there a square?", "yes", "n1"),
        ("Is the square large?", "no", "n2"),
    ]
    rows = [
        {
            "id": f"20{i}",
            "imageId": image,
            "question": question,
            "answer": answer,
            "fullAnswer": f"The answer is {answer}.",
            "isBalanced": True,
            "groups": {"global": "colour", "local": f"06-square_{i}"},
            "entailed": "",
            "equivalent": f"['20{i}']",
            "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"},
            "semantic": [{"operation": "select", "argument": "square", "dependencies": []}],
            "semanticStr": "select: square",
        }
        for i, (question, answer, image) in enumerate(asked)
    ]
    step = [("operation", pa.string()), ("argument", pa.string()), ("dependencies", pa.list_(pa.int32()))]
    schema = {
        **_texts("id", "imageId", "question", "answer", "fullAnswer"),
        "isBalanced": pa.bool_(),
        "groups": pa.struct(list(_texts("global", "local").items())),
        **_texts("entailed", "equivalent"),
        "types": pa.struct(list(_texts("structural", "semantic", "detailed").items())),
        "semantic": pa.list_(pa.struct(step)),
        "semanticStr": pa.string(),
    }
    return rows, schema, "testdev_balanced_instructions/testdev-00000-of-00001.parquet"


def vqav2() -> Published:
    def answers(*given: str) -> list[dict[str, Any]]:
        return [{"answer": said, "answer_confidence": "yes", "answer_id": i} for i, said in enumerate(given, 1)]

    asked = [
        ("Is this a square?", "yes/no", "yes", answers(*["yes"] * 10)),
        ("Is it blue?", "yes/no", "no", answers(*["no"] * 8, "yes", "yes")),
        ("What shape is it?", "other", "square", answers(*["square"] * 7, "a square", "box", "rectangle")),
    ]
    rows = [
        {
            "question_type": "is this a" if kind == "yes/no" else "what",
            "multiple_choice_answer": most,
            "answers": given,
            "image_id": 100 + i,
            "answer_type": kind,
            "question_id": 100_000 + i,
            "question": question,
            "image": picture(i),
        }
        for i, (question, kind, most, given) in enumerate(asked)
    ]
    answer = [("answer", pa.string()), ("answer_confidence", pa.string()), ("answer_id", pa.int64())]
    schema = {
        **_texts("question_type", "multiple_choice_answer"),
        "answers": pa.list_(pa.struct(answer)),
        "image_id": pa.int64(),
        "answer_type": pa.string(),
        "question_id": pa.int64(),
        "question": pa.string(),
        "image": PICTURE,
    }
    return rows, schema, "data/validation-00000-of-00001.parquet"


def scienceqa_img() -> Published:
    asked = [
        ("Which colour is shown?", ["red", "green", "blue"], 0, "The picture shows a square."),
        ("Which shape is shown?", ["circle", "square"], 1, ""),
        ("What is drawn?", ["a square", "a star", "a line", "a moon"], 0, ""),
    ]
    rows = [
        {
            "image": picture(i),
            "question": question,
            "choices": choices,
            "answer": answer,
            "hint": hint,
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "topic": "physics",
            "category": "Colours",
            "skill": "Name the colour",
            "lecture": "",
            "solution": "Look at the square.",
        }
        for i, (question, choices, answer, hint) in enumerate(asked)
    ]
    schema = {
        "image": PICTURE,
        "question": pa.string(),
        "choices": pa.list_(pa.string()),
        "answer": pa.int8(),
        **_texts("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"),
    }
    return rows, schema, "ScienceQA-IMG/test-00000-of-00001.parquet"


def ai2d() -> Published:
    asked = [
        ("What does the diagram show?", ["a square", "a leaf", "a cell", "a root"], "0"),
        ("Which part is coloured?", ["none", "the inside", "the edge", "all"], "1"),
        ("How many parts are there?", ["one", "two", "three", "four"], "0"),
    ]
    rows = [
        {"question": question, "options": options, "answer": answer, "image": picture(i)}
        for i, (question, options, answer) in enumerate(asked)
    ]
    schema = {"question": pa.string(), "options": pa.list_(pa.string()), "answer": pa.string(), "image": PICTURE}
    return rows, schema, "data/test-00000-of-00001.parquet"


def mmbench_en_dev() -> Published:
    """Question 1 with its options rotated once (right only where both are), and question 2 of two options."""
    asked = [
        (1, "Which colour is it?", "nan", "A", ("red", "green", "blue", "white")),
        (1_000_001, "Which colour is it?", "nan", "D", ("green", "blue", "white", "red")),
        (2, "Is it a square?", "Look at the corners.", "A", ("yes", "no", "nan", "nan")),
        (3, "What is it?", "nan", "A", ("a square", "a car", "a dog", "nan")),
    ]
    rows = [
        {
            "index": index,
            "question": question,
            "hint": hint,
            "answer": answer,
            **dict(zip("ABCD", options, strict=True)),
            "category": "attribute_recognition",
            "image": picture(index % 1_000_000),
            "source": "own",
            "L2-category": "finegrained_perception",
            "comment": "nan",
            "split": "dev",
        }
        for index, question, hint, answer, options in asked
    ]
    schema = {
        "index": pa.int64(),
        **_texts("question", "hint", "answer", "A", "B", "C", "D", "category"),
        "image": PICTURE,
        **_texts("source", "L2-category", "comment", "split"),
    }
    return rows, schema, "en/dev-00000-of-00001.parquet"


def mmmu_val() -> Published:
    """One picture, two out of their order, pictures as options, and an open question."""
    asked = [
        ("validation_Art_1", "<image 1> What is drawn?", "['a square', 'a star', 'a tree', 'a face']", "A", 1),
        ("validation_Art_2", "Which of <image 2> and <image 1> is red?", "['the first', 'the second']", "B", 2),
        ("validation_Math_3", "Which is a square?", "['<image 1>', '<image 2>', 'both']", "A", 2),
        ("validation_Math_4", "<image 1> How many squares are there?", "[]", "1", 1),
    ]
    rows = [
        {
            "id": name,
            "question": question,
            "options": options,
            "explanation": "",
            **{f"image_{n}": picture(i + n) if n <= pictures else None for n in range(1, 8)},
            "img_type": "['Drawings']",
            "answer": answer,
            "topic_difficulty": "Easy",
            "question_type": "open" if options == "[]" else "multiple-choice",
            "subfield": "Drawing",
        }
        for i, (name, question, options, answer, pictures) in enumerate(asked)
    ]
    schema = {
        **_texts("id", "question", "options", "explanation"),
        **{f"image_{n}": PICTURE for n in range(1, 8)},
        **_texts("img_type", "answer", "topic_difficulty", "question_type", "subfield"),
    }
    return rows, schema, "data/validation-00000-of-00001.parquet"


def realworldqa() -> Published:
    ask = "Please answer directly with only the letter of the correct option and nothing else."
    asked = [
        (f"Where is the square?\n\nA. Left\nB. Right\n{ask}", "A"),
        ("How many squares are there? Please answer directly with a single word or number.", "1"),
        ("Is the square coloured? Please answer directly with a single word or number.", "Yes"),
    ]
    rows = [
        {"image_path": f"{i}.webp", "question": question, "answer": answer, "image": picture(i)}
        for i, (question, answer) in enumerate(asked)
    ]
    return rows, {**_texts("image_path", "question", "answer"), "image": PICTURE}, "data/test-00000-of-00001.parquet"


def mmstar() -> Published:
    kinds = [
        ("coarse perception", "image emotion"),
        ("math", "geometry"),
        ("math", "geometry"),
        ("logical reasoning", "diagram reasoning"),
    ]
    rows = [
        {
            "index": i,
            "question": f"<image 1>Which is shown in picture {i}?\nOptions: A: square, B: star, C: moon, D: line",
            "image": picture(i),
            "answer": "ABAA"[i],
            "category": category,
            "l2_category": finer,
            "meta_info": {"source": "own", "split": "val", "image_path": f"{i}.png"},
        }
        for i, (category, finer) in enumerate(kinds)
    ]
    schema = {
        "index": pa.int64(),
        "question": pa.string(),
        "image": PICTURE,
        **_texts("answer", "category", "l2_category"),
        "meta_info": pa.struct(list(_texts("source", "split", "image_path").items())),
    }
    return rows, schema, "mmstar.parquet"


def pope() -> Published:
    asked = [
        ("square", "yes", "random"),
        ("dog", "no", "random"),
        ("square", "yes", "popular"),
        ("car", "no", "popular"),
    ]
    rows = [
        {
            "id": str(i),
            "question_id": str(i + 1),
            "question": f"Is there a {what} in the image?",
            "answer": answer,
            "image_source": f"COCO_val2014_{i:012d}",
            "image": picture(i),
            "category": category,
        }
        for i, (what, answer, category) in enumerate(asked)
    ]
    schema = {
        **_texts("id", "question_id", "question", "answer", "image_source"),
        "image": PICTURE,
        "category": pa.string(),
    }
    return rows, schema, "data/test-00000-of-00001.parquet"


def seedbench_img() -> Published:
    """Three questions about a picture, and one about a video, which is no part of SEED-Bench-IMG."""
    asked = [("image", "A"), ("video", "A"), ("image", "C"), ("image", "A")]
    rows = [
        {
            "answer": answer,
            **{f"choice_{letter}": f"{letter} {what}" for letter, what in zip("abcd", COLOURS, strict=False)},
            "data_id": f"{i}_0",
            "data_type": kind,
            "question": f"Which colour has square {i}?",
            "question_id": str(500 + i),
            "question_type_id": 3,
            "image": [picture(i)] if kind == "image" else [picture(i), picture(i + 1)],
            "segment": None if kind == "image" else [1, 5],
        }
        for i, (kind, answer) in enumerate(asked)
    ]
    schema = {
        **_texts("answer", "choice_a", "choice_b", "choice_c", "choice_d", "data_id", "data_type"),
        **_texts("question", "question_id"),
        "question_type_id": pa.int16(),
        "image": pa.list_(PICTURE),
        "segment": pa.list_(pa.int64()),
    }
    return rows, schema, "data/test-00000-of-00001.parquet"


def mmvp() -> Published:
    asked = [
        ("Is the square left or right?", "(a) Left (b) Right", "(a)"),
        ("Is the square left or right?", "(a) Left (b) Right", "(b)"),
        ("Is the square small or large?", "(a) Small (b) Large", "(a)"),
        ("Is the square small or large?", "(a) Small (b) Large", "(a)"),
    ]
    rows = [
        {"Index": i, "Question": question, "Options": options, "Correct Answer": answer, "image": picture(i)}
        for i, (question, options, answer) in enumerate(asked, 1)
    ]
    schema = {"Index": pa.int32(), **_texts("Question", "Options", "Correct Answer"), "image": PICTURE}
    return rows, schema, "data/train-00000-of-00001.parquet"


PUBLISHED: dict[str, Callable[[], Published]] = {
    function.__name__: function
    for function in (
        *(gqa, vqav2, scienceqa_img, ai2d, mmbench_en_dev, mmmu_val),
        *(realworldqa, mmstar, pope, seedbench_img, mmvp),
    )
}
