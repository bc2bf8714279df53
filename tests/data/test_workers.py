"""Work over processes keeps the order of its tasks and outlives a process that dies."""

import os
from dataclasses import dataclass

import pytest

from haplovl.data.workers import in_order


@dataclass(frozen=True)
class Double:
    """Doubles numbers; one of them kills its process."""

    deadly: int = -1

    def __call__(self, items: list[int]) -> list[int]:
        if self.deadly in items:
            os._exit(9)
        if 1000 in items:
            raise ValueError("a thousand")
        return [2 * item for item in items]


TASKS = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(40)]


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_the_order_of_the_tasks(processes: int) -> None:
    done = list(in_order(Double(), TASKS, lambda item: [], processes))
    assert done == [[2 * item for item in task] for task in TASKS]


def test_an_item_that_kills_its_process_costs_only_itself() -> None:
    done = in_order(Double(deadly=31), TASKS, lambda item: [-item], processes=2)
    assert [number for part in done for number in part] == [2 * n if n != 31 else -31 for n in range(120)]


def test_other_errors_are_raised() -> None:
    with pytest.raises(ValueError, match="a thousand"):
        list(in_order(Double(), [[1], [1000]], lambda item: [], processes=1))
