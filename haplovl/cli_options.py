"""Options that several commands share."""

import os
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path, typer.Option(help="A trained model's folder.")]
Images = Annotated[list[Path] | None, typer.Option(help="An image file; repeat it for several.")]
Videos = Annotated[list[Path] | None, typer.Option(help="A video file; repeat it for several.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]


def only_errors_of_transformers() -> None:
    """Must run before transformers is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
