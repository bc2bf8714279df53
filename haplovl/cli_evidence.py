"""Commands that show what a model is worth: benchmarks, comparisons, probes, looks."""

from pathlib import Path
from typing import Annotated

import typer

from haplovl.cli_options import Images, MaxNewTokens, Model, only_errors_of_transformers

evidence = typer.Typer()

comparison = typer.Typer(help="Single runs of `make compare` and `make ablations`.", no_args_is_help=True)
evidence.add_typer(comparison, name="comparison")
Group = Annotated[str, typer.Argument(help="compute (as much as the first recipe), samples (as many), or ablations.")]
Recipe = Annotated[
    str, typer.Argument(help="A file of recipes/, or of recipes/ablations/ in that group, without .yaml.")
]
Seed = Annotated[int, typer.Argument(help="Moves the order of the data and what is drawn at random.")]


@comparison.command(name="train")
def comparison_train(group: Group, recipe: Recipe, seed: Seed) -> None:
    """Train a recipe in a folder of its own, with as many steps as its terms allow."""
    only_errors_of_transformers()
    from haplovl.comparison.runs import Run, train

    train(Run(group, recipe, seed))


@comparison.command(name="evaluate")
def comparison_evaluate(group: Group, recipe: Recipe, seed: Seed) -> None:
    """Probe and evaluate a trained run in its folder."""
    from haplovl.comparison.runs import Run, evaluate

    evaluate(Run(group, recipe, seed))


@comparison.command(name="report")
def comparison_report(
    group: Annotated[
        list[str] | None, typer.Argument(help="compute, samples, ablations; default: all finished.")
    ] = None,
    into: Annotated[
        Path | None, typer.Option(help="Also bring the tables of this Markdown file up to date, between its marks.")
    ] = None,
) -> None:
    """Write reports/comparison/ from the runs that are finished."""
    from haplovl.comparison.report import write_report

    write_report(group, into)


@evidence.command()
def score(
    benchmark: Annotated[
        str,
        typer.Argument(
            help="gqa, vqav2, scienceqa_img, ai2d, mmbench_en_dev, mmmu_val, realworldqa, mmstar, pope, seedbench_img, "
            "mmvp"
        ),
    ],
    file: Annotated[
        Path,
        typer.Argument(
            help="JSON with a list 'records', a JSON list, or JSON lines. An entry has the columns of the published "
            "data set (flat, or inside 'record') and the model's answer as 'prediction'."
        ),
    ],
    reference: Annotated[
        str, typer.Option(help="Whose rule decides; docs/benchmarks.md lists them for every benchmark.")
    ] = "lmms_eval",
) -> None:
    """Score a file of answers to a published benchmark as lmms-eval 0.7.3 does; prints one JSON object.

    'scores' holds one score per record, in order; further 'aggregate', the number of 'unparsed' answers, and 'beside':
    what other references would have counted.
    """
    import json

    from haplovl.evaluate.benchmarks import score_file

    print(json.dumps(score_file(benchmark, file, reference)))


@evidence.command()
def benchmark(
    name: Annotated[str, typer.Argument(help="A benchmark that 'haplovl score' knows.")],
    data: Annotated[Path, typer.Argument(help="A folder with its Parquet or JSON files, or one of them.")],
    model: Model = Path("models/stage2"),
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first so many questions.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Default: reports/benchmarks/NAME.json, NAME.first-N.json with a limit.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions that are answered at a time.")] = 64,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens; default: lmms-eval's, at most 128.")
    ] = None,
) -> None:
    """Ask a trained model a published benchmark from local files; writes answers, scores and hashes."""
    only_errors_of_transformers()
    from haplovl.evaluate.benchmarks.ask import run_benchmark

    run_benchmark(name, data, model, limit, output, batch, max_new_tokens)


@evidence.command()
def harness(
    benchmarks: Annotated[
        list[str],
        typer.Argument(
            help="gqa, vqav2, scienceqa_img, ai2d, mmbench_en_dev, mmmu_val, realworldqa, mmstar, pope, seedbench_img, "
            "mmvp, or: all"
        ),
    ],
    data: Annotated[Path, typer.Option(help="Holds a folder for each benchmark, with the published files.")],
    model: Model = Path("models/stage2"),
    processes: Annotated[int, typer.Option(min=1, help="One for every GPU; each answers its share.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first so many questions.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions that a process answers at a time.")] = 16,
) -> None:
    """Run published benchmarks through lmms-eval (make eval-env), offline; writes metrics/ and reports/benchmarks/."""
    only_errors_of_transformers()
    from haplovl.evaluate.harness.run import run_harness

    run_harness(benchmarks, data, model, processes, limit, batch)


@evidence.command()
def look(
    question: Annotated[str, typer.Argument(help="The question, in quotes.")],
    image: Images = None,
    model: Model = Path("models/stage2"),
    answer: Annotated[
        str | None, typer.Option(help="Look at this answer instead of the model's own.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option(help="The PNG file to write.")] = Path("look.png"),
    with_question: Annotated[bool, typer.Option("--with-question", help="Look at the question's words, too.")] = False,
    max_new_tokens: MaxNewTokens = 64,
) -> None:
    """Draw where each token of an answer looks in the pictures, layer by layer."""
    only_errors_of_transformers()
    from haplovl.look import look_at

    look_at(model, question, image or [], answer, output, max_new_tokens, with_question)


Side = Annotated[Path, typer.Argument(help="A trained model's folder, or a predictions.jsonl of an evaluation.")]


@evidence.command()
def side_by_side(
    a: Side,
    b: Side,
    questions: Annotated[
        Path | None, typer.Option(help="JSON lines with question and images (and answer); default: the evaluation's.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens; default: the evaluation's.")
    ] = None,
) -> None:
    """Show two models' answers to the same questions, differences first."""
    only_errors_of_transformers()
    from haplovl.evaluate.exams import take_exam
    from haplovl.evaluate.side_by_side import show_side_by_side

    show_side_by_side(take_exam(a, b, questions, max_new_tokens))


@evidence.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN RUN…",
            help="The folder of a project, an evaluation, a model, a run of runs/training, or an offline W&B run.",
        ),
    ],
    html: Annotated[Path | None, typer.Option(help="Also write the comparison as a page, to this file.")] = None,
) -> None:
    """Compare runs from their files: settings, losses, speed, accuracies, and whether differences are real."""
    from haplovl.evaluate.compare.show import show

    show(runs, html)


@evidence.command()
def probe() -> None:
    """Measure stage 1 on its own: likeness to the teacher, current tokens, zero-shot classes."""
    only_errors_of_transformers()
    from haplovl.evaluate.probe.runner import probe
    from haplovl.settings import load_params

    probe(load_params())
