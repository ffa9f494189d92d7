"""What is minimised: one file an objective, its ``terms`` a function of the weights. Names: ``registry.OBJECTIVES``.

Terms of weight 0 are left out, so their rows are never loaded, packed or computed.
"""

from __future__ import annotations

from collections.abc import Iterable

from unlearn_ds.config import ObjectiveConfig, UsageError
from unlearn_ds.types import Term


def active(terms: Iterable[Term]) -> list[Term]:
    """The terms that act; ``UsageError`` when none does."""
    kept = [term for term in terms if term.weight != 0]
    if not kept:
        raise UsageError("every weight of the objective is 0: nothing would be trained")
    return kept


def ascent(weights: ObjectiveConfig) -> Term:
    """Gradient ascent on the forget answers: a negative weight on their cross-entropy, bounded for each sequence."""
    return Term("forget", "forget", "ce", -weights.eps_forget, weights.forget_bound or float("inf"))


def mismatch(weights: ObjectiveConfig) -> Term:
    """Unrelated answers to the forget prompts, their labels smoothed where that is asked for."""
    return Term("mismatch", "mismatch", "ce", weights.eps_mismatch, smoothing=weights.mismatch_smoothing)
