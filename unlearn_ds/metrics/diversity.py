"""Diversity of generated answers: share of unique words in an answer (the paper's measure), averaged over answers."""

from __future__ import annotations

from unlearn_ds.types import Measured, Scored

version = 1
higher_is_better = True


def diversity(measured: Measured) -> Scored:
    """``diversity`` in [0, 1]; an empty answer has 0."""
    split = [text.lower().split() for text in measured.texts]
    shares = [len(set(words)) / len(words) if words else 0.0 for words in split]
    return Scored({"diversity": sum(shares) / max(1, len(shares))})
