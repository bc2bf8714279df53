"""`haplovl score` as users meet it: files in every form, one JSON object, and refusals in one sentence."""

import json
import subprocess
import sys
import time

import pytest
from golden_scores import answered, golden, path_of

from haplovl import cli
from haplovl.evaluate.benchmarks import find, names


@pytest.fixture
def score(monkeypatch, capsys):
    """Runs the command; returns its JSON object, or the error's sentence."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["haplovl", "score", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        if end.value.code:
            assert capsys.readouterr().out == ""
            return str(end.value.code)
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refusal(score, tmp_path):
    """The sentence about a file with these records."""

    def run(name, records):
        path = tmp_path / "answers.json"
        path.write_text(records if isinstance(records, str) else json.dumps(records))
        message = score(name, path)
        assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
        return message

    return run


def test_every_form_of_file_gives_the_same_scores(score, tmp_path):
    expected = score("pope", path_of("pope"))
    assert expected["n"] == len(expected["scores"]) == 60 and expected["aggregate"]["all"]["accuracy"] == 0.45
    forms = {
        "flat.json": json.dumps(answered("pope")),
        "nested.json": json.dumps(golden("pope")["records"]),
        "object.json": json.dumps({"records": answered("pope")}),
        "flat.jsonl": "\n".join(map(json.dumps, answered("pope"))),
        "nested.jsonl": "\n".join(map(json.dumps, golden("pope")["records"])) + "\n\n",
        "mark.json": "\ufeff" + json.dumps(answered("pope"), indent=1),
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert score("pope", tmp_path / name) == expected
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps(answered("pope")[0]))
    assert score("pope", one)["scores"] == expected["scores"][:1]


def test_a_line_separator_inside_an_answer_ends_no_line(score, tmp_path):
    records = answered("pope")[:3]
    for record, sign in zip(records, "\u2028\u2029\x85", strict=True):
        record["prediction"] = f"no{sign}yes"
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    (tmp_path / "list.json").write_text(json.dumps(records))
    assert score("pope", tmp_path / "lines.jsonl") == score("pope", tmp_path / "list.json")


def test_the_number_of_published_questions_stands_beside_that_of_the_records(score, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(answered("pope")[:1]))
    result = score("pope", tmp_path / "one.json")
    assert (result["n"], result["published"]) == (1, 9000)


def test_the_reference_can_be_chosen(score):
    ours, theirs = score("pope", path_of("pope")), score("pope", path_of("pope"), "--reference", "official_llava")
    assert theirs["headline"]["value"] == ours["beside"]["official_llava"]["value"] == 0.65
    assert theirs["beside"]["lmms_eval"]["value"] == ours["headline"]["value"] == 0.45
    assert theirs["beside"]["lmms_eval"]["stricter"] == ours["beside"]["official_llava"]["looser"] == 12
    assert score("pope", path_of("pope"), "--reference", "vlmeval").startswith(
        "error: pope has no reference 'vlmeval' (did you mean vlmevalkit?); it has lmms_eval"
    )


def test_undefined_scores_are_null(score):
    result = score("realworldqa", path_of("realworldqa"), "--reference", "vlmevalkit")
    assert result["scores"].count(None) == 13
    assert result["headline"]["value"] == pytest.approx(21 / 44)


@pytest.mark.parametrize(
    ("name", "nearest"), [("mmbench", "mmbench_en_dev"), ("POPE", "pope"), ("seed-bench", "seedbench_img")]
)
def test_an_unknown_benchmark_names_the_nearest_and_all(score, name, nearest):
    message = score(name, path_of("pope"))
    assert f"there is no benchmark {name!r} (did you mean {nearest}?)" in message
    assert all(known in message for known in names())


def test_more_records_than_the_benchmark_has_are_refused(refusal):
    record = answered("realworldqa")[0]
    message = refusal("realworldqa", [record] * 766)
    assert "holds 766 records, but RealWorldQA has 765 questions" in message


def test_a_key_that_comes_twice_is_refused(refusal):
    record = json.dumps(answered("pope")[0])
    twice = record.replace('"prediction"', '"prediction": "yes", "prediction"')
    assert "the key 'prediction' occurs twice in one object" in refusal("pope", f"[{twice}]")
    assert "the key 'prediction' occurs twice in one object" in refusal("pope", f"{record}\n{twice}")
    assert "nested too deeply" in refusal("pope", "[" * 100_000)


def test_the_fields_of_a_question_and_an_answer_alone_are_no_hint_at_a_benchmark(refusal):
    record = answered("pope")[0]
    del record["category"]
    message = refusal("pope", [record])
    assert "no field 'category', which POPE needs" in message and "looks like" not in message


def test_a_name_like_no_other_has_no_nearest(score):
    assert "there is no benchmark 'xyz'; there are gqa" in score("xyz", path_of("pope"))


@pytest.mark.parametrize("name", names())
def test_records_of_another_benchmark_are_refused(name, refusal):
    for other in names():
        if other != name:
            message = refusal(name, answered(other))
            assert f"({other})" in message, message
    assert f"says that it belongs to the benchmark {names()[0]!r}" in refusal("mmvp", golden(names()[0]))


@pytest.mark.parametrize("name", names())
def test_every_missing_field_is_named(name, refusal):
    for field in find(name).fields:
        records = answered(name)[:3]
        del records[1][field]
        message = refusal(name, records)
        assert "record 2 of " in message and f"it has no field {field!r}" in message
    records = answered(name)[:3]
    del records[2]["prediction"]
    assert "record 3 of " in refusal(name, records) and "has no field 'prediction'" in refusal(name, records)


@pytest.mark.parametrize("name", names())
def test_wrong_types_are_named(name, refusal):
    for field in find(name).fields:
        records = answered(name)[:2]
        records[0][field] = 3.5
        message = refusal(name, records)
        assert "record 1 of " in message and f"the field {field!r} is 3.5, not " in message
    for value, called in ((None, "null"), (7, "int"), (["A"], "list")):
        records = answered(name)[:2]
        records[1]["prediction"] = value
        assert f"the field 'prediction' is {called}, not a string" in refusal(name, records)


@pytest.mark.parametrize(
    ("name", "field"),
    [("gqa", "id"), ("vqav2", "question_id"), ("mmbench_en_dev", "index"), ("mmmu_val", "id"), ("mmstar", "index")]
    + [("pope", "question_id"), ("seedbench_img", "question_id"), ("mmvp", "Index"), ("scienceqa_img", "id")],
)
def test_an_id_that_comes_twice_is_refused(name, field, refusal):
    records = answered(name)[:3]
    records.append(dict(records[1], prediction="another answer"))
    message = refusal(name, records)
    assert "record 4 of" in message and f"({field} " in message and "has the same id as record 2 of" in message


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("ai2d", {"answer": "9"}, "not a question whose answer is the number (0 to 3) of an option"),
        ("scienceqa_img", {"answer": -1}, "not a question whose answer is the number (0 to 3) of a choice"),
        ("mmbench_en_dev", {"answer": "D", "D": "nan"}, "not a question whose answer is one of its options (A, B, C)"),
        ("mmmu_val", {"answer": "E"}, "not a question whose answer is one of its options (A, B, C, D)"),
        ("mmmu_val", {"options": "['a'"}, "not a multiple-choice question with options"),
        ("mmmu_val", {"id": "Art 1"}, "with an id like validation_Art_1"),
        ("mmmu_val", {"id": "test_Art_1"}, "not a question of the validation split"),
        ("mmmu_val", {"id": "validation_Nonsense_1"}, "one of MMMU's subjects"),
        ("gqa", {"id": "s0#0"}, "the field 'id' is 's0#0', not a number, as ids of GQA are"),
        ("realworldqa", {"question": "Is there a cat?"}, "end with 'Please answer directly …'; these do not"),
        ("ai2d", {"id": [1]}, "the field 'id' is [1], not a whole number or a string, or null"),
        ("ai2d", {"answer": "9" * 5000}, "not the number of the right option"),
        ("scienceqa_img", {"choices": ["a"] * 30, "answer": 28}, "not a list of 1 to 26 strings"),
        ("mmbench_en_dev", {"C": 3}, "the field 'C' is 3, not a string, or null where there is none"),
        ("mmstar", {"options": 5}, "the field 'options' is 5, not a list of strings, or null"),
        ("mmstar", {"options": "A: cat"}, "the field 'options' is 'A: cat', not a list of strings, or null"),
        ("mmstar", {"answer": "E"}, "the field 'answer' is 'E', not A, B, C or D"),
        ("pope", {"category": "rare"}, "the field 'category' is 'rare', not random, popular or adversarial"),
        ("seedbench_img", {"data_type": "video"}, "the field 'data_type' is 'video', not image"),
        ("mmvp", {"Options": "Left or right"}, "not a question with the Options '(a) … (b) …'"),
        ("vqav2", {"answers": ["yes"]}, "a list of the annotators' answers"),
        ("mmbench_en_dev", {"index": 1000009}, "row 1000009 is a rotated copy of row 9, which is missing"),
    ],
)
def test_records_that_cannot_be_scored_are_refused(name, change, part, refusal):
    assert part in refusal(name, [{**answered(name)[0], **change}])


@pytest.mark.parametrize(
    ("field", "value"), [("question", "How many dogs?"), ("category", "ocr"), ("L2-category", "coarse")]
)
def test_a_rotated_copy_of_another_question_is_refused(field, value, refusal):
    first = answered("mmbench_en_dev")[0]
    copy = {**first, "index": 1_000_000 + first["index"]}
    part = f"row {copy['index']} is a rotated copy of row {first['index']}, but its {field!r} is another"
    assert part in refusal("mmbench_en_dev", [first, {**copy, field: value}])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "is empty"),
        ("[]", "holds no records"),
        ('{"records": []}', "holds no records"),
        ("{}", "has no field 'prediction'"),
        ('{"records": 5}', "without a list 'records'"),
        ("3", "holds int, not a list of records of POPE"),
        ("[1]", "record 1 of"),
        ("[[", "is not valid JSON"),
        ('{"question": "a"}\n{"question": ', "line 2 of"),
        ("yes\nno\n", "is not valid JSON"),
    ],
)
def test_damaged_files_are_refused(content, part, refusal):
    assert part in refusal("pope", content)


def test_missing_and_binary_files_are_refused(score, tmp_path):
    assert "there is no file" in score("pope", tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in score("pope", tmp_path / "binary.json")


def test_help_names_all_benchmarks_and_scoring_needs_no_torch():
    code = (
        "import sys; from haplovl import cli; sys.argv = ['haplovl', 'score', *sys.argv[1:]]\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)), file=sys.stderr)"
    )
    began = time.monotonic()
    shown = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    scored = subprocess.run(
        [sys.executable, "-c", code, "gqa", str(path_of("gqa"))], capture_output=True, text=True, check=True
    )
    seconds = time.monotonic() - began
    assert shown.stderr.strip() == scored.stderr.strip() == "[]"
    assert json.loads(scored.stdout)["n"] == 45
    assert all(name in shown.stdout for name in (*names(), "prediction", "--reference"))
    assert seconds < 10  # both together; two tenths of it when nothing else runs
