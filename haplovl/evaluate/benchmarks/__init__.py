"""Scorers of eleven published benchmarks, light enough to run beside training: pure Python, no torch.

Each follows lmms-eval 0.7.3 record by record; other public references are offered beside it (docs/benchmarks.md).
"""

from haplovl.evaluate.benchmarks.catalogue import find, names, prompt
from haplovl.evaluate.benchmarks.reading import score_file
from haplovl.evaluate.benchmarks.scoring import score_records

__all__ = ["find", "names", "prompt", "score_file", "score_records"]
