"""The page needs nothing but itself, trusts no text that it shows, and comes out the same twice."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from haplovl.data.validated import ImageFile
from haplovl.evaluate.looks import WRONG, DrawnLook, chosen
from haplovl.evaluate.plots import MAX_POINTS, loss_curves
from haplovl.evaluate.questions import Question, digest
from haplovl.evaluate.report import OPEN_ENDED, OTHER, confusion, sample, worst_mistakes, write_report
from haplovl.evaluate.scorers import Outcome, score
from haplovl.settings import Params, load_params

HOSTILE = "<script>alert('x')</script> & \"more\""
PARAMS_FILE = Path(__file__).parents[2] / "params.yaml"
KINDS = {"colour": ("red", "blue"), "count": ("one", "two", "three")}


@pytest.fixture
def params() -> Params:
    return load_params(PARAMS_FILE)


def make_outcomes(per_kind: int) -> list[Outcome]:
    outcomes = []
    for kind, answers in KINDS.items():
        for i in range(per_kind):
            pictures = tuple(ImageFile(f"file:{name}.png", "00", 32, 32) for name in ("small", "large")[: 1 + i % 2])
            question = Question(
                f"{kind}-{i}#1", f"{kind}-{i}", kind, pictures, f"{kind} {i}?", answers[i % len(answers)], "own"
            )
            wrong = i % 3 == 0
            outcomes.append(Outcome(question, HOSTILE if wrong else question.answer, answers[0], -0.1 * i))
    return outcomes


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with what a finished pipeline leaves for the report."""
    images = tmp_path / "data/raw/own/media"
    images.mkdir(parents=True)
    Image.new("RGB", (32, 32), (200, 30, 30)).save(images / "small.png")
    Image.new("RGB", (900, 600), (30, 30, 200)).save(images / "large.png")
    for stage, parts in {"stage1": ("loss_vision", "loss_feature", "loss_current_token"), "stage2": ()}.items():
        (tmp_path / "models" / stage).mkdir(parents=True)
        lines = [{"step": s, "loss": 3.0 / s, **dict.fromkeys(parts, 1.0 / s)} for s in range(1, 21)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "models" / stage / "training_log.jsonl").write_text(text)
    documents = {
        "models/teachers/teachers.json": {"vision": {"kind": "train", "sha256": "f00d", "model": {"layers": 4}}},
        "data/prepared/manifest.json": {"shards": [{"file": "a", "sha256": "0", "records": 1234, "split": "train"}]},
        "metrics/validation.json": {"records": 10, "accepted": 9, "quarantined": 1, "reasons": {HOSTILE: 1}},
    }
    for name, content in documents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def page_of(project: Path, params: Params, outcomes: list[Outcome], name: str = "index.html", looks=()) -> str:
    questions = [outcome.question for outcome in outcomes]
    metrics = {**score(outcomes), "questions": len(questions), "data": {"sha256": digest(questions)}}
    write_report(project / name, params, metrics, outcomes, project, looks)
    return (project / name).read_text(encoding="utf-8")


