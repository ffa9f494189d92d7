"""Diversity of generated answers: share of unique words in an answer (the paper's measure), averaged over answers."""

from __future__ import annotations

from collections.abc import Sequence

version = 1
higher_is_better = True


def diversity(answers: Sequence[str]) -> dict[str, float]:
    """``diversity`` in [0, 1]; an empty answer has 0."""
    shares = [len(set(words)) / len(words) if words else 0.0 for words in (a.lower().split() for a in answers)]
    return {"diversity": sum(shares) / max(1, len(shares))}
