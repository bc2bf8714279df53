"""Two models side by side: differences first, every question counted once, and no comparison of different exams."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from made_runs import REPO
from PIL import Image

from haplovl import cli
from haplovl.data.media import Media
from haplovl.data.validated import ImageFile, ValidatedRecord, write_validated
from haplovl.errors import UserError
from haplovl.evaluate.answer import Answer, load_model
from haplovl.evaluate.exams import read_questions, take_exam
from haplovl.evaluate.predictions import read_predictions
from haplovl.evaluate.questions import held_out_questions
from haplovl.evaluate.runner import ask_all, prediction_row
from haplovl.evaluate.side_by_side import counted, in_order, pair_up, show_side_by_side
from haplovl.files import RAW, sha256_of
from haplovl.records import Record, Turn
from haplovl.settings import EvaluateSettings

HOSTILE = "<script>alert('x')</script> & \"more\""
ANSWERS = [  # id, kind, right answer, A's prediction and confidence, B's
    ("q0", "count", "one", ("one", -0.1), ("One.", -0.2)),
    ("q1", "count", "two", ("two", -0.1), ("three", -0.5)),
    ("q2", "colour", "red", ("red", -0.3), ("blue", -0.01)),
    ("q3", "colour", "red", (HOSTILE, -0.2), ("red", -0.1)),
    ("q4", "colour", "red", ("blue", -0.2), ("white", -0.4)),
    ("q5", "colour", "red", ("blue", -0.2), ("Blue", -0.4)),
]


def rows(side, root):
    """Lines of predictions.jsonl; q0 has two pictures, q5 has none."""
    out = []
    for number, (id_, kind, answer, *sides) in enumerate(ANSWERS):
        names = [f"{name}.png" for name in ("small", "large")[: {0: 2, 5: 0}.get(number, 1)]]
        prediction, confidence = sides[side]
        out.append(
            {
                "id": id_,
                "kind": kind,
                "question": f"What of {id_}?",
                "answer": answer,
                "prediction": prediction,
                "blank_prediction": "",
                "source": "own",
                "images": [f"file:{name}" for name in names],
                "image_sha256": [sha256_of(root / RAW / "own/media" / name) for name in names],
                "correct": prediction == answer,
                "confidence": confidence,
            }
        )
    return out


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def project(tmp_path: Path, monkeypatch) -> Path:
    """A folder with two predictions about collected pictures."""
    media = tmp_path / RAW / "own/media"
    media.mkdir(parents=True)
    Image.new("RGB", (32, 32), (200, 30, 30)).save(media / "small.png")
    Image.new("RGB", (900, 600), (30, 30, 200)).save(media / "large.png")
    for side, name in enumerate("ab"):
        write(tmp_path / f"{name}.jsonl", rows(side, tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(project, name, **changes):
    """b.jsonl with other values in its second line, or without a column where the value is None."""
    lines = rows(1, project)
    lines[1] = {key: value for key, value in {**lines[1], **changes}.items() if value is not None}
    return write(project / name, lines)


def test_differences_come_first_and_surest_mistakes_before_others(project):
    pairs = pair_up(read_predictions(Path("a.jsonl")), read_predictions(Path("b.jsonl")))
    assert [(pair.question.id, pair.group) for pair in in_order(pairs)] == [
        ("q2", "only_a"),  # B was surer of its mistake than with q1
        ("q1", "only_a"),
        ("q3", "only_b"),
        ("q4", "both_wrong_differently"),
        ("q5", "both_wrong_alike"),
        ("q0", "both_right"),
    ]


def test_every_question_is_counted_once(project):
    pairs = pair_up(read_predictions(Path("a.jsonl")), read_predictions(Path("b.jsonl")))
    assert counted(pairs) == (
        ["both right", "only A", "only B", "both wrong", "questions"],
        [("colour", [0, 1, 1, 2, 4]), ("count", [1, 1, 0, 0, 2]), ("all", [1, 2, 1, 2, 6])],
    )


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["haplovl", "side-by-side", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_the_command_writes_a_page_that_needs_nothing_else(project, monkeypatch, capsys):
    assert run(monkeypatch, "a.jsonl", "b.jsonl") in (0, None)
    told = capsys.readouterr().out
    assert "only A" in told and "A is a.jsonl, B is b.jsonl" in told and "reports/side_by_side/index.html" in told
    page = Path("reports/side_by_side/index.html").read_text(encoding="utf-8")
    references = set(re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page))
    assert {reference for reference in references if not reference.startswith("data:")} == {"answers.jsonl"}
    assert "<script" not in page and "&lt;script&gt;alert" in page and str(project) not in page
    assert page.count("<article") == 6 and page.count("<img") == 6 and "no picture" in page
    titles = re.findall(r"<h2>([^<]*)", page)[1:]
    assert [title.strip() for title in titles] == [
        "A is right, B is wrong",
        "B is right, A is wrong",
        "Both are wrong, and say different things",
        "Both are wrong, and say the same",
        "Both are right",
    ]
    lines = [json.loads(line) for line in Path("reports/side_by_side/answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["q2", "q1", "q3", "q4", "q5", "q0"]
    assert lines[0]["a"] == {"prediction": "red", "correct": True, "confidence": -0.3}

    before = {path.name: path.read_bytes() for path in Path("reports/side_by_side").iterdir()}
    run(monkeypatch, "a.jsonl", "b.jsonl")
    assert {path.name: path.read_bytes() for path in Path("reports/side_by_side").iterdir()} == before


def test_types_are_no_markup(project, monkeypatch, capsys):
    lines = [{**row, "kind": "[/x][bold]"} for row in rows(0, project)]
    write(Path("x.jsonl"), lines)
    assert run(monkeypatch, "x.jsonl", "x.jsonl") in (0, None)
    assert "[/x][bold]" in capsys.readouterr().out


def test_a_picture_that_is_another_one_now_is_not_shown(project, monkeypatch):
    Image.new("RGB", (32, 32), "green").save(project / RAW / "own/media/small.png")
    (project / RAW / "own/media/large.png").unlink()
    assert run(monkeypatch, "a.jsonl", "b.jsonl") in (0, None)
    page = Path("reports/side_by_side/index.html").read_text(encoding="utf-8")
    assert page.count("<img") == 0 and page.count("the picture is not here") == 6


def test_long_groups_are_cut_and_that_is_said(project, monkeypatch):
    monkeypatch.setattr("haplovl.evaluate.side_by_side.DIFFERENCES_SHOWN", 1)
    assert run(monkeypatch, "a.jsonl", "b.jsonl") in (0, None)
    page = Path("reports/side_by_side/index.html").read_text(encoding="utf-8")
    assert page.count("<article") == 5 and "The 1 with the surest mistakes" in page
    assert "What of q2?" in page and "What of q1?" not in page


def test_two_models_that_agree_have_a_page_as_well(project, monkeypatch):
    assert run(monkeypatch, "a.jsonl", "a.jsonl") in (0, None)
    assert "Both models answer every question alike" in Path("reports/side_by_side/index.html").read_text("utf-8")


DIFFERENT_DATA = "a.jsonl and x.jsonl were asked on different test data: 1 of 6 questions differ, such as 'q1' in "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"id": "q9"},
            "a.jsonl and x.jsonl answer different questions: 1 only a.jsonl (such as 'q1') and 1 only x.jsonl",
        ),
        ({"answer": "four"}, DIFFERENT_DATA + "its right answer ('two' and 'four')"),
        ({"question": "Else?"}, DIFFERENT_DATA + "its words ('What of q1?' and 'Else?')"),
        ({"image_sha256": ["00"]}, DIFFERENT_DATA + "the content of its pictures"),
        ({"id": "q0"}, "x.jsonl, line 2: the question 'q0' occurs twice"),
        ({"image_sha256": None}, "x.jsonl, line 2: 'image_sha256' is missing; 'haplovl evaluate' writes it"),
        ({"image_sha256": []}, "x.jsonl, line 2: there are 1 images, but 0 image_sha256"),
        ({"kind": "all"}, "x.jsonl, line 2: 'all' names all questions together and cannot be the type of some"),
        ({"prediction": None}, "x.jsonl, line 2: 'prediction' is missing"),
        ({"prediction": 3}, "x.jsonl, line 2: 'prediction' must be a string"),
        ({"confidence": "high"}, "x.jsonl, line 2: 'confidence' must be a number"),
        ({"confidence": float("nan")}, "x.jsonl, line 2: 'confidence' must be a number"),
        ({"confidence": -(10**400)}, "x.jsonl, line 2: 'confidence' must be a number"),
    ],
)
def test_predictions_that_cannot_be_compared_are_refused(project, monkeypatch, changes, message):
    changed(project, "x.jsonl", **changes)
    code = run(monkeypatch, "a.jsonl", "x.jsonl")
    assert str(code).startswith(f"error: {message}") and "\n" not in str(code)
    assert not Path("reports/side_by_side").exists()


@pytest.mark.parametrize(
    ("second", "content", "message"),
    [
        ("x.jsonl", "{", "x.jsonl, line 1: not valid JSON"),
        ("x.jsonl", "[1]\n", "x.jsonl, line 1: expected a JSON object, found list"),
        ("x.jsonl", "", "x.jsonl holds no predictions"),
        ("none", None, "there is neither a model's folder nor a file of predictions at none"),
        ("data", None, "data is no model: it holds no readable config.json"),
    ],
)
def test_what_is_neither_model_nor_predictions_is_refused(project, monkeypatch, second, content, message):
    if content is not None:
        Path(second).write_text(content)
    code = run(monkeypatch, "a.jsonl", second)
    assert str(code).startswith(f"error: {message}") and "\n" not in str(code)


def test_questions_of_ones_own_are_put_to_two_models(project, tiny_model_dir, monkeypatch, capsys):
    shutil.copytree(tiny_model_dir, "one")
    shutil.copytree(tiny_model_dir, "two")
    Image.new("RGB", (40, 20), "red").save("photo.png")
    own = [
        {"question": "Which digit is red?", "images": "photo.png", "answer": "7", "kind": "digit"},
        {"question": "Which digit is white?", "images": ["photo.png", "photo.png"]},
        {"id": "mine", "question": "Is one a number?"},
    ]
    write(Path("own.jsonl"), own)
    assert run(monkeypatch, "one", "two", "--questions", "own.jsonl", "--max-new-tokens", 3) in (0, None)
    lines = [json.loads(line) for line in Path("reports/side_by_side/answers.jsonl").read_text().splitlines()]
    assert {line["id"]: line["group"] for line in lines} == {
        "own-1": "both_wrong_alike",
        "own-2": "alike",
        "mine": "alike",
    }
    assert "A is one, B is two" in capsys.readouterr().out
    page = Path("reports/side_by_side/index.html").read_text(encoding="utf-8")
    assert page.count("<img") == 3 and "where a right answer is known (1)" in page


def test_a_model_answers_as_its_predictions_say(project, tiny_model_dir, monkeypatch):
    """Predictions of one model against the model itself: the evaluation's questions, and no difference."""
    Path("data/validated").mkdir(parents=True)
    image = ImageFile("file:small.png", sha256_of(project / RAW / "own/media/small.png"), 32, 32)
    turns = (Turn("<image>\nWhich digit is red?", "3", "digit"), Turn("Is there a 3?", "yes", "presence"))
    record = Record("r", ("file:small.png",), turns, "test")
    write_validated(Path("data/validated"), [ValidatedRecord(record, (image,), "own")])
    outcomes = ask_all(*load_model(tiny_model_dir), held_out_questions(200), Media(), EvaluateSettings())
    write(Path("its.jsonl"), map(prediction_row, outcomes))
    exam = take_exam(tiny_model_dir, Path("its.jsonl"))
    first, second = (
        {id_: (said.prediction, said.confidence) for id_, said in side.answers.items()}
        for side in (exam.first, exam.second)
    )
    assert first == second and set(first) == {"r#0", "r#1"}
    show_side_by_side(exam)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "Which?", "images": "none.png"}, "own.jsonl, line 1: none.png: the image is missing"),
        ({"question": "Which?", "images": "own.jsonl"}, "own.jsonl, line 1: own.jsonl: not an image in a known format"),
        ({"question": "Which?", "images": [3]}, "own.jsonl, line 1: 'images' must be a path or a list of paths"),
        (
            {"question": "Which?", "images": "http://a/b.png"},
            "own.jsonl, line 1: http://a/b.png: a URL is no local file",
        ),
        ({"question": "Which?", "kind": "all"}, "own.jsonl, line 1: 'all' names all questions together"),
        ({"question": " "}, "own.jsonl, line 1: the question is empty"),
        ({"images": []}, "own.jsonl, line 1: 'question' is missing"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(project, line, message):
    write(Path("own.jsonl"), [line])
    with pytest.raises(UserError) as refused:
        read_questions(Path("own.jsonl"))
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_models_are_asked_as_the_evaluation_asks_them(project, tiny_model_dir, monkeypatch):
    """In the same precision, and in batches as small as params.yaml says."""
    asked = {}

    def noted(model, processor, texts, *_, **settings):
        asked.update(settings, dtype=model.dtype)
        return [Answer("7", -0.1) for _ in texts]

    shutil.copytree(tiny_model_dir, "half")
    config = json.loads(Path("half/config.json").read_text()) | {"dtype": "bfloat16"}
    Path("half/config.json").write_text(json.dumps(config))
    settings = yaml.safe_load((REPO / "params.yaml").read_text())
    settings["evaluate"] |= {"batch": 3, "batch_tokens": 777}
    Path("params.yaml").write_text(yaml.safe_dump(settings))
    write(Path("own.jsonl"), [{"id": "q0", "question": "Which?"}])
    monkeypatch.setattr("haplovl.evaluate.exams.scored_answers", noted)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    take_exam(Path("half"), Path("half"), Path("own.jsonl"))
    assert (asked["batch"], asked["batch_tokens"], asked["dtype"]) == (3, 777, torch.float32)


def test_questions_without_a_model_to_ask_are_refused(project):
    write(Path("own.jsonl"), [{"question": "Which?"}])
    with pytest.raises(UserError, match="--questions is for models to answer"):
        take_exam(Path("a.jsonl"), Path("b.jsonl"), Path("own.jsonl"))
    write(Path("own.jsonl"), [])
    with pytest.raises(UserError, match=r"own\.jsonl holds no questions"):
        read_questions(Path("own.jsonl"))


def test_a_question_with_a_placeholder_is_refused(project, tiny_model_dir):
    write(Path("own.jsonl"), [{"question": "Which <image>?"}])
    with pytest.raises(UserError, match="question 'own-1' holds '<image>', which means something special"):
        take_exam(tiny_model_dir, Path("a.jsonl"), Path("own.jsonl"))
