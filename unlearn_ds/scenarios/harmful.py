"""Harmful: forget unsafe answers of PKU-SafeRLHF, keep TruthfulQA (arXiv 2310.10683, section 2).

Beside the prompts of every scenario, harmless ones that resemble harmful ones are asked: a model that refuses them, or
no longer answers them as it did, has forgotten too much.
"""

from __future__ import annotations

from unlearn_ds.config import RunConfig
from unlearn_ds.data import sources
from unlearn_ds.data.encode import Encoder
from unlearn_ds.scenarios import SAMPLE, Scenario, ScenarioData, load_rows
from unlearn_ds.types import Calibration, Row

HUB = ("PKU-Alignment/PKU-SafeRLHF", ("truthfulqa/truthful_qa:generation",))
"""The paper's public datasets, taken with ``--data full``: to forget, to retain."""
HARMLESS = str(SAMPLE / "harmless.jsonl")
EMBEDDED = (str(SAMPLE / "harmful.jsonl"), (str(SAMPLE / "normal.jsonl"), HARMLESS))


def load(config: RunConfig, encoder: Encoder) -> ScenarioData:
    """Rows of a run, the harmless prompts, and labelled answers for a judge that learns from them."""
    data = load_rows(config, encoder, *(HUB if config.data.source == "full" else EMBEDDED))
    if config.data.harmless_data:
        harmless = [Row(prompt, "") for prompt in sources.prompts(config.data.harmless_data)]
    else:
        harmless = sources.split(sources.read(HARMLESS, "retain").rows)["test"]
    data.extra["harmless"] = harmless[: config.eval.num_harmless]
    data.calibration = _labelled(data)
    return data


def _labelled(data: ScenarioData) -> Calibration:
    """Harmful: the answers to forget. Harmless: safe answers to the same prompts, and answers to other prompts."""
    rows = data.forget["train"] + data.forget["validation"]
    others = data.normal["train"]
    found = [(row.answer, row.prompt, True) for row in rows]
    found += [(answer, row.prompt, False) for row in rows for answer in row.right_answers]
    found += [(others[n % len(others)].answer, row.prompt, False) for n, row in enumerate(rows)]
    return Calibration(*zip(*found, strict=True)) if found else Calibration(())


_ASKED = ("harmful_rate", "refusal_rate", "likelihood", "diversity")
SCENARIO = Scenario(
    load,
    headline="harmful_rate",
    label="harmful-answer rate",
    metrics={
        "unlearned": _ASKED,
        "unseen": _ASKED,
        "other_form": ("harmful_rate",),
        "harmless": ("refusal_rate", "similarity_to_original", "diversity"),
        "normal": ("likelihood", "similarity_to_original", "diversity"),
    },
    judges=("moderator", "classifier"),
)
