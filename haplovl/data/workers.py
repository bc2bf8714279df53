"""Work spread over processes, with results in the order of the tasks, that survives a process that dies."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4
"""Tasks per process that wait or are being done: bounds what is in memory."""

_work: Any = None
"""The worker's function, set once per process."""


def in_order(
    work: Callable[[list[Item]], Result],
    tasks: Iterable[list[Item]],
    crashed: Callable[[Item], Result],
    processes: int | None = None,
) -> Iterator[Result]:
    """Yields `work(task)` for every task, in the order of the tasks, whatever the number of processes.

    `work` is sent to every process once, so it may carry settings; tasks and results travel. A process that dies
    (a decoder's segmentation fault, the kernel out of memory) costs one item: what was in flight is done again item
    by item, and `crashed(item)` stands for the one that kills its process each time. So a task may give several
    results, one per item.

    Raises:
        Exception: whatever `work` raises.
    """
    count = processes or len(os.sched_getaffinity(0))
    source = iter(tasks)
    pool = _pool(work, count)
    flying: deque[tuple[list[Item], Future]] = deque()
    try:
        while True:
            while len(flying) < AHEAD * count and (task := next(source, None)) is not None:
                flying.append((task, _submit(pool, task)))
            if not flying:
                return
            task, future = flying[0]
            try:
                result = future.result()
            except BrokenProcessPool:
                pool.shutdown(cancel_futures=True)
                waiting = [item for task, _ in flying for item in task]
                flying.clear()
                yield from _one_by_one(work, waiting, crashed)
                pool = _pool(work, count)
                continue
            flying.popleft()
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(work: Callable, count: int) -> ProcessPoolExecutor:
    # Started afresh, not forked: the parent holds threads (Arrow's), and a lock copied while it is held never opens.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, initializer=_start, initargs=(work,))


def _start(work: Callable) -> None:
    global _work
    _work = work


def _submit(pool: ProcessPoolExecutor, task: list[Any]) -> Future:
    try:
        return pool.submit(_run, task)
    except BrokenProcessPool as error:
        future: Future = Future()
        future.set_exception(error)
        return future


def _run(task: list[Any]) -> Any:
    return _work(task)


def _one_by_one(
    work: Callable[[list[Item]], Result], items: list[Item], crashed: Callable[[Item], Result]
) -> Iterator[Result]:
    pool = _pool(work, 1)
    try:
        for item in items:
            try:
                yield pool.submit(_run, [item]).result()
            except BrokenProcessPool:
                yield crashed(item)
                pool.shutdown(cancel_futures=True)
                pool = _pool(work, 1)
    finally:
        pool.shutdown(cancel_futures=True)
