"""A few steps of each stage of RLHF, and what the published numbers of samples cost at that speed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from unlearn_ds import log
from unlearn_ds.cost.rlhf import Samples
from unlearn_ds.profiler import warm
from unlearn_ds.rlhf import stages
from unlearn_ds.rlhf.preferences import Preferences
from unlearn_ds.rlhf.recipe import Recipe
from unlearn_ds.rlhf.setting import Setting
from unlearn_ds.rlhf.stages import Stage


def measure(path: str, data: Preferences, num_steps: int, recipe: Recipe, setting: Setting) -> dict[str, Any]:
    """Run ``num_steps`` of each stage on the model at ``path``. Returns the costs of one sample by stage, and of the
    published numbers of samples (``cost.rlhf.Samples``: DeepSpeed-Chat's, one pass each)."""
    log.say(f"rlhf        {num_steps} steps of each stage by TRL, on {len(data.prompts)} prompts")
    sft = stages.sft(path, data.demonstrations, recipe, setting, num_steps)
    reward = stages.reward_model(str(sft.model), data.pairs, recipe, setting, num_steps)
    policy = stages.ppo(str(sft.model), str(reward.model), data.prompts, recipe, setting, num_steps)
    return scaled([sft, reward, policy], Samples(), recipe)


def scaled(measured: Sequence[Stage], samples: Samples, recipe: Recipe) -> dict[str, Any]:
    """Seconds and FLOPs of a sample of each stage, medians without the first steps, times the samples of each."""
    published = {"sft": samples.sft, "reward model": samples.pairs, "ppo": samples.answers}
    found: dict[str, Any] = {"recipe": recipe._asdict(), "stages": {}}
    for stage in measured:
        a_sample = per_sample(stage)
        count = published[stage.name]
        found["stages"][stage.name] = {
            **a_sample, "steps": len(stage.steps), "samples": count,
            "seconds": a_sample["seconds_a_sample"] * count, "flops": a_sample["flops_a_sample"] * count,
        }  # fmt: skip
    rows = found["stages"].values()
    return {**found, "seconds": sum(r["seconds"] for r in rows), "flops": sum(r["flops"] for r in rows)}


def per_sample(stage: Stage) -> Mapping[str, float]:
    """Medians over the steps but the first ones, as of our own steps."""
    counted = warm(stage.steps)
    return {
        "seconds_a_sample": statistics.median(step.seconds for step in counted) / stage.samples,
        "flops_a_sample": statistics.median(step.flops for step in counted) / stage.samples,
    }
