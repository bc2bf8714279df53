"""Progress of long steps: a live Rich bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 10.0
BAR_WIDTH = 10
"""Characters: leaves room for a step's figures on a line of 120."""


class Reporter:
    """Shows how far a step is; call `update` as often as you like."""

    def __init__(self, name: str, total: int, start: int = 0) -> None:
        self.name, self.total, self.start = name, total, start
        self.began = self.last_line = time.monotonic()
        self.live: Progress | None = None
        self.task = None

    def update(self, done: int, text: str = "") -> None:
        """Shows `done` of `total` units and a short text such as the loss and the speed."""
        if self.live is not None and self.task is not None:
            self.live.update(self.task, completed=done, text=text)
            return
        now = time.monotonic()
        if now - self.last_line < LINE_EVERY_SECONDS and done < self.total:
            return
        self.last_line = now
        print(f"{self.name} {self._bar(done)} {done}/{self.total} {text} {self._left(done)}", flush=True)

    def say(self, text: str) -> None:
        """Prints a line of its own, above the bar where there is one."""
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def seconds_left(self, done: int) -> float | None:
        """Time to the end at the mean speed so far; None before the first unit is done."""
        if done <= self.start:
            return None
        return (time.monotonic() - self.began) / (done - self.start) * (self.total - done)

    def _bar(self, done: int) -> str:
        filled = round(BAR_WIDTH * done / max(self.total, 1))
        return "[" + "#" * filled + "." * (BAR_WIDTH - filled) + "]"

    def _left(self, done: int) -> str:
        seconds = self.seconds_left(done)
        return "" if seconds is None else f"{_clock(round(seconds))} left"


def _clock(seconds: int) -> str:
    """3d 04h, 2:03:04 or 3:04."""
    if seconds >= 86400:
        return f"{seconds // 86400}d {seconds % 86400 // 3600:02d}h"
    minutes = f"{seconds % 3600 // 60}:{seconds % 60:02d}"
    return f"{seconds // 3600}:{minutes:0>5}" if seconds >= 3600 else minutes


@contextmanager
def reporter(name: str, total: int, start: int = 0) -> Iterator[Reporter]:
    """Yields a Reporter; on a terminal it draws a live bar with the time left."""
    report = Reporter(name, total, start)
    if not sys.stdout.isatty():
        yield report
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(BAR_WIDTH),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=Console()) as live:
        report.live = live
        report.task = live.add_task(name, total=total, completed=start, text="")
        yield report
