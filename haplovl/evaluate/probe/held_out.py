"""Held-out records as stage 1 read them: the vision loss among words, and the current token of every word."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from haplovl.data.loader import PreparedRecords
from haplovl.evaluate.probe.similarity import Cosine
from haplovl.evaluate.probe.subject import Pass, Subject, patches_of, run, teacher_patches, teacher_states

LOGIT_ROWS = 1024
"""Tokens whose logits are computed together: vocabularies are large."""
TOP = 5


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` numbers, evenly spread."""
    limit = min(limit, count)
    return [i * count // limit for i in range(limit)]


@torch.inference_mode()
def in_records(
    subject: Subject,
    records: PreparedRecords,
    chosen: Sequence[int],
    target: int,
    batch: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of the patches (against the teacher's hidden state `target`) and of the text tokens of records."""
    patches, words = Cosine(), _Words(subject)
    for start in range(0, len(chosen), batch):
        samples = [records[index] for index in chosen[start : start + batch]]
        pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
        grids = [grid for sample in samples for grid in sample.image_grids]
        tiles = torch.cat(pixels) if pixels else None
        done = run(subject, [sample.input_ids for sample in samples], tiles, grids)
        if tiles is not None and subject.vision_head is not None:
            state = teacher_states(subject, tiles)[target]
            predicted = subject.vision_head(patches_of(subject, done.output, done.input_ids, grids))
            patches.add(predicted, teacher_patches(subject, state, tiles, grids))
        if subject.text_head is not None:
            words.add(done)
        progress(min(start + batch, len(chosen)))
    seen = {"cosine": patches.mean, "constant": patches.constant, "patches": patches.count} if patches.count else {}
    return seen, words.figures()


class _Words:
    """Ranks of the current tokens among all words of the vocabulary, 0 for the first."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._ranks: list[torch.Tensor] = []
        self._after: list[torch.Tensor] = []
        self._tokens: list[torch.Tensor] = []
        self._cosines: list[torch.Tensor] = []

    def add(self, done: Pass) -> None:
        is_image = done.input_ids == self.subject.core.config.image_token_id
        chosen = ~is_image & done.real
        self._after.append((is_image.cumsum(dim=1) > 0)[chosen].cpu())
        tokens = done.input_ids[chosen]
        self._tokens.append(tokens.cpu())
        hidden = done.output[chosen]
        for part, own in zip(hidden.split(LOGIT_ROWS), tokens.split(LOGIT_ROWS), strict=True):
            predicted = self.subject.text_head(part)
            logits = predicted @ self.subject.words.T
            # Words that tie with the right one come before it: a head that says nothing must not be right.
            right = logits.gather(1, own[:, None])
            self._ranks.append(((logits >= right).sum(dim=1) - 1).cpu())
            self._cosines.append(functional.cosine_similarity(predicted, self.subject.words[own], dim=-1).cpu())

    def figures(self) -> dict[str, Any]:
        """The figures of all text tokens, and of those after a picture of their record; empty without any."""
        if not self._ranks:
            return {}
        ranks, after = torch.cat(self._ranks), torch.cat(self._after)
        tokens, cosines = torch.cat(self._tokens), torch.cat(self._cosines)
        every = torch.ones_like(after)
        groups = {"all": every, "after_image": after}
        return {name: _summary(ranks[g], tokens[g], cosines[g]) for name, g in groups.items() if bool(g.any())}


def _summary(ranks: torch.Tensor, tokens: torch.Tensor, cosines: torch.Tensor) -> dict[str, Any]:
    return {
        "top1": float((ranks == 0).double().mean()),
        f"top{TOP}": float((ranks < TOP).double().mean()),
        "mean_rank": float(ranks.double().mean()) + 1,
        "cosine": float(cosines.double().mean()),
        "most_frequent": Counter(tokens.tolist()).most_common(1)[0][1] / len(tokens),
        "tokens": len(tokens),
    }
