"""The `haplovl` command: one sub-command per DVC stage, and a few for people.

Every command imports what it needs when it runs, so that `haplovl --help` answers at once.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from haplovl.cli_evidence import evidence
from haplovl.cli_options import Images, MaxNewTokens, Model, Videos, only_errors_of_transformers
from haplovl.cli_registry import versions

app = typer.Typer(
    help="Train, evaluate and register your own single-transformer vision-language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def collect() -> None:
    """Bring the data sources into data/raw/."""
    from haplovl.data.collect import collect
    from haplovl.settings import load_params

    collect(load_params())


@app.command()
def validate(
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one for every core.")] = None,
) -> None:
    """Check every record; bad ones go to data/quarantine/ with the reason."""
    from haplovl.data.validate import validate
    from haplovl.settings import load_params

    validate(load_params(), processes=processes)


@app.command()
def inspect(
    id: Annotated[str, typer.Argument(help="A record's id.")],
    source: Annotated[str | None, typer.Option(help="Its source, where several have this id.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the tiled pictures to this PNG file.")] = None,
) -> None:
    """Show a record as the model will see it, tokens that carry loss in green; or why it was refused."""
    only_errors_of_transformers()
    from haplovl.inspection import inspect
    from haplovl.settings import load_params

    if not inspect(load_params(), id, source, output):
        raise typer.Exit(1)


data = typer.Typer(help="Versions of the data.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command()
def accept() -> None:
    """Make the data as it was validated last the version that later ones are compared with (data/accepted.json)."""
    from haplovl.data.profile import accept

    accept()


@app.command()
def teachers() -> None:
    """Find, fetch or train the two teachers."""
    from haplovl.settings import load_params
    from haplovl.teachers import make_teachers

    make_teachers(load_params())


@app.command()
def prepare() -> None:
    """Turn validated records into Parquet shards of token ids and label spans."""
    from haplovl.data.prepare import prepare
    from haplovl.settings import load_params

    prepare(load_params())


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="stage1 (distillation) or stage2 (instruction tuning)")],
    compute: Annotated[
        str | None, typer.Option(help="Profile from infra/compute/; default: $HAPLOVL_COMPUTE or laptop.")
    ] = None,
    resume_from: Annotated[
        Path | None, typer.Option(help="A checkpoint of this run to go on from, instead of its newest one.")
    ] = None,
    overfit: Annotated[
        int | None,
        typer.Option(min=1, help="Self-test: can the stage learn this many records by heart? Writes nothing."),
    ] = None,
) -> None:
    """Train one stage; a killed run continues from its last checkpoint."""
    # The teachers are whole by now: transformers' notes on loading (a CLIP's unused text tower) tell nothing new.
    only_errors_of_transformers()
    from haplovl.errors import UserError
    from haplovl.settings import load_compute, load_params

    profile = load_compute(compute)
    # What a launcher, srun or a job's script started is a rank, whatever the profile says.
    started = (
        "RANK" in os.environ or "HAPLOVL_JOB" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    )
    if overfit is not None:
        from haplovl.train.overfit import overfit as learn_by_heart

        if profile.launcher != "local" and not started:
            raise UserError(
                f"--overfit trains where it is called, and compute profile '{profile.name}' does not: choose one with "
                "launcher: local, or call it by srun with the profile's tasks"
            )
        raise typer.Exit(0 if learn_by_heart(stage, load_params(), profile, overfit) else 1)
    if profile.launcher == "slurm" and resume_from is not None:
        raise typer.BadParameter("a job goes on by itself; --resume-from is for profiles with launcher: local")
    if profile.launcher == "slurm" and not started:
        from haplovl.slurm import train_as_job

        train_as_job(stage, load_params(), profile)
        return
    if profile.launcher == "sky" and not started:
        raise UserError(
            f"compute profile '{profile.name}' trains on rented nodes: 'make pipeline COMPUTE={profile.name}' launches "
            "them; choose another profile to train on this machine"
        )
    from haplovl.train.trainer import train_stage

    train_stage(stage, load_params(), profile, resume_from)


@app.command()
def plan(
    stage: Annotated[str, typer.Argument(help="stage1, stage2 or both.")] = "both",
    compute: Annotated[
        str | None, typer.Option(help="Profile from infra/compute/; default: $HAPLOVL_COMPUTE or laptop.")
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="Model FLOPs utilisation to expect; default: the last run's, else assumed."),
    ] = None,
    params: Annotated[
        Path, typer.Option(help="The recipe; a preset of params/ may be planned before it is used.")
    ] = Path("params.yaml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")] = False,
) -> None:
    """Tell what training will need and cost: memory for every ZeRO stage, time and price. Needs no data or weights."""
    only_errors_of_transformers()
    from haplovl.settings import load_compute, load_params
    from haplovl.train.plan_table import print_plan

    print_plan(stage, load_params(params), load_compute(compute), mfu, as_json)


@app.command()
def evaluate() -> None:
    """Answer the held-out questions and write metrics and the report."""
    from haplovl.evaluate.runner import evaluate
    from haplovl.evaluate.tracked import log_evaluation
    from haplovl.settings import load_params

    params = load_params()
    evaluate(params)
    log_evaluation(params)


@app.command()
def register() -> None:
    """Write the deterministic candidate: model card, lineage and gate verdict."""
    from haplovl.registry import register
    from haplovl.settings import load_params

    register(load_params())


@app.command()
def publish() -> None:
    """Commit dvc.lock and lineage.json, tag the version (GTO) and log the W&B artifact."""
    from haplovl.publish import publish
    from haplovl.settings import load_params

    publish(load_params())


@data.command()
def diff(
    before: Annotated[str, typer.Argument(help="A git revision (commit, tag, branch), or: workspace.")],
    after: Annotated[str, typer.Argument(help="Likewise.")] = "workspace",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")] = False,
) -> None:
    """Tell which validated records were added, removed or changed between two versions, by source."""
    from haplovl.data.versions import print_diff

    print_diff(before, after, as_json)


@data.command()
def of(
    version: Annotated[str, typer.Argument(help="Such as haplovl@v0.0.1; default: all registered versions.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list, for scripts.")] = False,
) -> None:
    """Tell which version of the data a registered model saw."""
    from haplovl.data.versions import print_seen

    print_seen(version, as_json)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question, in quotes; - reads it from standard input.")],
    image: Images = None,
    video: Videos = None,
    model: Model = Path("models/stage2"),
    max_new_tokens: MaxNewTokens = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")] = False,
) -> None:
    """Ask a trained model one question about pictures and videos."""
    only_errors_of_transformers()
    from haplovl.terminal import ask

    ask(model, question, image or [], video or [], max_new_tokens, as_json)


@app.command()
def chat(
    image: Images = None,
    video: Videos = None,
    model: Model = Path("models/stage2"),
    system: Annotated[str, typer.Option(help="A system text, ahead of the conversation.")] = "",
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    max_new_tokens: MaxNewTokens = 256,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Makes answers at a temperature repeatable.")
    ] = None,
) -> None:
    """Talk with a trained model about pictures and videos; from a pipe, one message or command per line."""
    only_errors_of_transformers()
    from haplovl.terminal import talk

    if not talk(model, image or [], video or [], system, temperature, max_new_tokens, seed):
        raise typer.Exit(1)


@app.command()
def import_released(
    source: Annotated[Path, typer.Argument(help="A checkpoint folder in the layout of the authors' release.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Turn a released HaploVL checkpoint into one of ours."""
    only_errors_of_transformers()
    from haplovl.errors import UserError
    from haplovl.model.import_released import import_released

    try:
        print(import_released(source, target))
    except ValueError as error:
        raise UserError(str(error)) from None


