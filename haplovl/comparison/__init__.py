"""Recipes on equal terms: the same data, teachers, trainer and evaluation, and as much compute for each."""
