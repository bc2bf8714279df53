import json
from pathlib import Path

import pytest
import yaml

from haplovl.errors import UserError
from haplovl.registry import register
from haplovl.settings import Params, load_params

ROOT = Path(__file__).parents[1]
GOOD = {"accuracy": 0.95, "majority": 0.2, "blank_image": 0.3, "n": 200}


def write_outputs(root: Path, **types: dict) -> None:
    """The files that the stages before `register` leave behind."""
    types = types or {"colour": GOOD, "digit": GOOD}
    accuracy = sum(scores["accuracy"] for scores in types.values()) / len(types)
    files = {
        "metrics/evaluation.json": {"accuracy": accuracy, "types": types},
        "metrics/validation.json": {"records": 10, "quarantined": 0},
        "models/teachers/teachers.json": {"vision": {"kind": "train"}, "language": {"kind": "train"}},
        "data/prepared/manifest.json": {"shards": [], "sources": {"scenes": {"train": 10}}},
        "models/stage2/config.json": {"model_type": "haplovl"},
    }
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(value))


@pytest.fixture
def params() -> Params:
    return load_params(ROOT / "params.yaml")


def candidate_of(root: Path) -> dict:
    return json.loads((root / "candidate" / "candidate.json").read_text())


def test_the_candidate_is_the_same_bytes_anywhere_and_at_any_time(tmp_path, monkeypatch, params):
    written = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        write_outputs(Path())
        register(params)
        register(params)
        written.append({path.name: path.read_bytes() for path in Path("candidate").iterdir()})
    assert written[0] == written[1] and set(written[0]) == {"candidate.json", "MODEL_CARD.md"}
    assert not any(str(tmp_path).encode() in content for content in written[0].values())


def test_the_candidate_changes_with_model_data_and_params(tmp_path, monkeypatch, params):
    monkeypatch.chdir(tmp_path)
    write_outputs(Path())
    register(params)
    first = candidate_of(tmp_path)
    (tmp_path / "models/stage2/config.json").write_text("{}")
    (tmp_path / "data/prepared/manifest.json").write_text("{}")
    register(params.model_copy(update={"seed": params.seed + 1}))
    second = candidate_of(tmp_path)
    for key in ("model_sha256", "data_manifest_sha256", "params_fingerprint", "seed"):
        assert first[key] != second[key]


def test_a_good_candidate_passes_and_its_card_says_how_good(tmp_path, monkeypatch, params):
    monkeypatch.chdir(tmp_path)
    write_outputs(Path())
    register(params)
    assert candidate_of(tmp_path)["gate"] == {"passed": True, "reasons": []}
    assert candidate_of(tmp_path)["data"]["sources"] == {"scenes": {"train": 10}}
    card = (tmp_path / "candidate/MODEL_CARD.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "| colour | 0.950 | 0.200 | 0.300 | 0.650 | 200 |" in body


def test_a_failed_gate_is_recorded_with_every_reason_and_does_not_fail_the_stage(tmp_path, monkeypatch, params):
    monkeypatch.chdir(tmp_path)
    write_outputs(Path(), colour=GOOD, digit={**GOOD, "accuracy": 0.5, "blank_image": 0.45})
    register(params)
    gate = candidate_of(tmp_path)["gate"]
    assert not gate["passed"] and len(gate["reasons"]) == 2
    assert "accuracy 0.725 is below 0.900" in gate["reasons"][0] and "'digit' is +0.050" in gate["reasons"][1]


def test_not_a_number_passes_no_gate(tmp_path, monkeypatch, params):
    monkeypatch.chdir(tmp_path)
    write_outputs(Path(), colour={**GOOD, "accuracy": float("nan")})
    register(params)
    assert len(candidate_of(tmp_path)["gate"]["reasons"]) == 2


def test_a_missing_output_names_the_command_that_makes_it(tmp_path, monkeypatch, params):
    monkeypatch.chdir(tmp_path)
    write_outputs(Path())
    (tmp_path / "metrics/evaluation.json").unlink()
    with pytest.raises(UserError, match="haplovl evaluate"):
        register(params)
    assert not (tmp_path / "candidate").exists()
