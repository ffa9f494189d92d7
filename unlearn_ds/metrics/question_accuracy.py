"""Accuracy on plain questions by what the model answers.

Likelihoods do not see what unlearning does first: a model that evades every short question may still rank the right
completion of a sentence highest.
"""

from __future__ import annotations

import re

from unlearn_ds.types import Measured, Scored

version = 1
higher_is_better = True


def question_accuracy(measured: Measured) -> Scored:
    """``question_accuracy``: share of answers that contain one of the row's right answers as whole words, in any case
    (the inclusion match of open-domain question answering); hyphens count as spaces."""
    right = [
        any(_contains(text, answer) for answer in row.right_answers)
        for text, row in zip(measured.texts, measured.rows, strict=True)
    ]
    return Scored({"question_accuracy": sum(right) / max(1, len(right))})


def _contains(text: str, answer: str) -> bool:
    text, answer = (each.replace("-", " ") for each in (text, answer))
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None
