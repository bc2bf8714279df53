"""Progress of long steps: a live Rich bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 10.0


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
        print(f"{self.name} {self._bar(done)} {done}/{self.total} {text} {self._left(done, now)}", flush=True)

    def _bar(self, done: int, width: int = 20) -> str:
        filled = round(width * done / max(self.total, 1))
        return "[" + "#" * filled + "." * (width - filled) + "]"

    def _left(self, done: int, now: float) -> str:
        if done <= self.start:
            return ""
        seconds = round((now - self.began) / (done - self.start) * (self.total - done))
        return f"{seconds // 60}:{seconds % 60:02d} left"


@contextmanager
def reporter(name: str, total: int, start: int = 0) -> Iterator[Reporter]:
    """Yields a Reporter; on a terminal it draws a live bar with the time left."""
    report = Reporter(name, total, start)
    if not sys.stdout.isatty():
        yield report
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=Console()) as live:
        report.live = live
        report.task = live.add_task(name, total=total, completed=start, text="")
        yield report
