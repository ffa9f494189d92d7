"""Accuracy on multiple-choice items by likelihood of the completion."""

from __future__ import annotations

from collections.abc import Sequence

version = 1
higher_is_better = True


def multiple_choice(nll_sums: Sequence[Sequence[float]], right: Sequence[int]) -> dict[str, float]:
    """``accuracy``: share of items whose right choice has the smallest summed NLL.

    Items are completions of plain sentences without a template: there the unmodified sample model answers 96 % right,
    where mean likelihoods under its chat template stay near chance.
    """
    chosen = [min(range(len(choices)), key=lambda n: choices[n]) for choices in nll_sums]
    return {"accuracy": sum(c == r for c, r in zip(chosen, right, strict=True)) / max(1, len(right))}
