"""What validation finds across records: pictures that look alike, evaluation sets, drift, odd sizes and texts."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from small_data import photograph, record

from haplovl.data.profile import accept
from haplovl.errors import UserError


def png(width: int, height: int, colour: str = "blue") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


# --- pictures that look alike ----------------------------------------------------------------------------------------
def near_copies() -> tuple[list[dict], dict[str, bytes]]:
    """A training picture whose smaller, re-encoded copy is in test, a copy of it within train, and strangers."""
    images = {
        "one.jpg": photograph(1),
        "one-again.jpg": photograph(1, quality=50, size=(120, 90)),
        "two.jpg": photograph(2),
        "two-again.jpg": photograph(2, quality=60),
        "three.jpg": photograph(3),
    }
    splits = {"one.jpg": "train", "one-again.jpg": "test", "two.jpg": "train", "two-again.jpg": "train"}
    records = [record(name, name, split=splits.get(name, "validation")) for name in images]
    return records, images


def test_held_out_pictures_are_not_seen_in_training_not_even_re_encoded(check) -> None:
    records, images = near_copies()
    outcome = check(records, images, near=4)
    assert outcome.reasons == {
        "one.jpg": ["near_duplicate: file:one.jpg in train looks like file:one-again.jpg in test"]
    }
    assert set(outcome.accepted) == set(images) - {"one.jpg"}
    assert outcome.metrics["duplicates"] == {"copied_pictures": 0, "similar_pictures": 2}


def test_near_duplicates_are_looked_for_only_where_the_source_wants_it(check) -> None:
    records, images = near_copies()
    outcome = check(records, images)
    assert outcome.reasons == {}
    assert outcome.metrics["duplicates"] == {"copied_pictures": 0, "similar_pictures": 0}


def test_pictures_that_look_alike_fall_into_one_split(check) -> None:
    images = {f"{seed}-{quality}.jpg": photograph(seed, quality) for seed in range(30) for quality in (60, 75, 90)}
    outcome = check([record(name, name) for name in images], images, near=4, splits={"validation": 0.2, "test": 0.3})
    assert outcome.reasons == {}
    splits = {name: row.record.split for name, row in outcome.accepted.items()}
    by_seed = [{splits[f"{seed}-{quality}.jpg"] for quality in (60, 75, 90)} for seed in range(30)]
    assert all(len(found) == 1 for found in by_seed)
    assert len(set().union(*by_seed)) == 3


def test_blank_pages_are_no_near_duplicates(check) -> None:
    images = {"a.png": png(40, 30, "white"), "b.png": png(50, 60, "white")}
    outcome = check([record("a", "a.png", split="train"), record("b", "b.png", split="test")], images, near=10)
    assert outcome.reasons == {}


# --- single pictures and texts ---------------------------------------------------------------------------------------
def test_sizes_and_shapes_have_limits(check) -> None:
    images = {"dot.png": png(1, 1), "line.png": png(900, 10), "fine.png": png(300, 12), "misnamed.png": photograph(1)}
    outcome = check([record(name, name) for name in images], images)
    assert outcome.reasons == {
        "dot.png": ["image_size: file:dot.png: 1x1 pixels"],
        "line.png": ["image_size: file:line.png: 900x10 pixels"],
    }
    # A JPEG that is called PNG is decoded by its content.
    assert set(outcome.accepted) == {"fine.png", "misnamed.png"}
    looser = check([record(name, name) for name in images], images, min_image_side=1, max_aspect_ratio=100)
    assert looser.reasons == {}


def test_texts_that_teach_nothing_or_are_damaged(check) -> None:
    records = [
        record("dots", answer="..."),
        record("loop", answer="the the the the the the the the"),
        record("mojibake", answer="A cafÃ© in Paris."),
        record("lost", question="What is \ufffd?"),
        record("nul", answer="A\0b"),
        record("long", answer="word " * 300),
        record("fine", answer="A café — 好的 🙂."),
    ]
    outcome = check(records, max_characters=1000)
    assert outcome.reasons == {
        "dots": ["degenerate: answer 1: only punctuation"],
        "loop": ["degenerate: answer 1: one word repeated"],
        "mojibake": ["encoding: the text holds UTF-8 that was read as another encoding: cafÃ©"],
        "lost": ["encoding: the text holds the replacement character U+FFFD, which stands for lost text"],
        "nul": ["encoding: the text holds the control character U+0000"],
        "long": ["entry: the text has 1515 characters, more than the limit of 1000"],
    }
    assert list(outcome.accepted) == ["fine"]


def test_ids_that_repeat_are_refused_or_numbered(check) -> None:
    records = [record("a"), record("a", answer="Another."), record("a"), record("a~2"), record("a", answer="A third.")]
    refused = check(records)
    assert [row["reasons"] for row in refused.quarantine] == [
        [f"duplicate_id: {n} earlier records have the same id"] for n in (1, 2, 3)
    ]
    numbered = check(records, repeated_ids="number")
    answers = {id_: row.record.turns[0].answer for id_, row in numbered.accepted.items()}
    assert answers == {"a": "A square.", "a~3": "Another.", "a~2": "A square.", "a~4": "A third."}
    assert [row["reasons"] for row in numbered.quarantine] == [
        ["duplicate_id: 1 earlier records have the same id and content"]
    ]


# --- evaluation sets -------------------------------------------------------------------------------------------------
LONG = "Which of these planets has the largest number of known moons?"


def test_what_evaluation_sets_hold_is_kept_out_of_training(check, tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    bench = tmp_path / "bench"
    (bench / "images").mkdir(parents=True)
    (bench / "images/seen.jpg").write_bytes(photograph(1))
    (bench / "images/broken.jpg").write_bytes(photograph(9)[:300])
    (bench / "questions.json").write_text(json.dumps({"data": [{"question": LONG, "answer": "Saturn"}]}))
    (bench / "more.jsonl").write_text('{"text": "What is this?"}\n{broken\n')
    table = pa.table({"image": [{"bytes": photograph(2), "path": "x.jpg"}], "question": ["What is in the picture?"]})
    pq.write_table(table, bench / "test.parquet")
    images = {
        "copy.jpg": photograph(1),
        "near.jpg": photograph(1, quality=60),
        "embedded.jpg": photograph(2),
        "held-out.jpg": photograph(2),
        "other.jpg": photograph(3),
    }
    records = [record(name, name, split="test" if "held" in name else "train") for name in images]
    records += [record("asked", question=LONG.upper()), record("short", question="What is this?")]
    records.append(record("asked-of-a-picture", "other.jpg", question=LONG, split="train"))
    outcome = check(records, images, near=4, benchmarks=[str(bench)])
    assert {id_: reasons[-1] for id_, reasons in outcome.reasons.items()} == {
        "copy.jpg": "contamination: file:copy.jpg is, or looks like, a picture of an evaluation set",
        "near.jpg": "contamination: file:near.jpg is, or looks like, a picture of an evaluation set",
        "embedded.jpg": "contamination: file:embedded.jpg is, or looks like, a picture of an evaluation set",
        "asked": "contamination: a question is, word for word, in an evaluation set",
    }
    found = outcome.metrics["benchmarks"]
    assert found["sets"] == {bench.as_posix(): {"pictures": 2, "questions": 3, "unreadable": 2}}
    assert (found["records_with_shared_picture"], found["records_with_shared_question"]) == (4, 2)


def test_a_missing_evaluation_set_is_no_empty_one(check) -> None:
    with pytest.raises(UserError, match="the evaluation set nowhere .* is no folder"):
        check([record("a")], benchmarks=["nowhere"])


def test_an_evaluation_set_of_which_nothing_can_be_read_is_no_evidence(check, tmp_path) -> None:
    bench, elsewhere = tmp_path / "bench", tmp_path / "coco"
    bench.mkdir()
    elsewhere.mkdir()
    (bench / "mmbench.tsv").write_text("index\tquestion\n1\tWhat?\n")
    with pytest.raises(UserError, match="bench .* holds neither a picture nor a question that can be read"):
        check([record("a")], benchmarks=[str(bench)])
    (elsewhere / "seen.jpg").write_bytes(photograph(1))
    (bench / "val2014").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(bench)
    outcome = check([record("a"), record("copy.jpg", "copy.jpg")], {"copy.jpg": photograph(1)}, benchmarks=[str(bench)])
    assert outcome.metrics["benchmarks"]["sets"][bench.as_posix()]["pictures"] == 1
    assert set(outcome.reasons) == {"copy.jpg"}


# --- drift -----------------------------------------------------------------------------------------------------------
def many(words: list[str], count: int = 60, size: int = 100) -> tuple[list[dict], dict[str, bytes]]:
    random = np.random.default_rng(0)
    images = {"a.png": png(size, size)}
    answers = [" ".join(random.choice(words, 5)) for _ in range(count)]
    return [record(f"r{i}", "a.png", answer=answer) for i, answer in enumerate(answers)], images


def test_data_that_drifts_from_the_accepted_version_stops(check) -> None:
    usual = ["cat", "dog", "horse", "bird"]
    first = check(*many(usual))
    assert "drift" not in first.metrics
    accept()
    same = check(*many(usual, count=80))
    assert max(same.metrics["drift"].values()) < 0.1
    with pytest.raises(UserError, match=r"drifted .*: image_sizes by 1.000 \(limit 0.15\), vocabulary by 1.000"):
        check(*many(["ship", "boat", "raft", "tug"], size=400))
    # What is needed to look into it, or to accept it, is there; data to go on with is not.
    assert same.metrics["drift"]["image_sizes"] == 1.0
    assert "drift" in (same.folder / "reports/data_docs/index.html").read_text()
    assert not (same.folder / "data/validated").exists()
    accept()
    check(*many(["ship", "boat", "raft", "tug"], size=400))


def test_limits_of_drift_can_be_lifted(check) -> None:
    check(*many(["cat", "dog"]))
    accept()
    outcome = check(*many(["pig", "cow"]), drift={"vocabulary": None})
    assert outcome.metrics["drift"]["vocabulary"] == 1.0


# --- the same whatever the processes ---------------------------------------------------------------------------------
def test_outs_are_the_same_whatever_the_number_of_processes(check, monkeypatch) -> None:
    monkeypatch.setattr("haplovl.data.entry_facts.TASK", 7)
    monkeypatch.setattr("haplovl.data.picture_facts.TASK", 3)
    monkeypatch.setattr("haplovl.data.findings.ROWS_JUDGED", 25)
    images = {f"{seed}.jpg": photograph(seed // 2, 60 + seed) for seed in range(30)}
    images["broken.jpg"] = photograph(0)[:500]
    records = [record(f"r{i % 80}", f"{i % 30}.jpg", split=("train", "test")[i % 30 == 4]) for i in range(90)]
    records += [record("broken", "broken.jpg"), record("gone", "gone.jpg"), record("text", answer="!")]
    one = check(records, images, near=4)
    files = one.files()
    assert len(one.reasons) > 10 and len(one.accepted) > 50
    assert len([name for name in files if "validations" in name]) == 4
    shutil.rmtree("source")
    assert check(records, images, processes=3, near=4).files() == files
