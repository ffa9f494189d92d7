"""Accuracy on plain questions by what the model answers.

Likelihoods of choices tell little of it: a model that answers most questions beside the point may still rank the right
completion of a sentence first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from unlearn_ds.types import Measured, Row, Scored

version = 1
higher_is_better = True


def question_accuracy(measured: Measured) -> Scored:
    """``question_accuracy``: share of answers that are right. ``questions_kept``: of the answers that were right before
    unlearning, the share that still are; left out where none was.

    Right is an answer that contains one of the row's right answers as whole words, in any case (the inclusion match of
    open-domain question answering). Hyphens count as spaces; "3.5" and "1,000" do not contain 3, 5 or 1.
    """
    now, before = _right(measured.texts, measured.rows), _right(measured.originals, measured.rows)
    kept = [right for right, was_right in zip(now, before, strict=True) if was_right]
    numbers = {"question_accuracy": sum(now) / len(now)}
    return Scored(numbers | {"questions_kept": sum(kept) / len(kept)} if kept else numbers, now)


def _right(texts: Sequence[str], rows: Sequence[Row]) -> list[bool]:
    return [any(_contains(text, answer) for answer in row.right_answers) for text, row in zip(texts, rows, strict=True)]


def _contains(text: str, answer: str) -> bool:
    text, answer = (each.replace("-", " ") for each in (text, answer))
    alone = rf"(?<!\w)(?<!\d[.,]){re.escape(answer)}(?!\w)(?![.,]\d)"
    return re.search(alone, text, re.IGNORECASE) is not None
