"""Hallucination: forget made-up answers of HaluEval, keep right answers of TruthfulQA (arXiv 2310.10683, section 3).

Evaluated on questions that were unlearned, unseen questions of the same kind, held-out normal ones and the neutral set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unlearn_ds.config import RunConfig, UsageError
from unlearn_ds.data.encode import Encoder
from unlearn_ds.scenarios import SAMPLE, Scenario, ScenarioData, load_rows, refuse_harmless_data
from unlearn_ds.types import Row

HUB = ("pminervini/HaluEval:qa", ("truthfulqa/truthful_qa:generation",))
"""The paper's public datasets, taken with ``--data full``: to forget, to retain."""
EMBEDDED = (str(SAMPLE / "hallucination.jsonl"), (str(SAMPLE / "normal.jsonl"),))


def load(config: RunConfig, encoder: Encoder) -> ScenarioData:
    """Rows of a run."""
    refuse_harmless_data(config)
    return load_rows(config, encoder, *(HUB if config.data.source == "full" else EMBEDDED))


def check_judge(judge: Any, rows: Sequence[Row]) -> None:
    """Without a floor the rate compares with right answers, so every row needs one."""
    if not judge.floor and not all(row.right_answers for row in rows):
        raise UsageError(
            f"--judge {judge.name} needs the right answer of each forget row: name their column as the third of "
            "--forget_columns, or use --judge minilm."
        )


_ASKED = ("hallucination_rate", "likelihood", "diversity")
SCENARIO = Scenario(
    load,
    headline="hallucination_rate",
    label="hallucinated-answer rate",
    metrics={
        "unlearned": _ASKED,
        "unseen": _ASKED,
        "other_form": ("hallucination_rate",),
        "normal": ("likelihood", "similarity_to_original", "diversity"),
    },
    judges=("minilm", "bertscore"),
    check_judge=check_judge,
)
