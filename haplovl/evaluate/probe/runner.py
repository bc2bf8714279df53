"""The probe: how good stage 1 is on its own, before any language model speaks."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table

from haplovl.data.loader import PreparedRecords
from haplovl.data.media import Media
from haplovl.data.prepare import read_manifest
from haplovl.data.validated import read_validated
from haplovl.errors import UserError
from haplovl.evaluate.console import wide_console
from haplovl.evaluate.probe.classes import PictureSet
from haplovl.evaluate.probe.held_out import in_records, spread
from haplovl.evaluate.probe.report import write_report, zero_shot_questions
from haplovl.evaluate.probe.subject import Subject, load_subject
from haplovl.evaluate.probe.vision import at_resolution, resolutions
from haplovl.evaluate.probe.zero_shot import WAYS, fit, picture_sets, undefined, zero_shot
from haplovl.files import METRICS, PREPARED, RAW, REPORTS, STAGE1, VALIDATED, require, whole_folder, write_json
from haplovl.pictures import ImageError
from haplovl.progress import reporter
from haplovl.settings import Params

SECTIONS = ("vision", "current_token", "zero_shot")
NO_DISTILLATION = "stage 1 of this recipe is not a distillation"
DECIMALS = 4


def probe(params: Params, root: Path = Path(".")) -> None:
    """Measures stage 1 and writes metrics/stage1.json and reports/stage1/ below `root`.

    A section that a recipe cannot have holds `undefined` and the reason instead of figures.

    Raises:
        UserError: an input is missing or damaged, there is no held-out record, or `probe.imagenet` cannot be used.
    """
    metrics: dict[str, Any] = {name: {"undefined": NO_DISTILLATION} for name in SECTIONS}
    cka = None
    if params.stage1.objective == "distillation":
        metrics, cka = measure(params, root)
    metrics = rounded(metrics)
    with whole_folder(root / REPORTS / "stage1") as folder:
        write_report(folder / "index.html", params, metrics, cka)
    write_json(root / METRICS / "stage1.json", metrics)
    console = wide_console()
    console.print(summary_table(metrics))
    console.print(f"The report is {root / REPORTS / 'stage1' / 'index.html'}", markup=False)


def measure(params: Params, root: Path) -> tuple[dict[str, Any], list[list[float]] | None]:
    """All figures, and CKA of the pre-decoder's hidden states with the teacher's in the trained resolution."""
    to_classify = picture_sets(params)  # first, as a wrong folder should not cost the time of the rest
    split = _held_out_split(root)
    subject = load_subject(root)
    records = PreparedRecords(split, subject.processor, root / PREPARED)
    chosen = spread(len(records), params.probe.records)
    states = subject.layers[1]
    target = params.stage1.taught_state(states)
    if subject.taught is not None and subject.taught % states != target:
        raise UserError(
            f"stage1.vision_layer is {params.stage1.vision_layer} now, but {STAGE1} was trained with {subject.taught}; "
            "'haplovl train stage1' trains it again"
        )
    with reporter("held-out records", len(chosen)) as report:
        seen, words = in_records(subject, records, chosen, target, params.probe.batch, report.update)
    alone, cka = _alone(subject, params, root, split, target)
    if subject.vision_head is None:
        seen = _undefined("the vision loss had no weight in stage 1")
    if subject.text_head is None:
        words = _undefined("neither of the text losses had a weight in stage 1")
    no_picture = _undefined(f"no record of the {split} split has a picture")
    metrics = {
        "split": split,
        "records": len(chosen),
        "vision": {"layer": target, "in_records": seen or no_picture, "alone": alone} if alone else no_picture,
        "current_token": words,
        "zero_shot": _zero_shot(subject, params, root, to_classify, target),
    }
    return metrics, cka


def _held_out_split(root: Path) -> str:
    """The test split, or the validation split where there is none."""
    totals = read_manifest(root / PREPARED)["totals"]
    split = next((name for name in ("test", "validation") if totals[name]["records"]), None)
    if split is None:
        raise UserError(f"{PREPARED} holds neither test nor validation records, so stage 1 cannot be measured")
    return split


def _alone(
    subject: Subject, params: Params, root: Path, split: str, target: int
) -> tuple[dict[str, Any], list[list[float]] | None]:
    """The figures of every resolution, and CKA in the trained one."""
    pictures = _pictures(root, split, params.probe.records)
    figures: dict[str, Any] = {}
    matrix = None
    if not pictures:
        return figures, matrix
    for resolution in resolutions(subject.processor.image_processor):
        with reporter(f"pictures, {resolution.name} pixels", len(pictures)) as report:
            own, cka = at_resolution(subject, resolution, pictures, target, params.probe.batch, report.update)
        figures[resolution.name] = own
        matrix = cka if resolution.is_trained else matrix
    return figures, matrix


def _pictures(root: Path, split: str, limit: int) -> list[Callable[[], Image.Image]]:
    """At most `limit` pictures of the split's records, evenly spread."""
    places = [
        (item.source, image.path)
        for item in read_validated(require(root / VALIDATED, "validate"), split=split)
        for image in item.images
    ]
    media = Media(root / RAW)
    return [partial(_open, media, *places[number]) for number in spread(len(places), limit)]


def _open(media: Media, source: str, reference: str) -> Image.Image:
    try:
        return media.open(source, reference)
    except ImageError as error:
        raise UserError(f"picture {reference} of {source}: {error}; run 'haplovl validate' again") from None


def _zero_shot(
    subject: Subject, params: Params, root: Path, to_classify: dict[str, PictureSet], target: int
) -> dict[str, Any]:
    if reason := undefined(subject, params):
        return _undefined(reason)
    results = {}
    training = _pictures(root, "train", params.probe.fit_pictures)
    with reporter("training pictures", len(training)) as report:
        fitted = fit(subject, training, target, params.probe.batch, report.update)
    for name, shown in to_classify.items():
        with reporter(f"zero-shot, {name}", len(shown.pictures)) as report:
            results[name] = zero_shot(subject, shown, fitted, target, params.probe.batch, report.update)
    return results


def _undefined(reason: str) -> dict[str, str]:
    return {"undefined": reason}


def rounded(value: Any) -> Any:
    """The same figures with DECIMALS decimals: what lies behind them differs from machine to machine."""
    if isinstance(value, dict):
        return {name: rounded(own) for name, own in value.items()}
    return round(value, DECIMALS) if isinstance(value, float) else value


def summary_table(metrics: dict[str, Any]) -> Table:
    """The main figures as a table for the terminal."""
    table = Table(title="Stage 1")
    for name in ("figure", "value", "to compare with"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for row in _summary(metrics):
        table.add_row(*row)
    return table


def _summary(metrics: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name in SECTIONS:
        if "undefined" in metrics[name]:
            yield name.replace("_", " "), "undefined", metrics[name]["undefined"]
    vision = metrics["vision"]
    for name, own in {"among words": vision.get("in_records", {}), **vision.get("alone", {})}.items():
        if "cosine" in own:
            yield f"cosine to the teacher, {name}", f"{own['cosine']:.3f}", f"a constant {own['constant']:.3f}"
    for name, own in metrics["current_token"].items():
        if name != "undefined":
            yield f"current token, {name}", f"{own['top1']:.3f}", f"most frequent token {own['most_frequent']:.3f}"
    for name, question in zero_shot_questions(metrics).items():
        others = f"teacher {question['teacher']:.3f}, chance {question['chance']:.3f}"
        ways = [way for way in WAYS if way in question]
        yield f"zero-shot, {name}", " ".join(f"{way} {question[way]:.3f}" for way in ways), others
