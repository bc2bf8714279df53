"""Packing of a length mix like LLaVA-665K: share of real tokens, and time, by look-ahead.

    python benchmarks/packing.py [--json FILE] [--documents N] [--row-tokens N] [--row-images N]

Look-ahead 1 takes documents as they come. The last line shows the same with documents that no row can be filled with.
"""

import argparse
import json
import platform
import sys
import time
from typing import Any

from lengths import draw
from rich.console import Console
from rich.table import Table

from haplovl.data.packing import draw_documents, fill_rows, real_token_share
from haplovl.settings import StageMixture

LOOKAHEADS = (1, 64, 512, 4096)


def measure(
    lengths: list[int], images: list[int], row_tokens: int, row_images: int | None, lookahead: int
) -> dict[str, float]:
    """Share of real tokens of one epoch's rows, and seconds per million documents, drawing the epoch included."""
    kinds = ["instruction" if count else "text" for count in images]
    began = time.perf_counter()
    documents = draw_documents(kinds, lengths, StageMixture(), row_tokens, seed=0, epoch=0)
    rows = list(fill_rows(documents, lengths, row_tokens, lookahead, images, row_images))
    seconds = time.perf_counter() - began
    return {
        "real_token_share": real_token_share(rows, lengths, row_tokens),
        "documents_per_row": len(documents) / len(rows),
        "most_images_in_a_row": max(sum(images[i] for document in row for i in document) for row in rows),
        "seconds_per_million": seconds / len(documents) * 1e6,
    }


def main() -> None:
    """Measures every look-ahead and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--documents", type=int, default=1_000_000, help="default: 1000000")
    parser.add_argument("--row-tokens", type=int, default=4096, help="default: 4096")
    parser.add_argument("--row-images", type=int, help="most pictures in a row (default: any number)")
    options = parser.parse_args()
    samples = draw(options.documents)
    lengths, images = [s.length for s in samples], [s.images for s in samples]
    room = (options.row_tokens, options.row_images)
    results = {str(n): measure(lengths, images, *room, n) for n in LOOKAHEADS}
    alike = [options.row_tokens // 4 - 24] * options.documents
    results["4096, equal lengths"] = measure(alike, [0] * options.documents, *room, 4096)
    _show(results, options)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(_report(results, options), file, indent=2)
            file.write("\n")


def _report(results: dict[str, dict[str, float]], options: argparse.Namespace) -> dict[str, Any]:
    figures = {
        "packed_share": results["4096"]["real_token_share"],
        "packed_share_64": results["64"]["real_token_share"],
    }
    figures["packing_seconds_per_million"] = results["4096"]["seconds_per_million"]
    settings = {name: getattr(options, name) for name in ("documents", "row_tokens", "row_images")}
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    return {"figures": figures, "lookahead": results, "settings": settings, "machine": machine}


def _show(results: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    bound = f", at most {options.row_images} pictures" if options.row_images else ""
    table = Table(title=f"{options.documents} documents in rows of {options.row_tokens} tokens{bound}")
    for name in ("look-ahead", "real tokens", "documents in a row", "pictures in a row", "seconds per million"):
        table.add_column(name, justify="right")
    for name, r in results.items():
        table.add_row(
            name,
            f"{r['real_token_share']:.3%}",
            f"{r['documents_per_row']:.2f}",
            f"≤ {r['most_images_in_a_row']}",
            f"{r['seconds_per_million']:.1f}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
