"""Pictures of known classes and the words for them: scenes of one digit, and folders in ImageNet's layout."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from PIL import Image

from haplovl.data.scenes import CAPTIONS, CELLS, COLOURS, KEYS, Item, Scene, SceneMaker
from haplovl.errors import UserError
from haplovl.pictures import ImageError, open_image
from haplovl.settings import Params

DIGITS = range(10)
NAMES = ("classes.txt", "LOC_synset_mapping.txt")
"""Files that name the classes, the second as ImageNet's own download calls it. A line is `FOLDER NAME, OTHER NAME…`."""
SUFFIXES = (".jpeg", ".jpg", ".png")
PROMPT = "a photo of a {}."
MORE_NAMES = {"n02012849": "crane bird", "n03126707": "construction crane"}
"""Names of the two classes of ImageNet that its own list calls alike and nothing else; those are CLIP's."""


@dataclass(frozen=True)
class Question:
    """What to tell apart in a set of pictures: prompts of every class, and the right class of every picture."""

    prompts: list[list[str]]
    right: list[int]


@dataclass(frozen=True)
class PictureSet:
    """Pictures, opened when they are due, and what is asked of them, by name."""

    pictures: list[Callable[[], Image.Image]]
    questions: dict[str, Question]


def scenes(params: Params) -> PictureSet | None:
    """Scenes of one digit from the scans that no training record shows; None without a source of scenes.

    Every combination of digit, colour and place is shown equally often, as far as their number goes. A class's prompts
    are all captions that name it: every order, digit, colour and place.
    """
    source = next((source for source in params.collect.sources if source.format == "scenes"), None)
    if source is None:
        return None
    items = [Item(*attributes) for attributes in product(DIGITS, COLOURS, range(len(CELLS)))]
    random.Random("probe").shuffle(items)  # a few pictures, too, show all classes about equally often
    shown = [Scene((items[number % len(items)],)) for number in range(params.probe.zero_shot_pictures)]
    maker = SceneMaker("test", 0, source.image_size)  # the same pictures for every seed of a recipe
    pictures = [maker.draw(scene) for scene in shown]
    questions = {}
    for key in KEYS:
        values = sorted({item.words[key] for item in items})
        prompts = {
            value: [Scene((item,)).caption(order) for item in items if item.words[key] == value for order in CAPTIONS]
            for value in values
        }
        right = [values.index(scene.items[0].words[key]) for scene in shown]
        questions[key] = Question(list(prompts.values()), right)
    return PictureSet([lambda picture=picture: picture for picture in pictures], questions)


def imagenet(folder: Path, count: int) -> PictureSet:
    """At most `count` pictures of a folder with `val/CLASS/*.JPEG` (or `CLASS/*.JPEG`), class by class in turns.

    Raises:
        UserError: there is no such folder, it holds no classes with pictures, or a class has no name of its own.
    """
    if not folder.is_dir():
        raise UserError(f"probe.imagenet: there is no folder {folder}")
    root = folder / "val" if (folder / "val").is_dir() else folder
    found = {place.name: _pictures(place) for place in sorted(root.iterdir()) if place.is_dir()}
    found = {name: files for name, files in found.items() if files}
    if len(found) < 2:
        raise UserError(
            f"probe.imagenet: {root} holds {len(found)} class folders with pictures, and at least 2 are needed; "
            "ImageNet's layout is val/n01440764/NAME.JPEG"
        )
    names = _names(folder)
    if unnamed := [name for name in found if name not in names]:
        raise UserError(f"probe.imagenet: no line of the file with the classes' names is about '{unnamed[0]}'")
    order = [(turn, number) for number, files in enumerate(found.values()) for turn in range(len(files))]
    chosen = [(number, list(found.values())[number][turn]) for turn, number in sorted(order)[:count]]
    called = _told_apart({name: names[name] for name in found})
    prompts = [[PROMPT.format(called[name])] for name in found]
    opened = [lambda path=path: _open(path) for _, path in chosen]
    return PictureSet(opened, {"class": Question(prompts, [number for number, _ in chosen])})


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _open(path: Path) -> Image.Image:
    try:
        return open_image(path)
    except ImageError as error:
        raise UserError(f"probe.imagenet: the picture {path} cannot be used: {error}") from None


def _names(folder: Path) -> dict[str, list[str]]:
    """All names of every class, in the order of the file."""
    path = next((folder / name for name in NAMES if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"probe.imagenet: {folder} holds neither {' nor '.join(NAMES)}, which name its classes")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"probe.imagenet: {path} is not UTF-8 text") from None
    names: dict[str, list[str]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        parts = line.split(maxsplit=1)
        if len(parts) == 2:
            own = [name.strip() for name in parts[1].split(",")]
            if not all(own) or parts[0] in names:
                wrong = f"names '{parts[0]}' a second time" if parts[0] in names else "holds an empty name"
                raise UserError(f"probe.imagenet: line {number} of {path} {wrong}")
            names[parts[0]] = own + ([MORE_NAMES[parts[0]]] if parts[0] in MORE_NAMES else [])
    return names


def _told_apart(names: dict[str, list[str]]) -> dict[str, str]:
    """The first name of every class; where several share it, the next one that is nobody else's.

    Upper and lower case make no difference, as the text tower does not see it.
    """
    firsts = Counter(own[0].casefold() for own in names.values())
    every = Counter(name for own in names.values() for name in {name.casefold() for name in own})
    called = {}
    for id_, own in names.items():
        others = [name for name in own[1:] if every[name.casefold()] == 1]
        called[id_] = others[0] if firsts[own[0].casefold()] > 1 and others else own[0]
    ids: dict[str, str] = {}
    for id_, name in called.items():
        if (same := ids.setdefault(name.casefold(), id_)) != id_:
            raise UserError(
                f"probe.imagenet: the classes {same} and {id_} are both called '{name}' and would have one prompt; "
                "give one of them another name in classes.txt"
            )
    return called
