"""`haplovl inspect` shows records as the model sees them, and why others were refused."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from haplovl.cli import app
from haplovl.data.validated import ImageFile, ValidatedRecord, write_validated
from haplovl.errors import UserError
from haplovl.files import QUARANTINE, RAW, TEACHERS, VALIDATED
from haplovl.inspection import inspect
from haplovl.model import HaploImageProcessor, HaploProcessor
from haplovl.records import Record, Turn
from haplovl.settings import load_params

GREEN = (2, 10)
"""Numbers of the two greens among a terminal's colours."""


@pytest.fixture
def project(tmp_path, monkeypatch, tokenizer, request):
    """A project with one validated record of a wide picture, one of text, and a refused one."""
    params = load_params(request.config.rootpath / "params.yaml")
    monkeypatch.chdir(tmp_path)
    (RAW / "own/media").mkdir(parents=True)
    picture = Image.new("RGB", (64, 32), "red")
    picture.paste("blue", (32, 0, 64, 32))
    picture.save(RAW / "own/media/wide.png")
    VALIDATED.mkdir(parents=True)
    turns = (Turn("<image>\nWhere is the 3?", "top left"), Turn("Is there a 7?", "yes"))
    wide = Record("wide", ("file:wide.png",), turns, "train")
    text = Record("text", (), (Turn("Who\x1b[31m?", "me"),), "train")
    write_validated(
        VALIDATED,
        [
            ValidatedRecord(wide, (ImageFile("file:wide.png", "0", 64, 32),), "own"),
            ValidatedRecord(text, (), "own"),
            ValidatedRecord(text, (), "other"),
        ],
    )
    QUARANTINE.mkdir(parents=True)
    bad = {"source": "own", "file": "a.jsonl", "position": 7, "id": "bad", "reasons": ["blank: 1 blank messages"]}
    bad["data"] = {"id": "bad", "conversations": [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": " "}]}
    (QUARANTINE / "records.jsonl").write_text(json.dumps(bad) + "\n")
    HaploProcessor(HaploImageProcessor(32, 8, max_tiles=4), tokenizer).save_pretrained(TEACHERS / "processor")
    return params


def test_tokens_that_carry_loss_are_the_answers(project, monkeypatch):
    page = Console(file=io.StringIO(), record=True, width=200, force_terminal=True, color_system="truecolor")
    monkeypatch.setattr("haplovl.inspection.Console", lambda **_: page)
    assert inspect(project, "wide")
    text = Text.from_ansi(page.export_text(styles=True, clear=False))
    green = "".join(text.plain[s.start : s.end] for s in text.spans if s.style.color and s.style.color.number in GREEN)
    assert green.replace(" ", "") == "topleft<|end|>yes<|end|>"
    shown = page.export_text()
    assert "own/wide: train, instruction, 2 turns, 1 pictures" in shown
    assert "64x32 pixels, 1 x 2 tiles" in shown
    assert "[picture 1: " in shown and "▀" in shown


def test_the_png_shows_the_tiles(project, tmp_path):
    assert inspect(project, "wide", output=tmp_path / "tiles.png")
    tiles = np.asarray(Image.open(tmp_path / "tiles.png"))
    assert tiles.shape == (32, 66, 3)
    assert tiles[5, 5].tolist() == [255, 0, 0] and tiles[5, 60].tolist() == [0, 0, 255]
    assert tiles[5, 32].tolist() == [255, 255, 255]  # the gap


def test_a_refused_record_shows_its_reasons(project, request):
    (load_from := request.config.rootpath / "params.yaml")
    (VALIDATED.parent.parent / "params.yaml").write_text(load_from.read_text())
    done = CliRunner().invoke(app, ["inspect", "bad"])
    assert done.exit_code == 1
    assert "refused (own, a.jsonl, entry 7)" in done.output
    assert "blank: 1 blank messages" in done.output
    assert "Hm?" in done.output


def test_ids_of_several_sources_or_none_are_told(project, capsys):
    with pytest.raises(UserError, match="in the sources own, other; name one with --source"):
        inspect(project, "text")
    assert inspect(project, "text", source="other")
    assert "\x1b[31m" not in capsys.readouterr().out
    with pytest.raises(UserError, match="no record with the id 'nobody'"):
        inspect(project, "nobody")


def test_without_a_tokenizer_the_text_is_shown(project, capsys):
    (TEACHERS / "processor").rename(TEACHERS / "away")
    assert inspect(project, "wide")
    out = capsys.readouterr().out
    assert "haplovl teachers" in out and "top left" in out