@app.command()
def export_released(
    source: Annotated[Path, typer.Argument(help="A model folder of ours.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Write a model of ours in the layout of the authors' release; what that cannot hold is refused by name."""
    only_errors_of_transformers()
    from haplovl.errors import UserError
    from haplovl.model.export_released import export_released

    try:
        print(export_released(source, target))
    except ValueError as error:
        raise UserError(str(error)) from None


app.add_typer(versions)
app.add_typer(evidence)


@app.command()
def preset(name: Annotated[str | None, typer.Argument(help="A file of params/, without .yaml.")] = None) -> None:
    """List the presets of params/, or make one the params.yaml of this project."""
    from haplovl.presets import list_presets, use_preset

    print("\n".join(list_presets()) if name is None else use_preset(name))


def _end(message: str, again: bool) -> NoReturn:
    """Prints the message and exits with 1, or with the status that asks for another try."""
    from haplovl.errors import EXIT_AGAIN

    if not again:
        sys.exit(message)
    print(message, file=sys.stderr)
    sys.exit(EXIT_AGAIN)


def main() -> None:
    """Runs the command; an error meant for the user ends it with one sentence and exit code 1 (75: try again)."""
    from haplovl.errors import TemporaryError, UserError, is_temporary, printable
    from haplovl.redaction import without_secrets

    try:
        app()
    except UserError as error:
        _end(f"error: {without_secrets(printable(str(error)))}", again=isinstance(error, TemporaryError))
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            _end(f"error: {error.strerror}: {error.filename or 'while writing'}", again=is_temporary(error))
        # An error that nobody foresaw may name a remote with its password.
        sys.exit(without_secrets(traceback.format_exc().rstrip()))
