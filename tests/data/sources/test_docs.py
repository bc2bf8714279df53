"""The examples of docs/data.md and the README are settings that work."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from haplovl.data.sources import ADAPTERS
from haplovl.data_settings import CollectSettings, Source

REPO = Path(__file__).resolve().parents[3]


def examples(name: str) -> list:
    return [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", (REPO / name).read_text(), re.DOTALL)]


def test_every_format_has_an_example_that_parses() -> None:
    sources = [source for example in examples("docs/data.md") if isinstance(example, list) for source in example]
    parsed = TypeAdapter(list[Source]).validate_python(sources)
    assert {source.format for source in parsed} == set(ADAPTERS) - {"scenes"}


@pytest.mark.parametrize("name", ["README.md", "data/README.md"])
def test_the_first_example_parses(name) -> None:
    [settings] = [
        example["collect"] for example in examples(name) if isinstance(example, dict) and "collect" in example
    ]
    assert CollectSettings.model_validate(settings).sources
