"""The Great Expectations suite that judges the table of facts.

Great Expectations is imported inside the functions: it takes seconds, and only `validate` needs it.
"""

import html
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haplovl.data.data_docs import FIXED_TIME, Outcome, write_docs

if TYPE_CHECKING:
    import pandas as pd

LISTED = 1000
"""Failures in one part up to which the data docs name every bad record; of more, they show examples of values."""

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
        "image_size",
        "image_size_error",
        "No image is smaller or more drawn out than the limits.",
        "{image_size_error}",
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
        "degenerate",
        "degenerate_answers",
        "No answer holds punctuation alone, or one word or character over and over.",
        "{degenerate_answers}",
        False,
    ),
    Check(
        "encoding",
        "encoding_error",
        "No text holds control or replacement characters, or UTF-8 that was read as another encoding.",
        "the text holds {encoding_error}",
        False,
    ),
    Check(
        "duplicate_id",
        "earlier_same_id",
        "No earlier record of the source has the id; or, with repeated_ids: number, the id and the content.",
        "{earlier_same_id} earlier records have the same {repeated}",
    ),
    Check(
        "split",
        "split_conflict",
        "No image of the record occurs, byte for byte, in a split that is held out from the record's own.",
        "{split_conflict}",
        False,
    ),
    Check(
        "near_duplicate",
        "near_duplicate",
        "No image of the record looks like one in a split that is held out from the record's own.",
        "{near_duplicate}",
        False,
    ),
    Check(
        "contamination",
        "contamination",
        "No image of the record, and without images no longer question, is in an evaluation set on this machine.",
        "{contamination}",
        False,
    ),
)


class Judge:
    """Judges tables of facts by the suite, one part of a large data set after the other, and writes data docs of all.

    A table has the columns of PLACE and one per check.
    """

    def __init__(self) -> None:
        os.environ["GX_ANALYTICS_ENABLED"] = "false"
        import great_expectations as gx

        self._context = gx.get_context(mode="ephemeral")
        self._context.variables.progress_bars = {"globally": False}
        self._outcomes: list[Outcome] = []
        self._records = self._definition("records", [_expectation(check) for check in CHECKS])

    def failed(self, table: "pd.DataFrame") -> dict[str, list[int]]:
        """The `row` values that fail, by check name (every check has an entry).

        Raises:
            RuntimeError: Great Expectations could not judge a column.
        """
        table = _escaped(table)
        wanted = {"result_format": "COMPLETE", "unexpected_index_column_names": ["row"]}
        # The query would spell out every bad row's number.
        wanted["return_unexpected_index_query"] = False
        batch = self._records.data.get_batch(batch_parameters={"dataframe": table})
        validation = batch.validate(self._records.suite, result_format=wanted)
        failed = {outcome.expectation_config.meta["check"]: _rows(outcome) for outcome in validation.results}
        # Once more for the docs, which keep what they are given: not a million lists.
        few = sum(map(len, failed.values())) <= LISTED
        wanted |= {"result_format": "COMPLETE" if few else "SUMMARY", "unexpected_index_column_names": list(PLACE)}
        self._run(self._records, table, wanted, f"rows {table['row'].iloc[0]} to {table['row'].iloc[-1]}")
        return {check.name: failed[check.name] for check in CHECKS}

    def too_far(self, distances: dict[str, float], limits: dict[str, float | None]) -> list[str]:
        """The names of the distances from the accepted version (drift) that are above their limit; None is no limit."""
        import great_expectations.expectations as gxe
        import pandas as pd

        notes = "Share that would have to change to be like the last accepted version of the data."
        expectations = [
            gxe.ExpectColumnMaxToBeBetween(column=name, max_value=limit, meta={"check": name}, notes=notes)
            for name, limit in limits.items()
            if limit is not None
        ]
        if not expectations:
            return []
        drift = self._definition("drift", expectations)
        validation = self._run(drift, pd.DataFrame([distances]), {"result_format": "SUMMARY"}, "drift")
        return [outcome.expectation_config.meta["check"] for outcome in validation.results if not outcome.success]

    def write_docs(self, docs: Path) -> None:
        """Writes data docs of all that was judged, whose bytes depend on it alone, into the existing folder `docs`."""
        write_docs(self._context, self._outcomes, docs)

    def _definition(self, name: str, expectations: list[Any]) -> Any:
        import great_expectations as gx

        asset = self._context.data_sources.add_pandas(name).add_dataframe_asset(name)
        suite = self._context.suites.add(gx.ExpectationSuite(name, expectations=expectations))
        data = asset.add_batch_definition_whole_dataframe("all")
        return self._context.validation_definitions.add(gx.ValidationDefinition(name=name, data=data, suite=suite))

    def _run(self, definition: Any, table: "pd.DataFrame", wanted: dict[str, Any], name: str) -> Any:
        """Judges a table and keeps the outcome for the docs under a name."""
        from great_expectations.core.run_identifier import RunIdentifier

        run_id = RunIdentifier(run_name=name, run_time=FIXED_TIME)
        found = definition.run(batch_parameters={"dataframe": table}, result_format=wanted, run_id=run_id)
        failed = sorted(one.expectation_config.meta["check"] for one in found.results if not one.success)
        self._outcomes.append(Outcome(definition.suite.name, name, tuple(failed)))
        return found


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
