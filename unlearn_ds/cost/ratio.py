"""An unlearning run beside RLHF: FLOPs, GPU-hours, and where the ratio of the two crosses a limit. Arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unlearn_ds.cost.flops import ModelSize
from unlearn_ds.cost.rlhf import ACTORS, DENOMINATORS, Actor, Cluster, Samples, seconds, share_of_peak

LIMIT = 0.02
"""The paper's "2 % of the computational time of RLHF" (arXiv 2310.10683), measured there as run time on one A100."""


class Recipe(NamedTuple):
    """An unlearning run by its numbers.

    batch: forget samples of a step, all devices together; retain: normal ones, as many where it is None. mismatch: K
    unrelated answers to each forget prompt. prompt, answer: tokens of each sample. packed: shared prompts are computed
    once and the LM head on response tokens alone, as here; otherwise every sequence is whole, as published. recompute:
    activations. num_adapter: parameters of LoRA adapters; 0 trains everything.
    """

    batch: int = 8
    steps: int = 60
    mismatch: int = 1
    prompt: int = 128
    answer: int = 128
    retain: int | None = None
    packed: bool = True
    recompute: bool = True
    num_adapter: int = 0

    @property
    def forget_samples(self) -> int:
        return self.batch * self.steps


RECIPES: Mapping[str, tuple[str, Recipe]] = {
    "paper": ("the published code: batch 2, K = 5, 1000 steps", Recipe(2, 1000, 5, packed=False)),
    "ours": ("our defaults: batch 8, K = 1, 60 steps", Recipe()),
    "batch 64": ("the published code at batch 64", Recipe(64, 1000, 5, packed=False)),
}
"""Name -> (what it is, recipe). Samples of 256 tokens, half of them prompt; published batch, K and steps."""

MODELS = {"OPT-1.3B": 8, "Llama-2-7B": 8, "Llama-2-13B": 8, "Llama-2-70B": 64}
"""Of the table -> devices that RLHF has, enough for its states."""


def flops_a_step(size: ModelSize, recipe: Recipe) -> float:
    """FLOPs of one optimizer step, recomputation and reference included, attention scores left out as in ``rlhf``."""
    retain = recipe.batch if recipe.retain is None else recipe.retain
    length, answers = recipe.prompt + recipe.answer, 1 + recipe.mismatch
    tokens = recipe.batch * (recipe.prompt + answers * recipe.answer if recipe.packed else answers * length)
    responses = recipe.batch * answers * recipe.answer if recipe.packed else tokens
    kept, kept_responses = retain * length, retain * (recipe.answer if recipe.packed else length)
    body = (4 if recipe.num_adapter else 6) + (2 if recipe.recompute else 0)
    head = body - (2 if recipe.recompute else 0)  # the loss stands outside the layers that are computed again
    if not recipe.packed:
        head = body  # published code counted as RLHF is, with one number for all matrices
    trained = body * size.body * (tokens + kept) + head * size.head * (responses + kept_responses)
    adapters = (6 + (2 if recipe.recompute else 0)) * recipe.num_adapter * (tokens + kept)
    return trained + adapters + 2.0 * (size.body * kept + size.head * kept_responses)


class Compared(NamedTuple):
    """Unlearning against one denominator. Hours are those of all devices together."""

    denominator: str
    meaning: str
    flops: float
    hours: float
    flops_ratio: float
    hours_ratio: float | None


def compare(actor: Actor, flops: float, hours: float | None, samples: Samples, cluster: Cluster) -> list[Compared]:
    """An unlearning run of so many FLOPs and device-hours against every denominator, on the same cluster.

    hours: None where the run was on other devices than ``cluster`` has; only FLOPs can be compared then."""
    found = []
    for name, (meaning, count) in DENOMINATORS.items():
        work = count(actor.size, samples)
        # The critic has optimizer states too where it is of the actor's size.
        trained = actor.size.total * (2 if name == "four_equal" else 1)
        spent = sum(seconds(actor, work, samples, cluster, trained).values()) * cluster.count / 3600
        whole = sum(work.values())
        found.append(Compared(name, meaning, whole, spent, flops / whole, hours / spent if hours else None))
    return found


def modelled_hours(actor: Actor, flops: float, cluster: Cluster) -> float:
    """Device-hours of unlearning at the speed that RLHF is given: an assumption that small batches do not meet."""
    return flops / (share_of_peak(actor.size.hidden_size) * cluster.flops / cluster.count) / 3600


def samples_within(limit: float, flops: float, forget_samples: float, denominator: float) -> float:
    """Forget samples at which a run that spends ``flops`` on ``forget_samples`` reaches ``limit`` of a denominator."""
    return limit * denominator / (flops / forget_samples)


def table(samples: Samples | None = None, device: str = "A100-80G") -> list[dict[str, Any]]:
    """One row for each model and recipe: FLOPs, device-hours, ratios, and the forget samples that reach ``LIMIT``."""
    samples, rows = samples or Samples(), []
    for model, num_devices in MODELS.items():
        actor, cluster = ACTORS[model], Cluster(device, num_devices)
        for name, (meaning, recipe) in RECIPES.items():
            flops = recipe.steps * flops_a_step(actor.size, recipe)
            hours = modelled_hours(actor, flops, cluster)
            against = compare(actor, flops, hours, samples, cluster)
            rows.append({
                "model": model, "recipe": name, "meaning": meaning, "forget_samples": recipe.forget_samples,
                "flops": flops, "device_hours": hours, "against": {c.denominator: c._asdict() for c in against},
                "samples_at_limit": samples_within(LIMIT, flops, recipe.forget_samples, against[0].flops),
            })  # fmt: skip
    return rows


RLHF_ASSUMPTIONS: Sequence[str] = (
    "RLHF is DeepSpeed-Chat's benchmark: 264,292 prompts of 256 tokens, answers of 256, one epoch, activations "
    "recomputed; SFT on 132,146 samples and a reward model on 264,292 pairs where the stages before PPO count.",
    "RLHF runs as fast as the best published runs did: three constants, see --calibration; published runs of OpenRLHF "
    "took 1.3 to 4 times as long.",
    "Attention scores and optimizers are left out on both sides of analytic ratios.",
    "The ratio grows linearly with steps x batch: it is a property of a recipe, not of unlearning.",
)
TABLE_ASSUMPTIONS: Sequence[str] = (
    "A sample of a recipe has 256 tokens, half of them prompt; activations are recomputed.",
    "Unlearning runs at RLHF's share of the peak, which batches of 2 or 8 do not reach: measure.",
)
