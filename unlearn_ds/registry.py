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
    "question_accuracy": "unlearn_ds.metrics.question_accuracy:question_accuracy",
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

QUICK_CHECKS: Mapping[str, str] = {
    "stale locks": "unlearn_ds.preflight.locks:stale",
    "output folder": "unlearn_ds.preflight.disk:writable",
    "free disk": "unlearn_ds.preflight.disk:free",
    "inodes": "unlearn_ds.preflight.disk:inodes",
    "shared memory": "unlearn_ds.preflight.memory:shared_memory",
    "locked memory": "unlearn_ds.preflight.memory:locked_memory",
    "open files": "unlearn_ds.preflight.memory:open_files",
    "model": "unlearn_ds.preflight.files:model",
    "data": "unlearn_ds.preflight.files:data",
    "port": "unlearn_ds.preflight.network:port",
}
"""Checks of a node that take milliseconds: before every run, and by the doctor."""

NODE_CHECKS: Mapping[str, str] = {
    "packages": "unlearn_ds.preflight.software:installed",
    "flags": "unlearn_ds.preflight.files:flags",
    "DeepSpeed JSON": "unlearn_ds.preflight.files:deepspeed_config",
    "compiler": "unlearn_ds.preflight.locks:compiler",
    "interface": "unlearn_ds.preflight.network:interface",
    "hub": "unlearn_ds.preflight.files:hub",
    "GPUs": "unlearn_ds.preflight.gpu:usable",
    "GPU health": "unlearn_ds.preflight.gpu:health",
    "torch on GPUs": "unlearn_ds.preflight.gpu:torch_sees",
}
"""Further checks of a node, by the doctor only."""

LAUNCH_CHECKS: Mapping[str, str] = {
    ".deepspeed_env": "unlearn_ds.preflight.hostfile:environment_file",
    "environment": "unlearn_ds.preflight.hostfile:exported",
}
"""Checks of the machine that a launcher is started on."""

NODE_FACTS: Mapping[str, str] = {
    "software": "unlearn_ds.preflight.software:facts",
    "devices": "unlearn_ds.preflight.gpu:facts",
    "run": "unlearn_ds.preflight.files:run_facts",
    "machine": "unlearn_ds.preflight.memory:machine_facts",
}
"""What each node tells of itself, for the checks that look at all nodes together."""

CLUSTER_CHECKS: Mapping[str, str] = {
    "same software": "unlearn_ds.preflight.compare:software",
    "same devices": "unlearn_ds.preflight.compare:devices",
    "same run": "unlearn_ds.preflight.compare:run",
    "clocks": "unlearn_ds.preflight.compare:clocks",
    "shared output": "unlearn_ds.preflight.compare:shared_output",
    "main node": "unlearn_ds.preflight.compare:main_node",
    "memory plan": "unlearn_ds.preflight.compare:memory",
}
"""Checks of all nodes together."""


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
