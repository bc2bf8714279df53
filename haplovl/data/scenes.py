"""The embedded data set: small scenes of real handwritten digits (scikit-learn's 1,797 scans).

A scene is a square canvas of 2x2 cells with one to four digits, all different in value and in colour. A record asks
about one scene (several questions in random order, then a caption), captions one, compares two, or is text only (a
described scene and a question about it). Training, validation and test scenes use disjoint digit scans. Scenes come
in runs of four siblings that differ in nothing but their digits: minimal pairs, so that colour and place alone never
tell two captions apart.

Each digit has three attributes, each of which tells it apart: its value, its colour and its place. A question names one
(the key) and asks for another. Captions are sorted by one and name it first, so that every word after it has to be
looked up in the picture by that key.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from haplovl.data_settings import ScenesSource
from haplovl.records import IMAGE_PLACEHOLDER, Record, Turn

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
COUNT_WEIGHTS = {"train": (1, 3, 3, 3), "validation": (1, 1, 1, 1), "test": (1, 1, 1, 1)}
"""How often a scene has one, two, three or four digits. Held-out scenes are uniform; training sees
few with one digit outside its captions, as they need no look-up."""
SIBLINGS = 4
"""Consecutive one-picture records that share cells and colours."""
QUESTION_KINDS = ("digit", "colour", "position", "count", "presence", "comparison")
SCAN_SHARES = {"train": 0.72, "validation": 0.08, "test": 0.20}
KEYS = ("digit", "colour", "place")
QUESTIONS = {
    "digit": (("colour", "What colour is the {digit}?"), ("position", "Where is the {digit}?")),
    "colour": (("digit", "Which digit is {colour}?"), ("position", "Where is the {colour} digit?")),
    "place": (
        ("digit", "Which digit is at the {place}?"),
        ("colour", "What colour is the digit at the {place}?"),
    ),
}
"""For every key the two other attributes, with the question that asks for them."""
CAPTIONS = {
    "digit": "{digit} {colour} {place}",
    "colour": "{colour} {digit} {place}",
    "place": "{place} {digit} {colour}",
}
ORDER = {"digit": lambda item: item.digit, "colour": lambda item: item.colour, "place": lambda item: item.cell}


@dataclass(frozen=True)
class Item:
    """One digit of a scene: its value, its colour's name and the index of its cell."""

    digit: int
    colour: str
    cell: int

    @property
    def words(self) -> dict[str, str]:
        """The attributes as they are written in questions, answers and captions."""
        return {"digit": str(self.digit), "colour": self.colour, "place": CELLS[self.cell]}


@dataclass(frozen=True)
class Scene:
    """The items of one picture in reading order."""

    items: tuple[Item, ...]

    def caption(self, key: str) -> str:
        """The scene in words, complete: digit, colour and place of every item, sorted by one of them."""
        return ", ".join(CAPTIONS[key].format(**item.words) for item in sorted(self.items, key=ORDER[key])) + "."

    @property
    def count(self) -> str:
        """Number of digits as a word."""
        return NUMBERS[len(self.items)]


class SceneMaker:
    """Draws scenes, pictures and questions for one split from its own scans and its own random stream."""

    def __init__(self, split: str, seed: int, image_size: int) -> None:
        self.split, self.image_size = split, image_size
        self.random = Random(f"scenes-{seed}-{split}")
        self._turn = {"presence": 0, "comparison": 0}
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

    def caption_turn(self, scene: Scene) -> Turn:
        """The request for a caption by a random key, and the caption."""
        key = self.random.choice(KEYS)
        return Turn(f"Describe the picture by {key}.", scene.caption(key), "caption")

    def questions(self, scene: Scene, limit: int) -> list[Turn]:
        """At most `limit` questions about one scene that share a key, in random order.

        No digit, colour or place that is an answer is named by another question. Of the two presence questions one is
        answered yes and one no.
        """
        key = self.random.choice(KEYS)
        if key == "place":
            turns = [Turn("How many digits are there?", scene.count, "count")]
        else:
            turns = [self._presence(scene, key) for _ in range(2)][:limit]
        asked = [(item, kind, text) for item in scene.items for kind, text in QUESTIONS[key]]
        self.random.shuffle(asked)
        for item, kind, text in asked[: limit - len(turns)]:
            answer = item.words["place" if kind == "position" else kind]
            turns.append(Turn(text.format(**item.words), answer, kind))
        self.random.shuffle(turns)
        return turns

    def _presence(self, scene: Scene, key: str) -> Turn:
        """Whether a digit or a colour is shown; yes and no take turns."""
        present = self._alternate("presence") == 0
        shown = [item.words[key] for item in scene.items]
        every = COLOURS if key == "colour" else map(str, range(10))
        what = self.random.choice(shown if present else [name for name in every if name not in shown])
        question = f"Is there a {what}{' digit' if key == 'colour' else ''}?"
        return Turn(question, "yes" if present else "no", "presence")

    def picture_turns(self, scene: Scene, questions: int) -> list[Turn]:
        """Up to `questions` questions, then the caption: it would give the answers away."""
        return [*self.questions(scene, questions), self.caption_turn(scene)]

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
        turn = self.random.choice(self.questions(scene, 3))
        caption = scene.caption(self.random.choice(KEYS))
        return Turn(f"A picture shows {caption} {turn.question}", turn.answer, "reading")

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
            id_ = f"{split}-{number:06d}"
            if number < captions:
                # Half of the captioned scenes show one digit: what a digit looks like, before any binding.
                yield _caption_record(maker, maker.next_scene(1 if number < captions // 2 else None), id_, images)
            else:
                yield _record(maker, source, id_, images)


def _caption_record(maker: SceneMaker, scene: Scene, id_: str, images: Path) -> Record:
    path = f"{maker.split}/{id_}.png"
    maker.draw(scene).save(images / path)
    turn = maker.caption_turn(scene)
    return Record(id_, (path,), (replace(turn, question=f"{IMAGE_PLACEHOLDER}\n{turn.question}"),), maker.split)


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
    turns[0] = replace(turns[0], question=f"{opening}\n{turns[0].question}")
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
