"""Data folders: whole ones are described, and what is missing is named before anything runs."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_benchmarks import PUBLISHED, picture, write_benchmark

from haplovl.errors import UserError
from haplovl.evaluate.harness.folders import check_folder
from haplovl.evaluate.harness.tasks import NAMES, find


def check(name, data, limit=None):
    return check_folder(find([name])[0], data, limit)


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_folder_is_described(name, tmp_path) -> None:
    write_benchmark(name, tmp_path)
    folder = check(name, tmp_path)
    rows = PUBLISHED[name]()[0]
    kept = [row for row in rows if name != "seedbench_img" or row["data_type"] == "image"]
    assert folder.questions == len(kept)
    described = list(folder.rows())
    assert [row["question" if name != "mmvp" else "Question"] for row in described] == [
        row["question" if name != "mmvp" else "Question"] for row in kept
    ]
    assert not any(
        column.startswith("image") and column != "image_id" and column in row
        for row in described
        for column in ("image", "image_1")
    )
    assert len(folder.sha256) == 64


def test_the_hash_follows_the_content_of_the_files_and_not_their_place(tmp_path) -> None:
    first, second, changed = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    write_benchmark("pope", first)
    write_benchmark("pope", second)
    (second / "pope" / "README.md").write_text("not read by the task")
    write_benchmark("pope", changed, lambda rows: rows[0].update(question="Is there a cat in the image?"))
    assert check("pope", first).sha256 == check("pope", second).sha256 != check("pope", changed).sha256


def spoiled(name, message, change=lambda rows: None, without="", metadata=True):
    return pytest.param(name, change, without, metadata, message, id=message[:40])


BROKEN = {"bytes": b"\x89PNG\r\n\x1a\n cut", "path": "x.png"}


@pytest.mark.parametrize(
    ("name", "change", "without", "metadata", "message"),
    [
        spoiled("pope", "lacks the column 'answer' of POPE", without="answer"),
        spoiled("mmmu_val", "lacks the column 'image_7' of MMMU", without="image_7"),
        spoiled(
            "pope", "question 2 of POPE has no value in the column 'question'", lambda r: r[1].update(question=None)
        ),
        spoiled("pope", "question 2 of POPE has the answer 'maybe'; it must be", lambda r: r[1].update(answer="maybe")),
        spoiled("pope", "question 3 of POPE has no picture", lambda r: r[2].update(image=None)),
        spoiled("ai2d", "question 1 of AI2D: ", lambda r: r[0].update(image=BROKEN)),
        spoiled("mmmu_val", "question 2 of MMMU .* .image_1. has no picture", lambda r: r[1].update(image_1=None)),
        spoiled("seedbench_img", "question 2 of SEED-Bench-IMG has no picture", lambda r: r[2].update(image=[])),
        spoiled("gqa", "GQA's picture 'n9' is missing", lambda r: r[0].update(imageId="n9")),
        spoiled("mmbench_en_dev", "lacks question 1, of which it holds rotated copies", lambda r: r.pop(0)),
        spoiled(
            "mmbench_en_dev",
            "row 1000001 is a rotated copy of row 1, but its 'question' is another",
            lambda r: r[1].update(question="What is it?"),
        ),
        spoiled(
            "vqav2",
            "question 2 of VQAv2 has an answer without 'answer_id'",
            lambda r: r[1]["answers"][3].update(answer_id=None),
        ),
        spoiled(
            "vqav2",
            "question 3 of VQAv2 has an 'answer_id' that comes twice",
            lambda r: r[2]["answers"][0].update(answer_id=2),
        ),
        spoiled("mmvp", "'Index' must count 1 to 4, each once", lambda r: r.pop(1)),
        spoiled("mmstar", "holds no questions of MMStar", lambda r: r.clear()),
        spoiled("pope", "the column 'image' is not marked as pictures", metadata=False),
    ],
)
def test_what_is_missing_is_named(name, change, without, metadata, message, tmp_path) -> None:
    folder = write_benchmark(name, tmp_path, change)
    path = folder / PUBLISHED[name]()[2]
    table = pq.read_table(path)
    if without:
        table = table.drop_columns(without)
    pq.write_table(table if metadata else table.replace_schema_metadata(None), path)
    with pytest.raises(UserError, match=message) as refused:
        check(name, tmp_path)
    assert "\n" not in str(refused.value)


def test_a_picture_that_no_question_shows_may_be_missing(tmp_path) -> None:
    write_benchmark("mmmu_val", tmp_path, lambda rows: rows[0].update(image_2=BROKEN))
    assert check("mmmu_val", tmp_path).questions == 4
    write_benchmark("seedbench_img", tmp_path, lambda rows: rows[1].update(image=[BROKEN]))
    assert check("seedbench_img", tmp_path).questions == 3


def test_only_the_pictures_of_the_questions_that_are_asked_are_decoded(tmp_path) -> None:
    write_benchmark("ai2d", tmp_path, lambda rows: rows[2].update(image=BROKEN))
    assert check("ai2d", tmp_path, limit=2).questions == 3
    with pytest.raises(UserError, match="question 3 of AI2D"):
        check("ai2d", tmp_path)


def test_answers_of_vqav2_need_the_column_that_tells_annotators_apart(tmp_path) -> None:
    path = write_benchmark("vqav2", tmp_path) / PUBLISHED["vqav2"]()[2]
    table = pq.read_table(path)
    plain = [[{"answer": entry["answer"]} for entry in row] for row in table["answers"].to_pylist()]
    place = table.column_names.index("answers")
    pq.write_table(table.set_column(place, "answers", pa.array(plain)), path)
    with pytest.raises(UserError, match="question 1 of VQAv2 has an answer without 'answer_id'"):
        check("vqav2", tmp_path)


@pytest.mark.parametrize(
    ("name", "order", "whole", "refused"),
    [
        ("mmvp", (0, 1, 2, 3), (2, 4, 9), {1: "limit without a cut is 2$", 3: "without a cut are 2 and 4 .all.$"}),
        ("mmbench_en_dev", (0, 1, 2, 3), (2, 3, 4), {1: "--limit 1 cuts the rotated copies of a question of MMBench"}),
        ("mmbench_en_dev", (0, 2, 3, 1), (4,), {3: "limit without a cut is 4 .all.$"}),
        ("mmbench_en_dev", (2, 1, 0, 3), (1, 3), {2: "limits without a cut are 1 and 3$"}),
    ],
)
def test_a_limit_that_cuts_what_counts_together_is_refused(name, order, whole, refused, tmp_path) -> None:
    def reorder(rows):
        rows[:] = [rows[place] for place in order]

    write_benchmark(name, tmp_path, reorder)
    for limit in whole:
        assert check(name, tmp_path, limit).questions == 4
    for limit, message in refused.items():
        with pytest.raises(UserError, match=message):
            check(name, tmp_path, limit)


def test_a_folder_that_lacks_the_benchmark_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"has no folder vqav2; put the data set lmms-lab/VQAv2 there"):
        check("vqav2", tmp_path)
    (tmp_path / "vqav2" / "data").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no data/validation-\*.parquet, where lmms-lab/VQAv2 keeps VQAv2"):
        check("vqav2", tmp_path)


def test_a_missing_shard_is_refused(tmp_path) -> None:
    folder = write_benchmark("pope", tmp_path)
    (folder / "data/test-00000-of-00001.parquet").rename(folder / "data/test-00000-of-00003.parquet")
    with pytest.raises(UserError, match=r"holds 1 of the 3 files data/test-\*.parquet of POPE"):
        check("pope", tmp_path)


def test_a_column_of_another_type_is_refused(tmp_path) -> None:
    path = write_benchmark("mmbench_en_dev", tmp_path) / "en/dev-00000-of-00001.parquet"
    table = pq.read_table(path)
    texts = pa.array([str(value) for value in table["index"].to_pylist()])
    pq.write_table(table.set_column(0, "index", texts), path)
    with pytest.raises(UserError, match="the column 'index' must be a whole number, but its type is string"):
        check("mmbench_en_dev", tmp_path)


def test_what_is_no_table_is_refused(tmp_path) -> None:
    path = write_benchmark("mmstar", tmp_path) / "mmstar.parquet"
    path.write_bytes(picture(0)["bytes"])
    with pytest.raises(UserError, match="mmstar.parquet is no readable Parquet file"):
        check("mmstar", tmp_path)
