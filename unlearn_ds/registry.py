"""Names to code: every extension point is a table of text rows ``name -> "module:attribute"``, resolved on use.

Text rows keep imports lazy (``--help`` needs no torch) and let grep find every use.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

SCENARIOS: Mapping[str, str] = {
    "harmful": "unlearn_ds.scenarios.harmful:SCENARIO",
    "copyright": "unlearn_ds.scenarios.copyright:SCENARIO",
    "hallucination": "unlearn_ds.scenarios.hallucination:SCENARIO",
}

OBJECTIVES: Mapping[str, str] = {
    "ga_mismatch": "unlearn_ds.objectives.ga_mismatch:terms",
    "ga_mismatch_ce": "unlearn_ds.objectives.ga_mismatch_ce:terms",
    "gradient_ascent": "unlearn_ds.objectives.gradient_ascent:terms",
    "gradient_difference": "unlearn_ds.objectives.gradient_difference:terms",
    "memorize": "unlearn_ds.objectives.memorize:terms",
}

METRICS: Mapping[str, str] = {
    "hallucination_rate": "unlearn_ds.metrics.hallucination_rate:hallucination_rate",
    "harmful_rate": "unlearn_ds.metrics.harmful_rate:harmful_rate",
    "leak_rate": "unlearn_ds.metrics.leak_rate:leak_rate",
    "refusal_rate": "unlearn_ds.metrics.refusal_rate:refusal_rate",
    "likelihood": "unlearn_ds.metrics.likelihood:likelihood",
    "multiple_choice": "unlearn_ds.metrics.multiple_choice:multiple_choice",
    "diversity": "unlearn_ds.metrics.diversity:diversity",
    "similarity_to_original": "unlearn_ds.metrics.similarity:similarity_to_original",
}

JUDGES: Mapping[str, str] = {
    "minilm": "unlearn_ds.metrics.judges:SentenceEmbeddingJudge",
    "bertscore": "unlearn_ds.metrics.judges:BertScoreJudge",
    "moderator": "unlearn_ds.metrics.moderation:EmbeddingModerator",
    "classifier": "unlearn_ds.metrics.moderation:SequenceClassifier",
    "bleu": "unlearn_ds.metrics.leak_rate:BleuJudge",
}

REFERENCES: Mapping[str, str] = {
    "adapter": "unlearn_ds.build:adapter_reference",
    "offload": "unlearn_ds.build:live_reference",
    "nvme": "unlearn_ds.build:live_reference",
    "resident": "unlearn_ds.build:live_reference",
    "cached": "unlearn_ds.build:cached_reference",
}

KERNELS: Mapping[str, str] = {
    "triton": "unlearn_ds.kernels.rows_triton:TritonRows",
    "torch": "unlearn_ds.kernels.rows_torch:TorchRows",
}
"""What happens to rows of logits."""

STOP_RULES: Mapping[str, str] = {
    "forget_loss": "unlearn_ds.stopping:ForgetLoss",
    "kl": "unlearn_ds.stopping:Kl",
    "rate": "unlearn_ds.stopping:Rate",
    "patience": "unlearn_ds.stopping:Patience",
}


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return a sentence that lists the valid names nearest to ``name``, or all of them when none is near."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    if near:
        return "Did you mean " + " or ".join(f"'{candidate}'" for candidate in near) + "?"
    return "Valid names: " + ", ".join(valid) + "."


def check_name(kind: str, name: str, table: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` with the nearest valid names unless ``name`` is a row of ``table``."""
    if name not in table:
        raise ValueError(f"unknown {kind} '{name}'. {did_you_mean(str(name), table)}")


def resolve(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """Import and return the object that row ``name`` of ``table`` points to; ``ValueError`` without such a row."""
    check_name(kind, name, table)
    module, attribute = table[name].split(":")
    return getattr(importlib.import_module(module), attribute)
