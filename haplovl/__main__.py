"""`python -m haplovl` is the `haplovl` command."""

from haplovl.cli import main

main()
