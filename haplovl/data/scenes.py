"""The embedded data set: small scenes of real handwritten digits (scikit-learn's 1,797 scans).

A scene is a square canvas of 2x2 cells with one to four digits, all different in value and in colour. A record asks
about one scene (a caption turn and several questions, in random order), compares two scenes, or is text only (a
described scene and a question about it). Training, validation and test scenes use disjoint digit scans. Scenes come
in runs of four siblings that differ in nothing but their digits: minimal pairs, so that colour and place alone never
tell two captions apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from haplovl.records import IMAGE_PLACEHOLDER, Record, Turn
from haplovl.settings import ScenesSource

COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 255),
    "yellow": (240, 220, 40),
    "purple": (190, 60, 220),
    "white": (240, 240, 240),
}
CELLS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")
COUNT_WEIGHTS = {"train": (2, 1, 1, 1), "validation": (1, 1, 1, 1), "test": (1, 1, 1, 1)}
"""How often a scene has one, two, three or four digits; held-out scenes are uniform."""
SIBLINGS = 4
"""Consecutive one-picture records that share cells and colours."""
QUESTION_KINDS = ("digit", "colour", "position", "count", "presence", "comparison")
SCAN_SHARES = {"train": 0.72, "validation": 0.08, "test": 0.20}
CAPTION_QUESTION = "Describe the picture."


@dataclass(frozen=True)
class Item:
    """One digit of a scene: its value, its colour's name and the index of its cell."""

    digit: int
    colour: str
    cell: int


@dataclass(frozen=True)
class Scene:
    """The items of one picture in reading order."""

    items: tuple[Item, ...]

    @property
    def caption(self) -> str:
        """The scene in words, complete: digit, colour and place of every item."""
        return ", ".join(f"{i.colour} {i.digit} {CELLS[i.cell]}" for i in self.items) + "."

    @property
    def count(self) -> str:
        """Number of digits as a word."""
        return NUMBERS[len(self.items)]


