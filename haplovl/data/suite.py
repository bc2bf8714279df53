"""The Great Expectations suite that judges the table of facts, and its data docs.

Great Expectations is imported inside the functions: it takes seconds, and only `validate` needs it.
"""

import html
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

NAME = "records"
FIXED_TIME = datetime(2000, 1, 1, tzinfo=UTC)
"""Stands for the run's time: data docs are a DVC out and hold no clock."""

PLACE = ("row", "source", "file", "position", "id")
"""Columns that tell the reader of the data docs which record is meant."""


@dataclass(frozen=True)
class Check:
    """One expectation about one column of the facts.

    A column of texts (`counted=False`) must be empty where the record is fine; a column of counts must be 0. `reason`
    is the text for quarantine, filled in from the row's facts.
    """

    name: str
    column: str
    note: str
    reason: str
    counted: bool = True


CHECKS = (
    Check("entry", "entry_error", "The entry is valid JSON and has the fields of a record.", "{entry_error}", False),
    Check(
        "conversation",
        "conversation_error",
        "The conversation is not empty and its turns alternate between human and gpt.",
        "{conversation_error}",
        False,
    ),
    Check(
        "image",
        "image_error",
        "Every image lies inside the image folder, is not too large and decodes to its last pixel.",
        "{image_error}",
        False,
    ),
    Check(
        "placeholders",
        "surplus_placeholders",
        "The questions hold one `<image>` for every image.",
        "{placeholders} image placeholders for {images} images",
    ),
    Check(
        "stray_placeholder",
        "stray_placeholders",
        "No answer and no system prompt holds `<image>`.",
        "{stray_placeholders} image placeholders outside the questions",
    ),
    Check(
        "blank",
        "blank_messages",
        "No answer is blank, and no question has neither text nor image.",
        "{blank_messages} blank messages",
    ),
    Check(
        "duplicate_id",
        "earlier_same_id",
        "The id occurs for the first time.",
        "{earlier_same_id} earlier records have the same id",
    ),
    Check(
        "split",
        "split_conflict",
        "No image of the record occurs, byte for byte, in a split that is held out from the record's own.",
        "{split_conflict}",
        False,
    ),
)


def judge(table: "pd.DataFrame", docs: Path | None = None) -> dict[str, list[int]]:
    """Runs the suite over a table of facts, which has the columns of PLACE and one per check.

    Returns the `row` values that fail, by check name (every check has an entry). Writes data docs, whose bytes depend
    on the table alone, into the existing folder `docs` if it is given.

    Raises:
        RuntimeError: Great Expectations could not judge a column.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    from great_expectations.core.run_identifier import RunIdentifier

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    batch = context.data_sources.add_pandas(NAME).add_dataframe_asset(NAME).add_batch_definition_whole_dataframe("all")
    suite = context.suites.add(gx.ExpectationSuite(NAME, expectations=[_expectation(check) for check in CHECKS]))
    definition = context.validation_definitions.add(gx.ValidationDefinition(name=NAME, data=batch, suite=suite))
    wanted = {"result_format": "COMPLETE", "unexpected_index_column_names": list(PLACE)}
    # The query would spell out every bad row's number in the page.
    wanted["return_unexpected_index_query"] = False
    checkpoint = gx.Checkpoint(name=NAME, validation_definitions=[definition], result_format=wanted)
    run_id = RunIdentifier(run_name="validate", run_time=FIXED_TIME)
    result = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": _escaped(table)}, run_id=run_id)
    if docs is not None:
        _write_docs(context, docs)
    (validation,) = result.run_results.values()
    failed = {outcome.expectation_config.meta["check"]: _rows(outcome) for outcome in validation.results}
    return {check.name: failed[check.name] for check in CHECKS}


def _expectation(check: Check) -> Any:
    import great_expectations.expectations as gxe

    about = {"column": check.column, "meta": {"check": check.name}, "notes": check.note}
    if check.counted:
        return gxe.ExpectColumnValuesToBeInSet(value_set=[0], **about)
    return gxe.ExpectColumnValuesToBeNull(**about)


def _escaped(table: "pd.DataFrame") -> "pd.DataFrame":
    """The table with its texts as HTML: data docs show them as they are, and they come from untrusted annotations."""
    columns = ["file", "id", *(check.column for check in CHECKS if not check.counted)]
    return table.assign(**{name: table[name].map(html.escape, na_action="ignore") for name in columns})


def _rows(outcome: Any) -> list[int]:
    if outcome.success:
        return []
    found = outcome.result.get("unexpected_index_list")
    if not found:
        raise RuntimeError(f"Great Expectations could not judge {outcome.expectation_config}: {outcome.exception_info}")
    return sorted(int(entry["row"]) for entry in found)


def _write_docs(context: Any, docs: Path) -> None:
    """Builds the site in `docs`, and takes out of its pages what changes from run to run."""
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())}
    index = {"class_name": "DefaultSiteIndexBuilder"}
    context.add_data_docs_site(NAME, {"class_name": "SiteBuilder", "store_backend": store, "site_index_builder": index})
    context.build_data_docs(site_names=[NAME])
    for page in sorted(docs.rglob("*.html")):
        to_root = "../" * (len(page.relative_to(docs).parts) - 1)
        page.write_text(_without_run(page.read_text(encoding="utf-8"), to_root), encoding="utf-8")


def _without_run(page: str, to_root: str) -> str:
    """A data docs page without the random ids, the clock and the logo that is fetched from a server."""
    page = re.sub(r"(collapse-body-)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", r"\1fixed", page)
    page = re.sub(r'https://[^"\s]*/logo-long\.png\?d=[0-9TZ.]+', f"{to_root}static/images/logo-long.png", page)
    page = re.sub(r"\b20\d{6}T\d{6}\.\d{6}Z", FIXED_TIME.strftime("%Y%m%dT%H%M%S.%fZ"), page)
    # FIXED_TIME itself is shown in this machine's time zone.
    return re.sub(r"\b(1999-12-31|2000-01-01)[T ]\d\d:\d\d:\d\d(Z| [-+\w]+)", "2000-01-01 00:00:00 UTC", page)
