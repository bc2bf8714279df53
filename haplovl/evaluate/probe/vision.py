"""How much of the vision teacher is in the pre-decoder: cosine and CKA by layer and by resolution."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from haplovl.evaluate.probe.similarity import Cosine, cka_matrix
from haplovl.evaluate.probe.subject import Subject, patches_of, run_pictures, teacher_patches, teacher_states
from haplovl.model import HaploImageProcessor
from haplovl.model.media import read_grids

SCALES = (0.5, 1.0, 1.5)
"""Sides of the squares that pictures are shown in, as shares of the recipe's image_size."""
CKA_PATCHES = 2048
"""Most patches, of all pictures together, that CKA is computed of."""


@dataclass(frozen=True)
class Resolution:
    """One way to lay pictures out."""

    name: str
    processor: HaploImageProcessor
    is_trained: bool
    """Whether stage 1 was trained with it."""


def resolutions(own: HaploImageProcessor) -> list[Resolution]:
    """The recipe's own layout, and squares of half and of one and a half times its side, in whole patches.

    A recipe of several tiles also gets the square of one tile.
    """
    found = {}
    if own.max_tiles > 1:
        name = f"up to {own.max_tiles} tiles of {own.image_size}"
        found[name] = Resolution(name, own, True)
    for scale in SCALES:
        side = max(1, round(own.image_size * scale / own.patch_size)) * own.patch_size
        trained = side == own.image_size and own.max_tiles == 1
        name = str(side)
        processor = own if trained else square(own, side)
        found.setdefault(name, Resolution(name, processor, trained))
    return sorted(found.values(), key=lambda resolution: not resolution.is_trained)


def square(own: HaploImageProcessor, side: int) -> HaploImageProcessor:
    """The image processor that shows every picture in one square tile of `side` pixels."""
    return HaploImageProcessor(side, own.patch_size, image_mean=own.image_mean, image_std=own.image_std)


@torch.inference_mode()
def at_resolution(
    subject: Subject,
    resolution: Resolution,
    pictures: Sequence[Callable[[], Image.Image]],
    target: int,
    batch: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Any], list[list[float]] | None]:
    """Compares the pre-decoder with the teacher on pictures alone, no text around them.

    `target` is the teacher's hidden state that stage 1 taught. Returns the figures, and CKA of every hidden state of
    ours with every one of the teacher's (None for fewer than four patches).
    """
    meter = _Meter(subject, target, max(1, CKA_PATCHES // len(pictures)))
    for start in range(0, len(pictures), batch):
        shown = resolution.processor([open_picture() for open_picture in pictures[start : start + batch]])
        grids = read_grids(shown["image_grids"].tolist())
        tiles = zip(shown["pixel_values"], grids, strict=True)
        pixels = torch.cat([torch.from_numpy(own[: grid.tiles]) for own, grid in tiles])
        meter.add(pixels, grids)
        progress(min(start + batch, len(pictures)))
    side = resolution.processor.image_size // resolution.processor.patch_size
    cka = meter.cka()
    figures = {"trained": resolution.is_trained, "tile": f"{side}x{side}", "pictures": len(pictures)}
    return {**figures, **meter.figures(cka)}, cka


class _Meter:
    """Adds up what two stacks of layers have in common."""

    def __init__(self, subject: Subject, target: int, sampled: int) -> None:
        self.subject, self.target, self.sampled = subject, target, sampled
        ours, theirs = subject.layers
        self.final = Cosine()
        same_width = subject.core.config.pre_config.hidden_size == subject.teacher.config.hidden_size
        self.layers = [Cosine() for _ in range(min(ours, theirs))] if same_width else []
        self._features: tuple[list[list[torch.Tensor]], ...] = ([[] for _ in range(ours)], [[] for _ in range(theirs)])
        # Patches are drawn, as evenly spaced ones would stand at the same few places of every picture.
        self._random = torch.Generator().manual_seed(0)

    def add(self, pixels: torch.Tensor, grids: Sequence[Any]) -> None:
        subject = self.subject
        done = run_pictures(subject, pixels, grids)
        ours = [patches_of(subject, state, done.input_ids, grids) for state in done.states]
        theirs = [teacher_patches(subject, state, pixels, grids) for state in teacher_states(subject, pixels)]
        if subject.vision_head is not None:
            output = patches_of(subject, done.output, done.input_ids, grids)
            self.final.add(subject.vision_head(output), theirs[self.target])
        for meter, own, their in zip(self.layers, ours, theirs, strict=False):
            meter.add(own, their)
        chosen = self._draw([grid.out_rows * grid.out_columns for grid in grids]).to(subject.device)
        for kept, states in zip(self._features, (ours, theirs), strict=True):
            for features, state in zip(kept, states, strict=True):
                features.append(state[chosen].cpu())

    def _draw(self, sizes: Sequence[int]) -> torch.Tensor:
        """Numbers of some patches of every picture."""
        parts, first = [], 0
        for size in sizes:
            parts.append(first + torch.randperm(size, generator=self._random)[: self.sampled].sort().values)
            first += size
        return torch.cat(parts)

    def cka(self) -> list[list[float]] | None:
        ours, theirs = ([torch.cat(parts) for parts in kept] for kept in self._features)
        return cka_matrix(ours, theirs) if len(ours[0]) >= 4 else None

    def figures(self, cka: list[list[float]] | None) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if self.subject.vision_head is not None:
            figures = {"cosine": self.final.mean, "constant": self.final.constant}
        layers: dict[str, Any] = {}
        for number in range(min(self.subject.layers)):
            own: dict[str, Any] = {}
            if self.layers:
                own |= {"cosine": self.layers[number].mean, "constant": self.layers[number].constant}
            if cka is not None:
                row = cka[number]
                own |= {"cka": row[number], "most_like": max(range(len(row)), key=row.__getitem__)}
            layers[str(number)] = own
        return {**figures, "layers": layers}