def test_a_line_separator_in_a_log_ends_no_line(project: Path, params: Params) -> None:
    log = project / "models/stage2/training_log.jsonl"
    line = json.dumps({"step": 21, "loss": 0.1, "note": "a\u2028b\x85c"}, ensure_ascii=False)
    log.write_text(log.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    assert "Stage 2: instruction tuning" in page_of(project, params, make_outcomes(2))


def test_the_page_is_self_contained(project: Path, params: Params) -> None:
    page = page_of(project, params, make_outcomes(20))
    references = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    outside = {reference for reference in references if not reference.startswith("data:")}
    assert outside == {"../data_docs/index.html", "predictions.jsonl"}
    assert "http" not in re.sub(r"data:[^\"]*", "", page)
    assert "@import" not in page and "url(" not in page
    assert str(project) not in page
    assert page.count("<article") == params.evaluate.samples_in_report + 12
    for shown in ("Stage 1: distillation", "Stage 2: instruction tuning", "f00d", "model.layers", "1,234"):
        assert shown in page


def test_where_answers_look_is_on_the_page(project: Path, params: Params) -> None:
    outcomes = make_outcomes(20)
    looks = [DrawnLook(outcome, b"a figure") for outcome in chosen(outcomes)]
    page = page_of(project, params, outcomes, looks=looks)
    assert page.count("data:image/png;base64,YSBmaWd1cmU=") == len(looks) == 2 + WRONG
    assert "Where answers look" in page and "<script" not in page
    assert "Where answers look" not in page_of(project, params, outcomes)


def test_looks_are_right_answers_of_all_types_and_the_surest_mistakes() -> None:
    outcomes = make_outcomes(20)
    looked_at = chosen(outcomes)
    assert [outcome.correct for outcome in looked_at] == [True] * 2 + [False] * WRONG
    assert {outcome.question.kind for outcome in looked_at[:2]} == set(KINDS)
    assert looked_at[2:] == worst_mistakes(outcomes, WRONG)


def test_text_of_unknown_origin_is_escaped(project: Path, params: Params) -> None:
    page = page_of(project, params, make_outcomes(20))
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page


def test_the_same_run_gives_the_same_bytes(project: Path, params: Params) -> None:
    outcomes = make_outcomes(20)
    assert page_of(project, params, outcomes, "a.html") == page_of(project, params, outcomes, "b.html")


def test_the_gate_does_not_change_the_page(project: Path, params: Params) -> None:
    moved = params.model_copy(update={"register_": params.register_.model_copy(update={"min_accuracy": 0.1})})
    outcomes = make_outcomes(5)
    assert page_of(project, params, outcomes, "a.html") == page_of(project, moved, outcomes, "b.html")


def test_a_perfect_model_and_a_bare_folder_have_a_page(tmp_path: Path, params: Params) -> None:
    (tmp_path / "models/stage2").mkdir(parents=True)
    outcomes = [Outcome(Question("a#0", "a", "count", (), "How many?", "one"), "one", "two", 0.0)]
    page = page_of(tmp_path, params, outcomes)
    assert "every answer is right" in page
    assert "Stage 1" not in page


def test_samples_are_spread_and_do_not_depend_on_the_answers() -> None:
    outcomes = make_outcomes(40)
    chosen = sample(outcomes, 10)
    assert [o.question.kind for o in chosen] == ["colour"] * 5 + ["count"] * 5
    other_model = [Outcome(o.question, "no idea", "", -1.0) for o in reversed(outcomes)]
    assert [o.question.id for o in sample(other_model, 10)] == [o.question.id for o in chosen]
    assert len(sample(outcomes, 1000)) == 80


def test_worst_mistakes_are_wrong_and_surest_first() -> None:
    worst = worst_mistakes(make_outcomes(20), 5)
    assert not any(outcome.correct for outcome in worst)
    assert [outcome.confidence for outcome in worst] == sorted((o.confidence for o in worst), reverse=True)
    assert worst[0].confidence == 0.0


def test_confusion_counts_every_question_once() -> None:
    outcomes = [o for o in make_outcomes(21) if o.question.kind == "count"]
    table = confusion(outcomes)
    assert table["columns"] == ["one", "three", "two", OTHER]
    assert [row["answer"] for row in table["rows"]] == ["one", "three", "two"]
    assert sum(cell["count"] for row in table["rows"] for cell in row["cells"]) == 21
    # Every third prediction is nonsense, and every third answer is "one": the two coincide.
    one = {name: cell["count"] for name, cell in zip(table["columns"], table["rows"][0]["cells"], strict=True)}
    assert one == {"one": 0, "three": 0, "two": 0, OTHER: 7}


def test_open_ended_answers_have_no_confusion_table(tmp_path: Path, params: Params) -> None:
    (tmp_path / "models/stage2").mkdir(parents=True)
    questions = [Question(f"{i}#0", str(i), "answer", (), "Why?", f"because of {i}") for i in range(OPEN_ENDED + 1)]
    outcomes = [Outcome(question, "because", "", -1.0) for question in questions]
    assert confusion(outcomes) is None
    assert "open-ended" in page_of(tmp_path, params, outcomes)


def test_long_curves_stay_small() -> None:
    log = [{"step": step, "loss": 1.0 / step} for step in range(1, 40_001)]
    assert len(loss_curves(log)) < 3 * len(loss_curves(log[:MAX_POINTS]))
