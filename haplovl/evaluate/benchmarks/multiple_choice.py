"""Benchmarks of single multiple-choice questions: ScienceQA-IMG, AI2D, SEED-Bench-IMG, RealWorldQA and MMStar.

The rules of lmms-eval differ from one to the next: a leading 'A.' (ScienceQA, AI2D), the first character (SEED), or a
letter found anywhere (RealWorldQA, MMStar).
"""

import re
from collections.abc import Sequence
from typing import Any

from haplovl.evaluate.benchmarks.option_letters import last_marked_letter, vlmevalkit
from haplovl.evaluate.benchmarks.rules import (
    LETTERS,
    LMMS_EVAL,
    Benchmark,
    Judgement,
    Record,
    Reference,
    anything,
    by,
    choices,
    columns,
    filled,
    hit,
    identity,
    lettered,
    maybe,
    mean,
    mean_score,
    means_by,
    number,
    one_of,
    option_lines,
    text,
    texts,
)
from haplovl.evaluate.benchmarks.short_answers import REALWORLDQA_ASKS, bare

BY_LETTER = "Answer with the option's letter from the given choices directly."
ABCD = LETTERS[:4]


def accuracy(records: Sequence[Record], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """The aggregate of a benchmark without categories."""
    return {"accuracy": mean_score(judgements)}


# ---- ScienceQA-IMG


def _science_gold(record: Record) -> str:
    return LETTERS[record["answer"]]


def _science(record: Record, answer: str) -> Judgement:
    """lmms-eval's `sqa_process_results`: the letter alone (any case), or a capital and a period at the start."""
    said, gold = answer.strip(), _science_gold(record)
    if said.lower() == gold.lower():
        return hit(True, gold)
    if len(said) >= 2 and said[0].isupper() and said[1] == ".":
        return hit(said[0].lower() == gold.lower(), said[0])
    letters = lettered(record["choices"])
    return hit(False, said.upper() if said.upper() in letters else None)


def _science_llava(record: Record, answer: str) -> Judgement:
    """LLaVA's: the letter alone, at the start as 'A. ', or once after 'The answer is ', with a character behind it."""
    said = answer.strip()
    found: str | None = None
    if said in list("ABCDE"):
        found = said
    elif said[:1] in list("ABCDE") and said[1:3] == ". ":
        found = said[0]
    else:
        named = re.findall(r"The answer is ([A-Z]).", said)
        found = named[0] if len(named) == 1 else None
    among = lettered(record["choices"][:5])
    return hit(found == _science_gold(record) and found in among, found if found in among else None)


def _science_check(record: Record) -> str | None:
    last = len(record["choices"]) - 1
    return None if 0 <= record["answer"] <= last else f"a question whose answer is the number (0 to {last}) of a choice"


def _science_prompt(record: Record) -> str:
    context = f"Context: {record['hint']}\n" if record["hint"] else ""
    return f"{context}{record['question']}\n{option_lines(record['choices'])}\n{BY_LETTER}"


SCIENCEQA_IMG = Benchmark(
    name="scienceqa_img",
    title="ScienceQA-IMG",
    dataset="lmms-lab/ScienceQA, ScienceQA-IMG",
    split="test",
    published=2_017,
    optional={"id": maybe(identity)},
    fields={"question": filled, "choices": choices, "answer": number, "hint": text},
    columns=columns("id image question choices answer hint task grade subject topic category skill lecture solution"),
    prompt=_science_prompt,
    references={
        LMMS_EVAL: Reference(_science, "lmms-eval 0.7.3 tasks/scienceqa/utils.py sqa_process_results"),
        "llava": Reference(_science_llava, "haotian-liu/LLaVA@c121f04 llava/eval/eval_science_qa.py"),
        "vlmevalkit": vlmevalkit(lambda record: lettered(record["choices"]), _science_gold),
    },
    aggregate=accuracy,
    headline=("accuracy",),
    max_new_tokens=16,
    key=lambda record: record.get("id"),
    check=_science_check,
)


# ---- AI2D


def _ai2d_gold(record: Record) -> str:
    return LETTERS[int(record["answer"])]


def _ai2d(record: Record, answer: str) -> Judgement:
    """lmms-eval's filter reads a capital and a period at the start; else the whole answer is compared, bare."""
    start = re.match(r"\s*([A-Z])\.", answer)
    said = bare((start[1] if start else answer).strip())
    letters = lettered(record["options"])
    return hit(said == bare(_ai2d_gold(record)), said.upper() if said.upper() in letters else None)


def _place(value: Any) -> str | None:
    good = number(value) is None or (isinstance(value, str) and re.fullmatch(r"\s*\d{1,2}\s*", value))
    return None if good else "the number of the right option, from 0"


def _ai2d_check(record: Record) -> str | None:
    last = len(record["options"]) - 1
    inside = 0 <= int(record["answer"]) <= last
    return None if inside else f"a question whose answer is the number (0 to {last}) of an option"


AI2D = Benchmark(
    name="ai2d",
    title="AI2D",
    dataset="lmms-lab/ai2d",
    split="test",
    published=3_088,
    optional={"id": maybe(identity)},
    fields={"question": filled, "options": choices, "answer": _place},
    columns=columns("id image question options answer"),
    prompt=lambda record: f"{record['question']}\n{option_lines(record['options'])}\n{BY_LETTER}",
    references={
        LMMS_EVAL: Reference(
            _ai2d, "lmms-eval 0.7.3 tasks/ai2d/utils.py MultiChoiceRegexFilter, then api/metrics.py exact_match"
        ),
        "vlmevalkit": vlmevalkit(lambda record: lettered(record["options"]), _ai2d_gold),
    },
    aggregate=accuracy,
    headline=("accuracy",),
    max_new_tokens=16,
    key=lambda record: record.get("id"),
    check=_ai2d_check,
)


# ---- SEED-Bench-IMG


def _seed_options(record: Record) -> dict[str, str]:
    return {letter: record[f"choice_{letter.lower()}"] for letter in ABCD}


def _gold(record: Record) -> str:
    return record["answer"].strip().upper()


def _seed(record: Record, answer: str) -> Judgement:
    """lmms-eval's `seed_process_result`: the first character, whatever follows; 'apple' says A."""
    said = answer.strip()[:1]
    return hit(said.lower().strip() == _gold(record).lower(), said.upper() if said and said.upper() in ABCD else None)


def _seed_llava(record: Record, answer: str) -> Judgement:
    """LLaVA's `eval_single`: the letter and nothing else."""
    said = answer.strip()
    return hit(said == record["answer"], said if said in _seed_options(record) else None)


def _seed_aggregate(records: Sequence[Record], judgements: Sequence[Judgement]) -> dict[str, Any]:
    result: dict[str, Any] = {"seed_image": mean_score(judgements)}
    if all("question_type_id" in record for record in records):
        result["question_type_id"] = means_by([record["question_type_id"] for record in records], judgements)
    return result


SEEDBENCH_IMG = Benchmark(
    name="seedbench_img",
    title="SEED-Bench-IMG",
    dataset="lmms-lab/SEED-Bench, rows whose data_type is image",
    split="test",
    published=14_233,
    optional={"question_type_id": anything},
    fields={
        "question_id": identity,
        "question": filled,
        **{f"choice_{letter.lower()}": text for letter in ABCD},
        "answer": one_of(*ABCD),
        "data_type": one_of("image"),
    },
    columns=columns(
        "question_id question choice_a choice_b choice_c choice_d answer data_type data_id question_type_id "
        "image segment"
    ),
    prompt=lambda record: f"{record['question']}\n{option_lines(list(_seed_options(record).values()))}\n{BY_LETTER}",
    references={
        LMMS_EVAL: Reference(_seed, "lmms-eval 0.7.3 tasks/seedbench/utils.py seed_process_result"),
        "llava": Reference(_seed_llava, "haotian-liu/LLaVA@c121f04 scripts/convert_seed_for_submission.py eval_single"),
        "vlmevalkit": vlmevalkit(_seed_options, _gold),
    },
    aggregate=_seed_aggregate,
    headline=("seed_image",),
    max_new_tokens=128,
    key=lambda record: str(record["question_id"]),
    keeps=lambda record: record.get("data_type") != "video",
)


# ---- RealWorldQA


def _realworld(record: Record, answer: str) -> Judgement:
    """A letter found anywhere if the right answer is A to D; else the same text, case and end periods aside."""
    said = answer.strip()
    if _gold(record) in list(ABCD):
        letter = last_marked_letter(said, ABCD)
        return hit(letter == _gold(record), letter)
    said = said.lower().rstrip(".")
    return hit(said == record["answer"].strip().lower(), said)


def _realworld_options(record: Record) -> dict[str, str]:
    options = record.get("options")
    return lettered(options) if texts(options) is None and _gold(record) in list(LETTERS) else {}


def _realworld_check_all(records: Sequence[Record]) -> str | None:
    """Nothing but this instruction tells the data set's rows, questions and answers alone, from any others."""
    asking = sum(REALWORLDQA_ASKS in record["question"] for record in records)
    return (
        None
        if 2 * asking >= len(records)
        else f"questions of RealWorldQA end with '{REALWORLDQA_ASKS} …'; these do not"
    )


REALWORLDQA = Benchmark(
    name="realworldqa",
    title="RealWorldQA",
    dataset="lmms-lab/RealWorldQA",
    split="test",
    published=765,
    optional={"id": maybe(identity), "options": maybe(texts)},
    fields={"question": filled, "answer": filled},
    columns=columns("image image_path question answer"),
    prompt=lambda record: record["question"].strip(),
    references={
        LMMS_EVAL: Reference(_realworld, "lmms-eval 0.7.3 tasks/realworldqa/utils.py realworldqa_process_results"),
        "vlmevalkit": vlmevalkit(_realworld_options, _gold),
    },
    aggregate=lambda records, judgements: {"exact_match": mean_score(judgements)},
    headline=("exact_match",),
    max_new_tokens=16,
    key=lambda record: record.get("id"),
    check_all=_realworld_check_all,
)


# ---- MMStar

_MMSTAR_ASKS = "\nAnswer with the option's letter from the given choices directly"


def _mmstar(record: Record, answer: str) -> Judgement:
    """lmms-eval's `exact_match` of MMStar: a letter found anywhere."""
    letter = last_marked_letter(answer.strip(), ABCD)
    return hit(letter == _gold(record), letter)


def _mmstar_prompt(record: Record) -> str:
    return record["question"].strip().replace(" Please answer yes or no.", "") + _MMSTAR_ASKS


def _mmstar_aggregate(records: Sequence[Record], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Every `l2_category` counts once, in `average` and within its category; `micro` is the plain mean."""

    def macro(chosen: list[int]) -> float | None:
        groups = by([records[i]["l2_category"] for i in chosen], [judgements[i] for i in chosen])
        means = [mean_score(group) for group in groups.values()]
        return mean([value for value in means if value is not None])

    everywhere = list(range(len(records)))
    result = {"average": macro(everywhere)}
    for category in sorted({record["category"] for record in records}):
        result[category] = macro([i for i in everywhere if records[i]["category"] == category])
    return {**result, "micro": mean_score(judgements)}


MMSTAR = Benchmark(
    name="mmstar",
    title="MMStar",
    dataset="Lin-Chen/MMStar",
    split="val",
    published=1_500,
    optional={"options": maybe(texts)},
    fields={
        "index": number,
        "question": filled,
        "answer": one_of(*ABCD),
        "category": filled,
        "l2_category": filled,
    },
    columns=columns("index question image answer category l2_category meta_info options"),
    prompt=_mmstar_prompt,
    references={
        LMMS_EVAL: Reference(_mmstar, "lmms-eval 0.7.3 tasks/mmstar/utils.py mmstar_process_results"),
        "vlmevalkit": vlmevalkit(lambda record: lettered(record.get("options") or []), _gold),
    },
    aggregate=_mmstar_aggregate,
    headline=("average",),
    max_new_tokens=128,
    key=lambda record: record["index"],
)