class SceneMaker:
    """Draws scenes, pictures and questions for one split from its own scans and its own random stream."""

    def __init__(self, split: str, seed: int, image_size: int) -> None:
        self.split, self.image_size = split, image_size
        self.random = Random(f"scenes-{seed}-{split}")
        self._turn = {"presence": 0, "comparison": 0, "kind": 0}
        self._siblings: list[Scene] = []

    @cached_property
    def scans(self) -> dict[int, list[np.ndarray]]:
        """This split's scans by digit: 8x8 arrays in 0…1."""
        return _scans_of(self.split)

    def scene(self, count: int | None = None) -> Scene:
        """A scene of `count` digits; by default as many as the split's weights draw."""
        count = count or self.random.choices((1, 2, 3, 4), COUNT_WEIGHTS[self.split])[0]
        cells = sorted(self.random.sample(range(4), count))
        digits, colours = self.random.sample(range(10), count), self.random.sample(list(COLOURS), count)
        return Scene(tuple(Item(d, c, cell) for d, c, cell in zip(digits, colours, cells, strict=True)))

    def next_scene(self, count: int | None = None) -> Scene:
        """The next scene of the running group of siblings; `count` digits where a new group begins."""
        if not self._siblings:
            first = self.scene(count)
            for _ in range(SIBLINGS):
                digits = self.random.sample(range(10), len(first.items))
                items = (Item(d, i.colour, i.cell) for d, i in zip(digits, first.items, strict=True))
                self._siblings.append(Scene(tuple(items)))
        return self._siblings.pop()

    def draw(self, scene: Scene) -> Image.Image:
        """The scene as an RGB picture; scan, size and offset of every digit are random."""
        cell_side = self.image_size // 2
        canvas = np.zeros((self.image_size, self.image_size, 3), dtype=np.float32)
        for item in scene.items:
            side = self.random.randint(cell_side - 2, cell_side)
            scan = self.random.choice(self.scans[item.digit])
            ink = Image.fromarray((scan * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
            top, left = ((item.cell // 2) * cell_side, (item.cell % 2) * cell_side)
            y = top + self.random.randint(0, cell_side - side)
            x = left + self.random.randint(0, cell_side - side)
            alpha = np.asarray(ink, dtype=np.float32)[..., None] / 255
            canvas[y : y + side, x : x + side] += alpha * np.asarray(COLOURS[item.colour], dtype=np.float32)
        return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))

    def question(self, kind: str, scene: Scene) -> Turn:
        """A question of the given kind about one scene; yes and no take turns."""
        item = self.random.choice(scene.items)
        by_first = self.random.random() < 0.5
        if kind == "digit":
            what = f"at the {CELLS[item.cell]}" if by_first else item.colour
            return Turn(f"Which digit is {what}?", str(item.digit), kind)
        if kind == "colour":
            what = f"the {item.digit}" if by_first else f"the digit at the {CELLS[item.cell]}"
            return Turn(f"What colour is {what}?", item.colour, kind)
        if kind == "position":
            what = str(item.digit) if by_first else f"{item.colour} digit"
            return Turn(f"Where is the {what}?", CELLS[item.cell], kind)
        if kind == "count":
            return Turn("How many digits are there?", scene.count, kind)
        if kind == "presence":
            return self._presence(scene, by_first)
        raise ValueError(f"unknown question kind '{kind}'")

    def _presence(self, scene: Scene, by_digit: bool) -> Turn:
        present = self._alternate("presence") == 0
        if by_digit:
            shown = [item.digit for item in scene.items]
            pool = shown if present else [d for d in range(10) if d not in shown]
            what = f"a {self.random.choice(pool)}"
        else:
            shown = [item.colour for item in scene.items]
            pool = shown if present else [c for c in COLOURS if c not in shown]
            what = f"a {self.random.choice(pool)} digit"
        return Turn(f"Is there {what}?", "yes" if present else "no", "presence")

    def picture_turns(self, scene: Scene, questions: int) -> list[Turn]:
        """A caption turn and `questions` questions, none twice.

        Questions name digits and colours, so that later turns can be answered from the text alone. Most records
        therefore open with the caption or with a digit, which only the picture tells; the rest is in random order.
        """
        turns = [Turn(CAPTION_QUESTION, scene.caption, "caption")]
        kinds = QUESTION_KINDS[:5]
        for i in range(questions):
            turn = self.question(kinds[(self._turn["kind"] + i) % len(kinds)], scene)
            if turn.question not in {t.question for t in turns}:
                turns.append(turn)
        self._turn["kind"] += questions
        self.random.shuffle(turns)
        opening = self.random.choice(("caption", "caption", "digit", "digit", "any"))
        return sorted(turns, key=lambda turn: turn.kind != opening)

    def comparison(self) -> tuple[Scene, Scene, list[Turn]]:
        """Two scenes with different numbers of digits; the question which has more, and how many each has."""
        fewer, more = sorted(self.random.sample(range(1, 5), 2))
        first_has_more = self._alternate("comparison") == 0
        counts = (more, fewer) if first_has_more else (fewer, more)
        first, second = (self.scene(count) for count in counts)
        turns = [
            Turn("Which picture has more digits?", "first" if first_has_more else "second", "comparison"),
            Turn("How many digits are in the first picture?", first.count, "count"),
            Turn("How many digits are in the second picture?", second.count, "count"),
        ]
        self.random.shuffle(turns)
        return first, second, turns

    def text_turn(self) -> Turn:
        """A described scene and a question about it, without a picture."""
        scene = self.scene()
        turn = self.question(self.random.choice(QUESTION_KINDS[:5]), scene)
        return Turn(f"A picture shows {scene.caption} {turn.question}", turn.answer, "reading")

    def _alternate(self, name: str) -> int:
        self._turn[name] ^= 1
        return self._turn[name]


def generate(source: ScenesSource, seed: int, images: Path) -> Iterator[Record]:
    """Yields the records of all splits and writes their pictures as PNG files below `images`."""
    sizes = {"train": source.train_records, "validation": source.validation_records, "test": source.test_records}
    for split, size in sizes.items():
        maker = SceneMaker(split, seed, source.image_size)
        (images / split).mkdir(parents=True, exist_ok=True)
        captions = round(source.caption_share * size) if split == "train" else 0
        for number in range(size):
            make = _caption_record if number < captions else _record
            yield make(maker, source, f"{split}-{number:06d}", images)


def _caption_record(maker: SceneMaker, _: ScenesSource, id_: str, images: Path) -> Record:
    """One digit and its caption: what a digit looks like, with no other turn that would give it away."""
    scene, path = maker.next_scene(count=1), f"{maker.split}/{id_}.png"
    maker.draw(scene).save(images / path)
    turn = Turn(f"{IMAGE_PLACEHOLDER}\n{CAPTION_QUESTION}", scene.caption, "caption")
    return Record(id_, (path,), (turn,), maker.split)


def _record(maker: SceneMaker, source: ScenesSource, id_: str, images: Path) -> Record:
    draw = maker.random.random()
    if draw < source.text_only_share:
        turns = [maker.text_turn() for _ in range(2)]
        return Record(id_, (), tuple(turns), maker.split)
    if draw < source.text_only_share + source.two_image_share:
        first, second, turns = maker.comparison()
        scenes = [first, second]
    else:
        scenes = [maker.next_scene()]
        turns = maker.picture_turns(scenes[0], source.questions_per_record)
    paths = []
    for letter, scene in zip("ab", scenes, strict=False):
        path = f"{maker.split}/{id_}{letter if len(scenes) > 1 else ''}.png"
        maker.draw(scene).save(images / path)
        paths.append(path)
    opening = IMAGE_PLACEHOLDER * len(scenes)
    turns[0] = Turn(f"{opening}\n{turns[0].question}", turns[0].answer, turns[0].kind)
    return Record(id_, tuple(paths), tuple(turns), maker.split)


def _scans_of(split: str) -> dict[int, list[np.ndarray]]:
    """The split's share of every digit's scans, shuffled once with a fixed seed, so that splits never share a scan."""
    from sklearn.datasets import load_digits

    data = load_digits()
    splits = list(SCAN_SHARES)
    before = sum(SCAN_SHARES[name] for name in splits[: splits.index(split)])
    scans = {}
    for digit in range(10):
        own = [scan.astype(np.float32) / 16 for scan in data.images[data.target == digit]]
        Random(digit).shuffle(own)
        start, stop = round(before * len(own)), round((before + SCAN_SHARES[split]) * len(own))
        scans[digit] = own[start:stop]
    return scans
