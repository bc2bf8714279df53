"""`haplovl look`: where the tokens of an answer look in the pictures, as a PNG file and a few numbers."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from haplovl.chat import open_picture
from haplovl.errors import UserError
from haplovl.evaluate.answer import load_model
from haplovl.evaluate.attention_figure import PARTS, attention_figure
from haplovl.evaluate.looking import Look, look
from haplovl.terminal import printable


def look_at(
    model_dir: Path,
    question: str,
    images: list[Path],
    answer: str | None,
    output: Path,
    max_new_tokens: int,
    with_question: bool,
) -> None:
    """Asks the model, or takes the answer that is given, and draws where its tokens look.

    Raises:
        UserError: as `haplovl.evaluate.looking.look`, the folder holds no HaploVL model, a picture is missing or cannot
            be read, or the output is no .png file that can be written.
    """
    if output.suffix.lower() != ".png":
        raise UserError(f"{output} is no .png file; the figure is written as PNG")
    pictures = [open_picture(path).content for path in images]  # before the model, which takes longer
    model, processor = load_model(model_dir)
    found = look(model, processor, question, pictures, answer, max_new_tokens, with_question)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(attention_figure(found))
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(printable(found.answer)), Text(""), shares_table(found), sep="\n")
    console.print(Text(printable(f"The figure is {output}")))


def shares_table(look: Look) -> Table:
    """How much of its attention every token gives the pictures, as means over the layers of each decoder."""
    parts = [part for part in PARTS if any(name == part for name, _ in look.layers)]
    table = Table(title="Attention to pictures, mean over layers")
    table.add_column("token")
    for part in parts:
        table.add_column(PARTS[part], justify="right")
    table.add_column("if all tokens got the same", justify="right")
    for row, token in enumerate(look.tokens):
        shares = [
            look.share[row, [i for i, (name, _) in enumerate(look.layers) if name == part]].mean() for part in parts
        ]
        style = "dim" if row < look.of_question else None
        table.add_row(Text(printable(token)), *(f"{100 * s:.0f} %" for s in (*shares, look.even[row])), style=style)
    return table
