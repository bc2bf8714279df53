"""The console that tables are printed on."""

import os
import sys

from rich.console import Console

WIDE = 10_000
"""Characters in a line that nobody's window limits."""


def wide_console() -> Console:
    """A console that folds cells for a window only: a file or a pipe gets every row of a table as one line.

    COLUMNS sets another width, as everywhere.
    """
    windowed = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if windowed else WIDE)
