"""The benchmarks by name."""

from difflib import get_close_matches

from haplovl.errors import UserError
from haplovl.evaluate.benchmarks.mmbench import MMBENCH_EN_DEV
from haplovl.evaluate.benchmarks.mmmu import MMMU_VAL
from haplovl.evaluate.benchmarks.mmvp import MMVP
from haplovl.evaluate.benchmarks.multiple_choice import AI2D, MMSTAR, REALWORLDQA, SCIENCEQA_IMG, SEEDBENCH_IMG
from haplovl.evaluate.benchmarks.pope import POPE
from haplovl.evaluate.benchmarks.rules import Benchmark, Record, Reference
from haplovl.evaluate.benchmarks.short_answers import GQA, VQAV2

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        *(GQA, VQAV2, SCIENCEQA_IMG, AI2D, MMBENCH_EN_DEV, MMMU_VAL),
        *(REALWORLDQA, MMSTAR, POPE, SEEDBENCH_IMG, MMVP),
    )
}


def names() -> list[str]:
    """The names of all benchmarks."""
    return list(BENCHMARKS)


def find(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        UserError: there is none; names the nearest and all.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    raise UserError(f"there is no benchmark {name!r}{_nearest(name, names())}; there are {', '.join(names())}")


def reference(benchmark: Benchmark, name: str) -> Reference:
    """One of a benchmark's references.

    Raises:
        UserError: it has none of this name.
    """
    if name in benchmark.references:
        return benchmark.references[name]
    there = ", ".join(benchmark.references)
    near = _nearest(name, list(benchmark.references))
    raise UserError(f"{benchmark.name} has no reference {name!r}{near}; it has {there}")


def prompt(name: str, record: Record) -> str:
    """What lmms-eval 0.7.3 asks about a record, pictures apart.

    Raises:
        UserError: there is no such benchmark.
    """
    return find(name).prompt(record)


def result_name(name: str, limit: int | None) -> str:
    """The name of a result's files: a part of the questions never takes the place of all of them."""
    return name if limit is None else f"{name}.first-{limit}"


def _nearest(name: str, among: list[str]) -> str:
    plain = {known.replace("_", ""): known for known in among}
    near = get_close_matches(name.lower().replace("_", "").replace("-", ""), plain, 1, 0.5)
    return f" (did you mean {plain[near[0]]}?)" if near else ""
