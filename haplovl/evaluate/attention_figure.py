"""A look as one picture, a row per token and a column per layer: the same look gives the same bytes."""

import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from haplovl.evaluate.looking import Look, Shown
from haplovl.evaluate.plots import FAINT, INK, RULE, STYLE

DPI = 144
MARGIN, GAP, CAPTION, LABEL, HEADER = 36, 18, 44, 190, 96
"""Pixels: around the sheet, between maps, below a map, left of the maps, and above them for the names of the layers."""
LEAST_WIDTH = 1120
ROW_WIDTH = 1500
"""Pixels that the maps of a row share, as long as each has its least side."""
LEAST_SIDE, MOST_SIDE = 128, 240
LESS, MORE, COVER = "#2563b0", "#ff5a1c", 0.8
"""Colours of a patch that gets less and more attention than an even share, and how much they cover the picture."""
BLACK = 0.2
"""Gray of black pixels: on black itself no tint could be told from another."""
LAST_PERCENTILE = 99
"""Of all attention, where the colours end: a few patches often draw far more than all others."""
LABEL_LETTERS = 12
PARTS = {"pre": "pre-decoder", "post": "language model"}


def attention_figure(look: Look, most_layers: int | None = None, explained: bool = True) -> bytes:
    """The look as a PNG file's content.

    `most_layers` draws only so many layers of each decoder, evenly spread; `explained` off leaves out how to read it.
    """
    with matplotlib.rc_context({**STYLE, "text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # an empty box stands for a character without a shape
        canvas = FigureCanvasAgg(_Sheet(look, _spread(look.layers, most_layers), explained).draw())
        canvas.draw()
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def overlay(shown: Shown, values: np.ndarray, colours: ScalarMappable, height: int, width: int) -> np.ndarray:
    """A picture in gray below the colours of its patches' values: [rows, columns] → [height, width, 3] uint8.

    Patches have sharp edges, as the model knows nothing in between. What no patch shows keeps its gray.
    """
    gray = np.asarray(_resized(shown.image.convert("L"), height, width), dtype=np.float32)[..., None] / 255
    gray = BLACK + (1 - BLACK) * gray
    spread = shown.spread(values, height, width)
    colour = colours.to_rgba(np.nan_to_num(spread))
    cover = np.where(np.isnan(spread), 0.0, colour[..., 3])[..., None]
    return (255 * (gray * (1 - cover) + colour[..., :3] * cover)).round().astype(np.uint8)


def attention_colours(most: float) -> ScalarMappable:
    """Colours of attention in multiples of an even share, up to `most`: an even share leaves the picture as it is."""
    from_less, to_more = np.linspace(1, 0, 128), np.linspace(0, 1, 128)
    colours = np.concatenate([np.tile(_unit(LESS), (128, 1)), np.tile(_unit(MORE), (128, 1))])
    cover = COVER * np.concatenate([from_less, to_more])
    return ScalarMappable(TwoSlopeNorm(1, 0, most), _see_through(colours, cover))


def drawn_size(image: Image.Image, side: int) -> tuple[int, int]:
    """Height and width at which a picture is drawn: its long side is `side`, or the largest whole multiple below it."""
    longest = max(image.size)
    scale = side // longest if longest <= side else side / longest
    return max(1, round(image.height * scale)), max(1, round(image.width * scale))


@dataclass
class _Column:
    """A column of maps: its name, the decoder that it belongs to, and where to find its maps."""

    part: str
    name: str
    layer: int | None


class _Sheet:
    """Places everything in pixels from the top left, then draws it at once."""

    def __init__(self, look: Look, layers: Sequence[int], explained: bool) -> None:
        self.look, self.explained = look, explained
        self.columns = [_Column(look.layers[i][0], f"layer {look.layers[i][1]}", i) for i in layers]
        if look.likeness is not None:
            after = _Column("pre", "output", None)
            place = sum(column.part == "pre" for column in self.columns)
            self.columns.insert(place, after)
        side = ROW_WIDTH // (len(self.columns) * len(look.pictures))
        side = min(MOST_SIDE, max(LEAST_SIDE, side))
        self.sizes = [drawn_size(shown.image, side) for shown in look.pictures]
        self.cell = max(h for h, _ in self.sizes), sum(w for _, w in self.sizes) + 6 * (len(self.sizes) - 1)
        self.step = max(self.cell[1], LEAST_SIDE) + GAP
        self.relative = look.relative()
        self.attention, self.likeness = self._colours()
        self.texts: list[tuple[float, float, str, dict]] = []

    def draw(self) -> Figure:
        look, (cell_height, _) = self.look, self.cell
        width = max(2 * MARGIN + LABEL + self.step * len(self.columns) - GAP, LEAST_WIDTH)
        title = self._title(width)
        top = MARGIN + title + HEADER
        row_step = cell_height + CAPTION + GAP
        split = GAP if 0 < look.of_question < len(look.tokens) else 0
        bottom = top + row_step * len(look.tokens) + split
        notes = self._notes(width)
        height = bottom + 84 + (26 * len(notes) + 20 if notes else 0) + MARGIN
        canvas = np.full((height, width, 3), 255, dtype=np.uint8)
        self._pictures(canvas)
        self._names(canvas, top)
        for row in range(len(look.tokens)):
            self._row(canvas, row, top + row * row_step + split * (row >= look.of_question))
        if split:
            line = top + look.of_question * row_step - GAP // 2
            canvas[line : line + 2, MARGIN : width - MARGIN] = _rgb(RULE)
        for number, note in enumerate(notes):
            self._say(MARGIN, bottom + 116 + 26 * number, note, size=8.5, color=FAINT)
        return self._figure(canvas, bottom + 40)

    def _title(self, width: int) -> int:
        """Question and answer beside the pictures; returns the height of both."""
        pictures, (cell_height, cell_width) = self.look.pictures, self.cell
        left = MARGIN + cell_width + 28
        letters = max(24, (width - left - MARGIN) // 16)
        y = MARGIN + 14
        for text, style in ((self.look.question, {"size": 13}), (self.look.answer, {"size": 13, "weight": "bold"})):
            for line in textwrap.wrap(text, letters, max_lines=4, placeholder=" …") or [""]:
                self._say(left, y, line, **style)
                y += 34
            y += 6
        many = f"{len(pictures)} pictures" if len(pictures) > 1 else "the picture"
        sizes = ", ".join(f"{shown.image.width}x{shown.image.height}" for shown in pictures)
        self._say(left, y, f"{many}, {sizes} pixels, {self._patches()}", size=8.5, color=FAINT)
        return max(cell_height, y + 20 - MARGIN)

    def _patches(self) -> str:
        shapes = [part.shape[2:] for part in self.look.attention]
        return "patches: " + ", ".join(f"{columns}x{rows}" for rows, columns in shapes)

    def _pictures(self, canvas: np.ndarray) -> None:
        left = MARGIN
        for shown, (height, width) in zip(self.look.pictures, self.sizes, strict=True):
            image = _resized(shown.image.convert("RGB"), height, width)
            canvas[MARGIN : MARGIN + height, left : left + width] = np.asarray(image)
            left += width + 6

    def _names(self, canvas: np.ndarray, top: int) -> None:
        for number, column in enumerate(self.columns):
            middle = self._left(number) + self.cell[1] / 2
            self._say(middle, top - 18, column.name, size=9, color=FAINT, ha="center")
        for part, name in PARTS.items():
            own = [number for number, column in enumerate(self.columns) if column.part == part]
            if not own:
                continue
            first, last = self._left(own[0]), self._left(own[-1]) + self.cell[1]
            self._say(first, top - 56, name, size=10, color=INK)
            canvas[top - 40 : top - 38, first:last] = _rgb(RULE)

    def _row(self, canvas: np.ndarray, row: int, top: int) -> None:
        look, (cell_height, cell_width) = self.look, self.cell
        asked, token = row < look.of_question, look.tokens[row]
        label = token if len(token) <= LABEL_LETTERS else token[: LABEL_LETTERS - 1] + "…"
        style = {"size": 11, "color": FAINT} if asked else {"size": 12, "weight": "bold"}
        self._say(MARGIN, top + cell_height / 2 - 12, label or "(space)", **style)
        self._say(MARGIN, top + cell_height / 2 + 18, f"even: {_percent(look.even[row])}", size=8, color=FAINT)
        for number, column in enumerate(self.columns):
            left, below = self._left(number), ""
            if column.layer is None:
                maps, colours = [part[row] for part in look.likeness or []], self.likeness
                below = f"{min(m.min() for m in maps):.2f} … {max(m.max() for m in maps):.2f}"
            else:
                maps, colours = [part[row, column.layer] for part in self.relative], self.attention
                below = _percent(look.share[row, column.layer])
                self._gauge(canvas, left, top + cell_height + 8, look.share[row, column.layer], look.even[row])
            self._say(left + cell_width / 2, top + cell_height + 28, below, size=8.5, color=INK, ha="center")
            for shown, values, (height, width) in zip(look.pictures, maps, self.sizes, strict=True):
                canvas[top : top + height, left : left + width] = overlay(shown, values, colours, height, width)
                left += width + 6

    def _gauge(self, canvas: np.ndarray, left: int, top: int, share: float, even: float) -> None:
        """A bar as long as the share, and a mark at an even share."""
        width = self.cell[1]
        canvas[top : top + 6, left : left + width] = _rgb(RULE)
        canvas[top : top + 6, left : left + round(width * share)] = _rgb(FAINT)
        mark = left + round((width - 3) * even)
        canvas[top - 2 : top + 8, mark : mark + 3] = _rgb(INK)

    def _left(self, number: int) -> int:
        return MARGIN + LABEL + number * self.step

    def _colours(self) -> tuple[ScalarMappable, ScalarMappable]:
        """One scale for all attention of the sheet, and one for all likeness."""
        layers = [column.layer for column in self.columns if column.layer is not None]
        values = np.concatenate([part[:, layers].ravel() for part in self.relative])
        most = max(2.0, float(np.percentile(values, LAST_PERCENTILE)))
        cosines = np.concatenate([part.ravel() for part in self.look.likeness or [np.array([0.0, 1.0])]])
        low, high = float(cosines.min()), float(cosines.max())
        viridis = np.array(matplotlib.colormaps["viridis"].colors)
        return (
            attention_colours(most),
            ScalarMappable(Normalize(low, max(high, low + 0.01)), _see_through(viridis, np.full(256, COVER - 0.2))),
        )

    def _notes(self, width: int) -> list[str]:
        picture = "picture" if len(self.look.pictures) == 1 else "pictures"
        explanation = [
            f"Attention: mean over heads, where a token of the answer is said (the position before it) or one of the "
            f"question is read. Bar below a map: attention that all tokens of the {picture} get together; its mark and "
            f"“even”: what they would get if all visible tokens got the same."
        ]
        if self.look.likeness is not None:
            explanation.append(
                "Output of the pre-decoder: cosine of the token's own with each patch's, from least to most alike."
            )
        notes = explanation if self.explained else []
        if self.look.left_out:
            notes.append(f"{self.look.left_out} more tokens are not shown.")
        return [line for note in notes for line in textwrap.wrap(note, min(150, (width - 2 * MARGIN) // 10))]

    def _say(self, x: float, y: float, text: str, **style) -> None:
        self.texts.append((x, y, text, {"va": "center", "ha": "left", "color": INK, **style}))

    def _figure(self, canvas: np.ndarray, bars: int) -> Figure:
        height, width = canvas.shape[:2]
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        figure.figimage(canvas, origin="upper", zorder=-1)
        for x, y, text, style in self.texts:
            figure.text(x / width, 1 - y / height, text, **style)
        self._bar(figure, self.attention, bars, MARGIN, "attention to a patch, in multiples of an even share", "max")
        figure.axes[0].set_xticks(_ticks(self.attention.norm.vmax))
        if self.look.likeness is not None:
            self._bar(figure, self.likeness, bars, MARGIN + 500, "likeness of pre-decoder outputs (cosine)", "neither")
        return figure

    def _bar(self, figure: Figure, colours: ScalarMappable, top: int, left: int, name: str, extend: str) -> None:
        width, height = (1 / n for n in figure.get_size_inches() * DPI)
        axes = figure.add_axes((left * width, 1 - (top + 16) * height, 420 * width, 16 * height))
        axes.set_facecolor("#808080")  # what the colours cover in a picture, on average
        bar = figure.colorbar(colours, cax=axes, orientation="horizontal", extend=extend)
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(5, steps=[1, 2, 5, 10])
        bar.update_ticks()
        bar.ax.tick_params(labelsize=8, length=3)
        bar.ax.set_title(name, fontsize=8.5, color=FAINT, loc="left", pad=5)


def _spread(layers: Sequence[tuple[str, int]], most: int | None) -> list[int]:
    """Indices of at most `most` layers of each decoder, evenly spread, with the first and the last."""
    chosen = []
    for part in PARTS:
        own = [index for index, (name, _) in enumerate(layers) if name == part]
        count = len(own) if most is None else min(most, len(own))
        chosen += [own[round(place)] for place in np.linspace(0, len(own) - 1, count)]
    return chosen


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    larger = width > image.width
    return image.resize((width, height), Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


def _see_through(colours: np.ndarray, cover: np.ndarray) -> ListedColormap:
    return ListedColormap(np.column_stack([colours, cover]))


def _ticks(most: float) -> list[float]:
    """0, an even share, and whole multiples of it: about five."""
    step = max(1, round(most / 4))
    return [0, 1, *(n for n in range(step, int(most) + 1, step) if n > 1)]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def _unit(colour: str) -> tuple[float, ...]:
    return tuple(value / 255 for value in _rgb(colour))
