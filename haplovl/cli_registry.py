"""Commands about registered versions: which there are, where they come from, which is in production, the way back."""

from pathlib import Path
from typing import Annotated

import typer

versions = typer.Typer()
Stage = Annotated[str, typer.Option(help="The stage's name, such as prod.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value, for scripts.")]


@versions.command()
def models(as_json: AsJson = False) -> None:
    """List the registered versions: their stages, accuracy, data and code."""
    from haplovl.promotion_tables import print_models

    print_models(as_json)


@versions.command()
def promote(
    version: Annotated[str | None, typer.Argument(help="Such as v0.0.2; default: the newest.")] = None,
    stage: Stage = "prod",
    force: Annotated[bool, typer.Option("--force", help="Do not ask whether it is worse than the one there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put a version into production unless it is worse there than the present one; exits with 1 if it is."""
    from haplovl.promotion_tables import print_promotion

    if not print_promotion(version, stage, force, as_json):
        raise typer.Exit(1)


@versions.command()
def rollback(stage: Stage = "prod") -> None:
    """Put the version back that was in production before."""
    from haplovl.promotion import rollback
    from haplovl.settings import load_params
    from haplovl.wandb_registry import follow

    settings = load_params().register_
    left, back = rollback(settings.name, stage)
    typer.echo(f"{stage}: {left} → {back}")
    follow(settings, back, stage)


@versions.command()
def get(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")] = Path("model"),
    version: Annotated[str | None, typer.Option(help="Such as v0.0.2, instead of the one in a stage.")] = None,
    stage: Stage = "prod",
) -> None:
    """Fetch the model in production, or of any version."""
    from haplovl.promotion import get
    from haplovl.settings import load_params

    name = load_params().register_.name
    typer.echo(f"{name} {get(name, output, version, stage)} is in {output}")


@versions.command()
def lineage(
    version: Annotated[str, typer.Argument(help="Such as v0.0.2; haplovl models lists them.")],
    as_json: AsJson = False,
) -> None:
    """Tell where a version comes from: code, data, settings, teachers, packages, hardware and W&B runs."""
    from haplovl.lineage_tables import print_lineage

    print_lineage(version, as_json)


@versions.command()
def reproduce(
    version: Annotated[str, typer.Argument(help="Such as v0.0.2; haplovl models lists them.")],
    stage: Annotated[
        list[str] | None, typer.Option(help="Run only this one, with its recorded inputs; may be repeated.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Do not remove the worktree.")] = False,
) -> None:
    """Run a version again in a clean worktree and compare the hashes of all outs; exits with 1 where they part."""
    from haplovl.reproduce_tables import print_reproduction

    if not print_reproduction(version, stage or [], keep):
        raise typer.Exit(1)
