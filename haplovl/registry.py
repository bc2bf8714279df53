"""The `register` stage: a deterministic candidate with model card, lineage and gate verdict.

Nothing in it depends on when, where or from which commit it was made; `haplovl.publish` adds that outside the outs.
"""

from pathlib import Path
from typing import Any

import yaml

from haplovl.files import (
    CANDIDATE,
    METRICS,
    PREPARED,
    STAGE2,
    TEACHERS,
    read_json,
    require,
    sha256_of,
    sha256_of_folder,
    whole_folder,
    write_json,
    write_whole,
)
from haplovl.settings import Params, fingerprint


def register(params: Params, out: Path = CANDIDATE) -> None:
    """Writes `candidate.json` and `MODEL_CARD.md`; a failed gate is recorded, not raised.

    Raises:
        UserError: an output of an earlier stage is missing or damaged.
    """
    evaluation = read_json(require(METRICS / "evaluation.json", "evaluate"))
    candidate = {
        "name": params.register_.name,
        "recipe": params.recipe,
        "seed": params.seed,
        "params": params.model_dump(mode="json", by_alias=True),
        "params_fingerprint": fingerprint(params),
        "data_manifest_sha256": sha256_of(require(PREPARED / "manifest.json", "prepare")),
        "data": _data(),
        "teachers": read_json(require(TEACHERS / "teachers.json", "teachers")),
        "model_sha256": sha256_of_folder(require(STAGE2, "train stage2")),
        "metrics": {
            "evaluation": evaluation,
            "validation": read_json(require(METRICS / "validation.json", "validate")),
        },
        "gate": judge(params, evaluation),
    }
    with whole_folder(out) as folder:
        write_json(folder / "candidate.json", candidate)
        write_whole(folder / "MODEL_CARD.md", model_card(candidate))
    verdict = candidate["gate"]
    print("gate passed" if verdict["passed"] else "gate failed: " + "; ".join(verdict["reasons"]))


def _data() -> dict[str, Any]:
    """What the model saw: records of every source in every split, and what preparation did to them."""
    manifest = read_json(PREPARED / "manifest.json")
    return {name: manifest.get(name, {}) for name in ("sources", "totals", "refused", "shortened")}


