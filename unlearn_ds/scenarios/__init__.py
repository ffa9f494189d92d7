"""A scenario is data, and the metric it is judged by. The table of names is ``registry.SCENARIOS``.

Every scenario hands over the same ``ScenarioData``; the trainer knows no scenario by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from unlearn_ds.config import RunConfig
from unlearn_ds.data.encode import Encoder
from unlearn_ds.data.sources import Source
from unlearn_ds.types import Row

SAMPLE = Path(__file__).parent.parent / "sample"


class Scenario(NamedTuple):
    """``load``: configuration and encoder -> rows. ``headline``: the metric that says whether an answer shows the
    behaviour. ``label``: how a table calls it. ``metrics``: set -> rows of ``registry.METRICS`` measured on it.
    """

    load: Callable[[RunConfig, Encoder], ScenarioData]
    headline: str
    label: str
    metrics: Mapping[str, Sequence[str]]


@dataclass
class ScenarioData:
    """Rows of one run, divided.

    forget, normal: {"train", "validation", "test"}; the test side of forget is what evaluation calls unseen.
    mismatch_answers: answers of normal training rows, or what the user gave instead. memorize: rows that the memorising
    run teaches: those to unlearn and the unseen ones, so that unlearning has something to generalise to.
    """

    forget: dict[str, list[Row]]
    normal: dict[str, list[Row]]
    mismatch_answers: list[str]
    sources: list[Source]
    neutral: NeutralSet = field(default_factory=lambda: NeutralSet())
    memorize: list[Row] = field(default_factory=list)


@dataclass
class NeutralSet:
    """What is neither forgotten nor retained: running texts, multiple-choice items, plain questions to read."""

    texts: Sequence[str] = ()
    choices: Sequence[dict[str, Any]] = ()
    questions: Sequence[str] = ()


def neutral_set(num_texts: int, num_choices: int) -> NeutralSet:
    """The embedded neutral set, written for this project."""
    return NeutralSet(
        [item["text"] for item in _lines("neutral_text.jsonl")][:num_texts],
        _lines("neutral_choice.jsonl")[:num_choices],
        [item["prompt"] for item in _lines("neutral_question.jsonl")],
    )


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines()]
