"""Every record of the golden files gets the score that the public scorers gave it, and so do the aggregates."""

import pytest
from golden_scores import answered, golden, path_of

from haplovl.evaluate.benchmarks import find, names, prompt, score_file, score_records

OWN_NAMES = {
    ("mmbench_en_dev", "lmms_eval"): ("lmms_eval_static", "lmms_eval_static"),
    ("mmbench_en_dev", "vlmevalkit"): ("vlmevalkit_vanilla", "vlmevalkit_circular"),
    ("mmmu_val", "lmms_eval"): ("lmms_eval_0.7.3", ""),
}
"""How the golden files call a reference: for single rows, and for questions with rotated rows."""
REFERENCES = [(name, reference) for name in names() for reference in find(name).references]


def wanted_score(name, reference, item):
    row, question = OWN_NAMES.get((name, reference), (reference, ""))
    return item["group_scores"][question] if "group_scores" in item else item["scores"][row]


def test_the_golden_files_cover_all_eleven():
    assert len(names()) == 11
    assert sum(golden(name)["n"] for name in names()) == 586
    covered = {name: {key for item in golden(name)["records"] for key in item["scores"]} for name in names()}
    for name, reference in REFERENCES:
        assert OWN_NAMES.get((name, reference), (reference,))[0] in covered[name]


@pytest.mark.parametrize(("name", "reference"), REFERENCES)
def test_every_record_agrees(name, reference):
    items = golden(name)["records"]
    result = score_file(name, path_of(name), reference)
    assert len(result["scores"]) == len(items)
    compared = 0
    for item, score in zip(items, result["scores"], strict=True):
        wanted = wanted_score(name, reference, item)
        if wanted is not None:
            # Sums of thirds differ in the last bit between the references' own means.
            assert score == pytest.approx(wanted, abs=1e-12), (item["record"], item["prediction"])
            compared += 1
    undefined = {("mmmu_val", "lmms_eval"): 13, ("mmmu_val", "official_mmmu"): 18, ("realworldqa", "vlmevalkit"): 13}
    assert compared == len(items) - undefined.get((name, reference), 0)


@pytest.mark.parametrize("name", names())
def test_lmms_eval_agrees_to_the_last_bit_and_needs_no_nesting(name):
    result = score_records(name, answered(name))
    for item, score in zip(golden(name)["records"], result["scores"], strict=True):
        assert wanted_score(name, "lmms_eval", item) in (None, score)


@pytest.mark.parametrize("name", names())
def test_what_was_read_in_an_answer_agrees_where_the_golden_files_tell(name):
    for reference in ("lmms_eval", "vlmevalkit"):
        result = score_file(name, path_of(name), reference)
        for item, parsed in zip(golden(name)["records"], result["parsed"], strict=True):
            told = item.get("parsed", {}).get(reference, "not told")
            # AI2D's and SEED's filters give back what is no option; VLMEvalKit says Z for nothing, and 'Yes'.
            if told == "not told" or (reference == "lmms_eval" and name in ("ai2d", "seedbench_img")):
                continue
            told = None if told in ("Z", "Unknown", "") else told.lower() if name == "pope" else told
            if name != "mmmu_val" or item["record"]["question_type"] == "multiple-choice":
                assert parsed == told, item["prediction"]


@pytest.mark.parametrize("name", names())
def test_prompts_agree(name):
    items = [item for item in golden(name)["records"] if "prompt" in item]
    assert items
    for item in items:
        assert prompt(name, item["record"]) == item["prompt"]["lmms_eval"]


def test_mmmu_never_guesses():
    items = golden("mmmu_val")["records"]
    for reference, key in (("lmms_eval", "lmms_eval"), ("official_mmmu", "official_mmmu")):
        result = score_file("mmmu_val", path_of("mmmu_val"), reference)
        guessed = [bool((item.get("random_fallback") or {}).get(key)) for item in items]
        assert any(guessed)
        assert [parsed is None for parsed in result["parsed"]] == guessed
        assert [score for score, guess in zip(result["scores"], guessed, strict=True) if guess] == [0.0] * sum(guessed)
        assert result["unparsed"] == result["aggregate"]["all"]["unparsed"] == sum(guessed)


def aggregate(name, reference="lmms_eval"):
    return score_file(name, path_of(name), reference)["aggregate"]