def judge(params: Params, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The gate: overall accuracy, and every type's margin above the better of its two baselines."""
    gate = params.register_
    reasons = []
    if not evaluation["accuracy"] >= gate.min_accuracy:
        reasons.append(f"accuracy {evaluation['accuracy']:.3f} is below {gate.min_accuracy:.3f}")
    for name, scores in sorted(evaluation["types"].items()):
        margin = _margin(scores)
        if not margin >= gate.min_margin:
            reasons.append(f"'{name}' is {margin:+.3f} from its better baseline, needs {gate.min_margin:+.3f}")
    return {"passed": not reasons, "reasons": reasons}


def model_card(candidate: dict[str, Any]) -> str:
    """The card in the hub's format: YAML front matter, then what a reader must know before using the model."""
    evaluation = candidate["metrics"]["evaluation"]
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        **_origins(candidate),
        "tags": ["haplovl", "vision-language", "single-transformer"],
        "model-index": [
            {
                "name": candidate["name"],
                "results": [
                    {
                        "task": {"type": "visual-question-answering"},
                        "dataset": {"type": _source(candidate), "name": "held-out test split"},
                        "metrics": [{"type": "exact_match", "value": evaluation["accuracy"]}],
                    }
                ],
            }
        ],
    }
    sections = [
        _introduction(candidate),
        _training(candidate),
        _results(evaluation, candidate["gate"]),
        _LIMITS,
        _USE,
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n\n".join(sections) + "\n"


def _origins(candidate: dict[str, Any]) -> dict[str, Any]:
    """The hub's fields for what the model is made of. Weights and data from elsewhere bring their own licences."""
    params = candidate["params"]
    teachers, sources = params["teachers"].values(), params["collect"]["sources"]
    own = all(source["format"] == "scenes" for source in sources) and all(t["kind"] == "train" for t in teachers)
    licence = {"license": "apache-2.0"} if own else {"license": "other", "license_name": "as-its-teachers-and-data"}
    base = [teacher["id"] for teacher in teachers if teacher["kind"] == "hub"]
    named = ["scikit-learn-digits" if source["format"] == "scenes" else source["name"] for source in sources]
    return {**licence, **({"base_model": base} if base else {}), "datasets": named}


_KINDS = {
    "early": (
        "A vision-language model that is one transformer: image patches and text tokens share one sequence from the\n"
        "first layer, and no separate vision encoder runs. Architecture: HaploVL (arXiv 2503.14694)."
    ),
    "tower": (
        "A vision-language model in two parts: a vision transformer reads pictures, and two linear layers bring what\n"
        "it sees into a language model. Architecture: LLaVA-1.5 (arXiv 2310.03744)."
    ),
    "patches": (
        "A vision-language model that is one transformer: image patches go through one linear layer into a language\n"
        "model. Architecture: SOLO (arXiv 2407.06438)."
    ),
}
_MASKS = {
    "mixed": "Tokens of one\nimage see each other both ways; everything else is causal.",
    "causal": "In the language model every token sees\nthose before it only.",
}


def _introduction(candidate: dict[str, Any]) -> str:
    model = candidate["params"]["model"]
    return f"# {candidate['name']}\n\n{_KINDS[model['fusion']]} {_MASKS[model['post_mask']]}"


def _training(candidate: dict[str, Any]) -> str:
    params = candidate["params"]
    rows = [
        ("recipe", candidate["recipe"]),
        ("seed", candidate["seed"]),
        ("data source", _source(candidate)),
        ("chat template", params["prepare"]["chat_template"]),
        ("image size", f"{params['model']['image_size']} pixels"),
        (f"stage 1 ({OBJECTIVES[params['stage1']['objective']]})", _stage(params["stage1"])),
        ("stage 2 (instruction tuning)", _stage(params["stage2"])),
        ("vision teacher", _teacher(params["teachers"]["vision"])),
        ("language model", _teacher(params["teachers"]["language"])),
        ("prepared data, sha256 of its manifest", f"`{candidate['data_manifest_sha256']}`"),
        ("model folder, sha256", f"`{candidate['model_sha256']}`"),
        ("params, sha256", f"`{candidate['params_fingerprint']}`"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## Data and training\n\n| | |\n|---|---|\n{table}\n\nAll settings are in `candidate.json`."


def _results(evaluation: dict[str, Any], gate: dict[str, Any]) -> str:
    lines = [
        "## Results",
        "",
        f"Exact match on held-out questions: **{evaluation['accuracy']:.3f}**. The baselines give the most frequent",
        "answer of each type among the test questions, and ask the same model with a blank picture.",
        "",
        "| question type | accuracy | majority | blank image | margin | questions |",
        "|---|---|---|---|---|---|",
    ]
    for name, scores in sorted(evaluation["types"].items()):
        values = (scores["accuracy"], scores["majority"], scores["blank_image"], _margin(scores))
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + f" | {scores['n']} |")
    verdict = "passed" if gate["passed"] else "**failed**: " + "; ".join(gate["reasons"])
    return "\n".join([*lines, "", f"Release gate: {verdict}."])


_LIMITS = """## Limits

The numbers hold for the data named above; other pictures, languages and kinds of question were not measured here.
The model can state wrong answers with confidence. It inherits the licences and the biases of its teachers and data."""

_USE = """## How to use

```bash
.venv/bin/haplovl ask --image picture.png "What is in the picture?"
```

```python
import haplovl.model  # registers the classes with transformers; trust_remote_code is not needed
from transformers import pipeline

ask = pipeline("image-text-to-text", model="models/stage2")  # a folder, or the hub's name of an uploaded one
content = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "What is in the picture?"}]
print(ask(text=[{"role": "user", "content": content}], return_full_text=False)[0]["generated_text"])
```

`AutoModelForImageTextToText` and `AutoProcessor` load the same folder after the same import. On the hub this card is
the `README.md` beside the files of `models/stage2`."""


def _margin(scores: dict[str, Any]) -> float:
    return scores["accuracy"] - max(scores["majority"], scores["blank_image"])


def _source(candidate: dict[str, Any]) -> str:
    return ", ".join(source["name"] for source in candidate["params"]["collect"]["sources"])


OBJECTIVES = {"distillation": "distillation", "next_token": "next-token pretraining", "none": "left out"}


def _stage(stage: dict[str, Any]) -> str:
    if "steps" not in stage:
        return "none"
    batch = stage["batch"]
    return (
        f"{stage['steps']} steps of {batch['rows']} rows of {batch['row_tokens']} tokens, "
        f"AdamW at {stage['optimizer']['learning_rate']:g}, {stage['precision']}"
    )


def _teacher(teacher: dict[str, Any]) -> str:
    if teacher["kind"] == "hub":
        return f"{teacher['id']} at `{teacher['revision']}`"
    if teacher["kind"] == "folder":
        return f"local folder `{teacher['path']}`"
    return f"trained here: {teacher['layers']} layers of width {teacher['hidden_size']}"
