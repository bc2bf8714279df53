"""Records shaped like LLaVA-1.5's 665K instruction mix: kinds, text lengths, pictures and supervised tokens.

    python benchmarks/lengths.py [COUNT]

prints the histogram of COUNT records (default: 20000). Published, and used as it is:

- records by source of their pictures, counted in llava_v1_5_mix665k.json (github.com/haotian-liu/LLaVA/issues/657):
  COCO 364,100, Visual Genome 86,417, OCR-VQA 80,000, GQA 72,140, TextVQA 21,953, no picture 40,688;
- 158K of the COCO records are LLaVA-Instruct: 58K conversations, 23K descriptions and 77K of reasoning, in files of
  126, 20.5 and 79.6 MB (docs/Data.md of the same repository), that is 2172, 891 and 1034 bytes a record; the whole mix
  is a file of 1.03 GB, 1548 bytes a record (huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K);
- questions about one picture form one conversation, and texts from ShareGPT are cut at 2048 tokens (arXiv 2310.03744);
- questions per picture: VQAv2 443,757 / 82,783 (visualqa.org), GQA's balanced training set 943,000 / 72,140 (arXiv
  1902.09506), OCR-VQA over 1,000,000 / 207,572 (its abstract);
- turns of a ShareGPT conversation: 3.51 (arXiv 2512.17843).

Assumed: all other turns and tokens per turn below, chosen so that with four bytes a token and 90 bytes of JSON a turn
the published file sizes come out within a tenth (a test); log-normal spreads; Vicuna's system text and roles.
A picture has 576 tokens: CLIP-ViT-L/14 at 336 pixels.
"""

import math
import sys
from collections import Counter
from random import Random
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

PICTURE_TOKENS = 576
SYSTEM_TOKENS = 35
"""The system text before the first turn."""
ROLE_TOKENS = 10
"""The roles' names and the end of the answer, per turn; the last one is supervised."""
MAX_TEXT_TOKENS = 2048
BYTES_PER_TOKEN, JSON_BYTES_PER_TURN, JSON_BYTES_PER_RECORD = 4, 90, 120
QUESTION_SPREAD, ANSWER_SPREAD = 0.3, 0.5
"""Standard deviations of the logarithms within a kind; `Kind.spread` is that of the turns."""


class Kind(NamedTuple):
    """Records of one source: how many the mix has, and means of turns, question and answer tokens per turn."""

    records: int
    turns: float
    question: float
    answer: float
    pictures: int = 1
    spread: float = 0.4


KINDS = {
    "instruct, conversation": Kind(58_000, 4.4, 14, 77),
    "instruct, description": Kind(23_000, 1, 13, 155),
    "instruct, reasoning": Kind(77_000, 1, 20, 185),
    "VQAv2": Kind(82_783, 443_757 / 82_783, 10, 2),
    "other COCO": Kind(364_100 - 158_000 - 82_783, 2, 35, 10),
    "GQA": Kind(72_140, 943_000 / 72_140, 12, 2),
    "OCR-VQA": Kind(80_000, 1_000_000 / 207_572, 12, 6),
    "TextVQA": Kind(21_953, 1, 70, 15),
    "Visual Genome": Kind(86_417, 10, 18, 15),
    "text only": Kind(40_688, 3.51, 80, 380, pictures=0, spread=1.0),
}


class Sample(NamedTuple):
    """One record: its kind, tokens with those of its pictures, tokens with a loss, and pictures."""

    kind: str
    length: int
    supervised: int
    images: int


def draw(count: int, seed: int = 0) -> list[Sample]:
    """`count` records in random order; the same for the same seed."""
    random = Random(f"lengths-{seed}")
    weights = [kind.records for kind in KINDS.values()]
    return [_sample(name, random) for name in random.choices(list(KINDS), weights, k=count)]


def _sample(name: str, random: Random) -> Sample:
    kind = KINDS[name]
    turns = max(1, round(_spread(kind.turns, kind.spread, random))) if kind.turns > 1 else 1
    questions = round(turns * _spread(kind.question, QUESTION_SPREAD, random))
    answers = max(1, round(turns * _spread(kind.answer, ANSWER_SPREAD, random)))
    text = SYSTEM_TOKENS + turns * ROLE_TOKENS + questions + answers
    cut = max(0, text - MAX_TEXT_TOKENS)
    supervised = max(1, answers + turns - cut)
    return Sample(name, text - cut + kind.pictures * PICTURE_TOKENS, supervised, kind.pictures)


def _spread(mean: float, deviation: float, random: Random) -> float:
    """Log-normal with this mean."""
    return random.lognormvariate(math.log(mean) - deviation**2 / 2, deviation)


def file_bytes(name: str) -> float:
    """Bytes of a record's text in a LLaVA-style JSON file, by the means of its kind."""
    kind = KINDS[name]
    tokens = kind.turns * (kind.question + kind.answer)
    return JSON_BYTES_PER_RECORD + kind.turns * JSON_BYTES_PER_TURN + BYTES_PER_TOKEN * tokens


def main() -> None:
    """Prints the histogram and the means of every kind."""
    samples = draw(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
    bins = Counter(sample.length // 128 for sample in samples)
    histogram = Table("tokens", "share of records", "", title=f"{len(samples)} records like LLaVA-665K")
    for number in range(max(bins) + 1):
        share = bins[number] / len(samples)
        histogram.add_row(f"{128 * number} to {128 * number + 127}", f"{share:.1%}", "█" * round(150 * share))
    kinds = Table("kind", "records", "mean tokens", "supervised", "pictures")
    for name in KINDS:
        own = [sample for sample in samples if sample.kind == name]
        means = (sum(sample[field] for sample in own) / max(1, len(own)) for field in (1, 2, 3))
        length, supervised, pictures = means
        kinds.add_row(name, str(len(own)), f"{length:.0f}", f"{supervised:.0f}", f"{pictures:.0f}")
    tokens = sum(sample.length for sample in samples)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(histogram, kinds)
    console.print(
        f"mean {tokens / len(samples):.0f} tokens a record, "
        f"{sum(sample.supervised for sample in samples) / tokens:.1%} of them supervised"
    )


if __name__ == "__main__":
    main()