def contains(found, wanted):
    """Whether `found` holds every figure of `wanted` at its place."""
    if isinstance(wanted, dict):
        return all(key in found and contains(found[key], value) for key, value in wanted.items())
    return found == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in names() if name not in ("mmbench_en_dev", "mmmu_val")])
def test_aggregates_agree(name):
    wanted = golden(name)["aggregate"]["lmms_eval"]
    assert contains(aggregate(name), wanted), aggregate(name)


def test_mmbench_aggregates_agree_for_questions_with_and_without_rotated_copies():
    wanted, found = golden("mmbench_en_dev")["aggregate"], aggregate("mmbench_en_dev")
    for kind in ("vanilla", "circular"):
        assert contains(found[kind], wanted[kind]["lmms_eval_static"])
    assert found["n"] == 47 and found["n_rows"] == 60
    assert found["overall"] == pytest.approx((25 + 4) / 47)
    theirs = aggregate("mmbench_en_dev", "vlmevalkit")
    assert theirs["vanilla"]["overall"] == pytest.approx(wanted["vanilla"]["vlmevalkit_vanilla"])
    assert theirs["circular"]["overall"] == pytest.approx(wanted["circular"]["vlmevalkit_circular"]["Overall"])
    rows = [item for item in golden("mmbench_en_dev")["records"] if item["group"] == "circular"]
    rotated = score_records("mmbench_en_dev", rows, "vlmevalkit")["aggregate"]
    assert rotated["rows"] == pytest.approx(wanted["circular"]["vlmevalkit_vanilla_all_rows"])


def test_mmmu_aggregates_agree_where_nothing_was_guessed():
    wanted = golden("mmmu_val")["aggregate"]
    found = aggregate("mmmu_val")
    assert contains(found["parsed_only"], wanted["lmms_eval_0.7.3"])
    assert contains(aggregate("mmmu_val", "official_mmmu")["parsed_only"], wanted["official_mmmu"])
    assert contains(aggregate("mmmu_val", "vlmevalkit"), wanted["vlmevalkit"])
    assert found["all"] == {"acc": 32 / 60, "n": 60, "unparsed": 13}
    assert sum(part["n"] for part in found["domains"].values()) == 60
    assert set(found["subjects"]) == {"Art", "Accounting", "Biology", "Pharmacy", "History", "Materials"}


def test_aggregates_of_other_references_agree():
    assert aggregate("gqa", "vlmevalkit")["exact_match"] * 100 == pytest.approx(
        golden("gqa")["aggregate"]["vlmevalkit"]["Overall_pct"]
    )
    for reference in ("official_vqa", "vlmevalkit"):
        assert contains(aggregate("vqav2", reference), golden("vqav2")["aggregate"][reference])
    for name in ("ai2d", "scienceqa_img"):
        for reference in set(find(name).references) - {"lmms_eval"}:
            assert contains(aggregate(name, reference), golden(name)["aggregate"][reference])
    mmvp, theirs = aggregate("mmvp", "vlmevalkit"), golden("mmvp")["aggregate"]["vlmevalkit"]
    assert [mmvp["accuracy"], mmvp["pair_accuracy"]] == pytest.approx([theirs["Average"], theirs["Overall_pair"]])
    seed = golden("seedbench_img")["aggregate"]
    assert aggregate("seedbench_img", "llava")["seed_image"] == pytest.approx(seed["llava"]["mean_of_records"])
    assert aggregate("mmstar")["micro"] == pytest.approx(golden("mmstar")["aggregate"]["micro_of_lmms_scores"])


def test_pope_rates_of_other_references_agree():
    wanted, found = golden("pope")["aggregate"], aggregate("pope", "official_llava")
    for part, theirs in wanted["official_llava"].items():
        ours = found[part]
        assert [ours[key] for key in ("true_yes", "false_yes", "true_no", "false_no")] == [
            theirs[key] for key in ("TP", "FP", "TN", "FN")
        ]
        rates = [ours[key] for key in ("accuracy", "precision", "recall", "f1_score", "predicted_yes_ratio")]
        keys = ("Accuracy", "Precision", "Recall", "F1 score", "Yes ratio")
        assert rates == pytest.approx([theirs[key] for key in keys])
    kit = aggregate("pope", "vlmevalkit")
    for part, theirs in wanted["vlmevalkit_pct"].items():
        assert 100 * kit["all" if part == "Overall" else part]["accuracy"] == pytest.approx(theirs["acc"])
