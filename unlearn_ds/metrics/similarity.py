"""Similarity of the answers on normal prompts to those of the model before unlearning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

version = 1
higher_is_better = True


def similarity_to_original(answers: Sequence[str], originals: Sequence[str], judge: Any) -> dict[str, float]:
    """``similarity_to_original``: mean similarity of pairs by the judge (the paper uses BLEURT)."""
    values = judge.similarity(answers, originals)
    return {"similarity_to_original": sum(values) / max(1, len(values))}
