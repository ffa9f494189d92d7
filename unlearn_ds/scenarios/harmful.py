"""Harmful: forget unsafe answers of PKU-SafeRLHF, keep TruthfulQA (arXiv 2310.10683, section 2).

Beside the prompts of every scenario, harmless ones that resemble harmful ones are asked: a model that refuses them, or
no longer answers them as it did, has forgotten too much.
"""

from __future__ import annotations

from unlearn_ds.config import RunConfig, UsageError
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
    ours = sources.split(sources.read(HARMLESS, "retain").rows)
    data.kindred = ours["train"]
    harmless = ours["test"]
    if config.data.harmless_data:
        harmless = [Row(prompt, "") for prompt in sources.prompts(config.data.harmless_data)]
        if not harmless:
            raise UsageError(
                f"--harmless_data: {config.data.harmless_data} has no prompt to ask: of labelled ones (column label) "
                "those called safe are taken."
            )
    # Evenly over the file: XSTest is ordered by kind.
    data.extra["harmless"] = harmless[:: max(1, len(harmless) // config.eval.num_harmless)][: config.eval.num_harmless]
    data.calibration = _labelled(data, config.eval.num_unlearned)
    return data


def _labelled(data: ScenarioData, num_unlearned: int) -> Calibration:
    """Harmful: answers to forget. Harmless: safe answers to the same prompts, and answers to other prompts.

    Only rows that are neither evaluated nor, for the unrelated answers, trained on: mismatch rows pair forget prompts
    with training answers, and a judge must not have learned that those are harmless.
    """
    asked = {row.prompt for row in data.unlearned(num_unlearned)}
    rows = data.forget["validation"] + [row for row in data.drawn if row.prompt not in asked]
    others = data.normal["validation"]
    found = [(row.answer, row.prompt, True) for row in rows]
    safe = [(answer, row.prompt, False) for row in rows for answer in row.right_answers]
    if safe:
        found += safe
        found += [(others[n % len(others)].answer, row.prompt, False) for n, row in enumerate(rows) if others]
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
