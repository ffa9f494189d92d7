"""Similarity of the answers on normal prompts to those of the model before unlearning."""

from __future__ import annotations

from unlearn_ds.types import Measured, Scored

version = 1
higher_is_better = True


def similarity_to_original(measured: Measured) -> Scored:
    """``similarity_to_original``: mean similarity of pairs (the paper uses BLEURT)."""
    values = measured.similarity.similarity(measured.texts, measured.originals)
    return Scored({"similarity_to_original": sum(values) / max(1, len(values))})
