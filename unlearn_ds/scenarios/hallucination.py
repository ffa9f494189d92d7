"""Hallucination: forget made-up answers of HaluEval, keep right answers of TruthfulQA (arXiv 2310.10683, section 3).

Evaluated on questions that were unlearned, unseen questions of the same kind, held-out normal ones and the neutral set.
"""

from __future__ import annotations

from unlearn_ds.config import RunConfig, UsageError
from unlearn_ds.data import sources
from unlearn_ds.data.encode import Encoder
from unlearn_ds.scenarios import SAMPLE, Scenario, ScenarioData, neutral_set

HUB = {"forget": "pminervini/HaluEval:qa", "retain": "truthfulqa/truthful_qa:generation"}
"""The paper's public datasets, taken with ``--data full``."""


def load(config: RunConfig, encoder: Encoder) -> ScenarioData:
    """Read, check and divide the rows of a run.

    Mismatch answers are right answers of normal training rows only: the published code also drew from TruthfulQA's
    false answers and from rows held out for testing.
    """
    data = config.data
    sample = {"forget": SAMPLE / "hallucination.jsonl", "retain": SAMPLE / "normal.jsonl"}
    default = HUB if data.source == "full" else sample
    forget = sources.read(str(data.forget_data or default["forget"]), "forget", data.forget_columns)
    retain = sources.read(str(data.retain_data or default["retain"]), "retain", data.retain_columns)
    read = [forget, retain]
    if data.mismatch_data:
        read.append(sources.read(data.mismatch_data, "retain", data.mismatch_columns))
    for source in read:
        encoder.keep_encodable(source)
        if data.limit:
            del source.rows[data.limit :]
    divided, normal = sources.split(forget.rows), sources.split(retain.rows)
    for name, part in (("forget", divided["train"]), ("unseen", divided["test"]), ("normal", normal["train"]),
                       ("held-out normal", normal["test"])):  # fmt: skip
        if not part and all(source.rows for source in read):
            raise UsageError(
                f"too few rows: none is left for the {name} set after the 70/10/20 split by content; "
                "give about 20 or more."
            )
    return ScenarioData(
        forget=divided,
        normal=normal,
        mismatch_answers=_mismatch_answers(config, normal["train"], read[2:]),
        sources=read,
        neutral=neutral_set(config.eval.num_neutral_texts, config.eval.num_neutral_choices),
        memorize=divided["train"] + divided["test"],
    )


def _mismatch_answers(config: RunConfig, normal: list[sources.Row], given: list[sources.Source]) -> list[str]:
    if config.data.mismatch_text:
        return [config.data.mismatch_text]
    rows = given[0].rows if given else normal
    return list(dict.fromkeys(answer for row in rows for answer in (row.answer, *row.right_answers) if answer))


_ASKED = ("hallucination_rate", "likelihood", "diversity")
SCENARIO = Scenario(
    load,
    headline="hallucination_rate",
    label="hallucinated-answer rate",
    metrics={
        "unlearned": _ASKED,
        "unseen": _ASKED,
        "normal": ("likelihood", "similarity_to_original", "diversity"),
    },
)
