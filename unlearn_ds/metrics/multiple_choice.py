"""Accuracy on multiple-choice items by likelihood of the completion."""

from __future__ import annotations

import itertools

from unlearn_ds.types import Measured, Scored

version = 1
higher_is_better = True


def multiple_choice(measured: Measured) -> Scored:
    """``accuracy``: share of items whose right choice has the smallest summed NLL. An item is the rows of one prompt, a
    row each choice; of equal ones the first is chosen.

    Items are completions of plain sentences without a template: there the unmodified sample model answers 96 % right,
    where mean likelihoods under its chat template stay near chance.
    """
    pairs = zip(measured.rows, (score.nll for score in measured.scores), strict=True)
    items = [list(group) for _, group in itertools.groupby(pairs, key=lambda pair: pair[0].prompt)]
    chosen = [min(item, key=lambda pair: pair[1])[0] for item in items]
    return Scored({"accuracy": sum(row.answer in row.right_answers for row in chosen) / max(1, len(items))})
