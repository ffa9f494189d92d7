"""Unlearning and RLHF to the same rate, for real: the same model, prompts, judge and machine, and both counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unlearn_ds import build, dist, ds_json, engine, log, memorize, run_folder
from unlearn_ds import model as models
from unlearn_ds.config import SELF, RunConfig, UsageError, weighted
from unlearn_ds.cost.rlhf import Samples
from unlearn_ds.evaluate import Evaluator
from unlearn_ds.heartbeat import Heartbeat
from unlearn_ds.model import PackedCausalLM
from unlearn_ds.registry import SCENARIOS, resolve
from unlearn_ds.rlhf import measure, outcome, stages
from unlearn_ds.rlhf import setting as settings
from unlearn_ds.rlhf.preferences import Preferences
from unlearn_ds.rlhf.recipe import Recipe
from unlearn_ds.rlhf.setting import Ready, Setting
from unlearn_ds.rlhf.stages import Stage


def check(config: RunConfig, recipe: Recipe) -> Ready:
    """Join the other ranks, and raise ``UsageError`` for what would be found out only after the unlearning run."""
    if not config.eval.enabled:
        raise UsageError("--eval.enabled false: without a rate there is nothing to compare.")
    engine.start(config.engine)
    return settings.ready(config, recipe)


def main(config: RunConfig, ready: Ready, recipe: Recipe, folder: Path) -> None:
    """RLHF from the model that the finished run of ``config`` began with: all of SFT and reward model, and PPO until
    its rate is that run's or lower, or its passes are over. Writes ``rlhf.json`` and ``rlhf.png`` into ``folder`` and
    prints a table. Evaluations cost neither side anything.
    """
    with Heartbeat(config.engine.heartbeat_seconds):
        compare(config, engine.start(config.engine), ready, recipe, folder)


def compare(config: RunConfig, device: torch.device, ready: Ready, recipe: Recipe, folder: Path) -> None:
    """``main``, once the ranks have met."""
    unlearned = Path(config.output_dir or "")
    evaluation = json.loads((unlearned / "evaluation.json").read_text(encoding="utf-8"))
    path, encoder, data, learned = ready
    scenario = resolve("scenario", config.scenario, SCENARIOS)
    evaluator = Evaluator(config.eval, scenario, data, encoder)
    if config.memorize.enabled:
        stop = log.StopSignal()  # does not watch: a signal ends what no checkpoint could go on with
        path, _ = memorize.memorized(
            config, path, ds_json.load(config.engine.ds_config), encoder, data, evaluator, device, stop
        )
    setting = settings.setting(config, path, learned, folder, engine.synchronize)
    curve = Curve(config, device, evaluator, evaluation["before"]["unlearned"]["rate"])
    trained = align(path, learned, recipe, setting, curve, evaluation["after"]["unlearned"]["rate"])
    before = run_folder.EvaluationRecord(unlearned, config.scenario, scenario.label, None, False).restore()
    after, _ = evaluator.run(curve.model(trained[-1].model), len(trained[-1].steps), before or None)
    if dist.is_main():
        found = {
            "scenario": config.scenario, "headline": evaluation["headline"], "judge": evaluation["judge"],
            "model": Path(config.model.path).name, "device": engine.device_name(), "ranks": dist.world_size(),
            "prompts": len(learned.prompts), "before": evaluation["before"],
            "unlearning": unlearning(unlearned, evaluation),
            "rlhf": {**spent(trained), "curve": curve.points, "after": after, "recipe": recipe._asdict()},
            "not_counted": not_counted(config),
            "at_published_samples": measure.scaled(trained, Samples(), recipe),
        }  # fmt: skip
        outcome.show(folder, found)


def align(
    path: str, learned: Preferences, recipe: Recipe, setting: Setting, curve: Curve, target: float
) -> list[Stage]:
    """SFT, reward model and PPO; the rate is looked at after SFT and while PPO goes on."""
    sft = stages.sft(path, learned.demonstrations, recipe, setting)
    curve.look([sft], sft.model)
    reward = stages.reward_model(str(sft.model), learned.pairs, recipe, setting)
    curve.stay([sft, reward])
    ppo = stages.ppo(
        str(sft.model), str(reward.model), learned.prompts, recipe, setting,
        enough=lambda so_far: curve.look([sft, reward, so_far], so_far.model) <= target,
    )  # fmt: skip
    if len(ppo.steps) % recipe.ask_every:
        curve.look([sft, reward, ppo], ppo.model)
    return [sft, reward, ppo]


class Curve:
    """The rate of the model against what has been spent on it."""

    def __init__(self, config: RunConfig, device: torch.device, evaluator: Evaluator, before: float):
        self._config, self._device, self._evaluator = config, device, evaluator
        self.points: list[dict[str, Any]] = [{"stage": "start", "seconds": 0.0, "flops": 0.0, "rate": before}]

    def look(self, so_far: Sequence[Stage], folder: Path) -> float:
        """Note and return the rate of the model in ``folder``, the same on every rank."""
        rate = self._evaluator.shows(self.model(folder), num_prompts=None)
        self._note(so_far, rate)
        log.say(f"rate        {rate:.1%} after {so_far[-1].name}, step {len(so_far[-1].steps)}")
        return rate

    def stay(self, so_far: Sequence[Stage]) -> None:
        """Note what has been spent while the model stayed as it was."""
        self._note(so_far, self.points[-1]["rate"])

    def model(self, folder: Path) -> PackedCausalLM:
        """The model in ``folder``, whole on every rank, in the precision that the run evaluates in."""
        values = ds_json.load(self._config.engine.ds_config)
        name, _ = build.resolve_attention(self._config, str(folder), values, self._device)
        causal_lm = models.load_causal_lm(str(folder), build.dtype_of(values)).to(self._device)
        return PackedCausalLM(causal_lm, name, build.loss_options(self._config, values, self._device))

    def _note(self, so_far: Sequence[Stage], rate: float) -> None:
        total = spent(so_far)
        self.points.append(
            {"stage": so_far[-1].name, "seconds": total["seconds"], "flops": total["flops"], "rate": rate}
        )


def spent(trained: Sequence[Stage]) -> dict[str, Any]:
    """Seconds and FLOPs of stages, each and together; of all devices together, seconds as the clock has them."""
    rows = {
        stage.name: {
            "steps": len(stage.steps), "samples": len(stage.steps) * stage.samples,
            "seconds": sum(step.seconds for step in stage.steps), "flops": sum(step.flops for step in stage.steps),
        }
        for stage in trained
    }  # fmt: skip
    return {name: sum(row[name] for row in rows.values()) for name in ("seconds", "flops")} | {"stages": rows}


def not_counted(config: RunConfig) -> list[str]:
    """What unlearning does before its first step, which no line of its metrics holds."""
    found = ["memorizing, from which both begin"] * bool(config.memorize.enabled)
    found += ["own answers of --retain_data self"] * (SELF in dict(weighted(config.data.retain_data)))
    return found + ["filling the cached reference"] * (config.engine.reference == "cached")


def unlearning(folder: Path, evaluation: dict[str, Any]) -> dict[str, Any]:
    """Seconds and FLOPs of a finished run's steps, attention and reference included, and its rate by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve, seconds, flops = [], 0.0, 0.0
    rates = {entry["step"]: entry["unlearned"]["rate"] for entry in evaluation["history"]}
    for step in range(len(lines) + 1):
        if step:
            seconds, flops = seconds + lines[step - 1]["step_seconds"], flops + lines[step - 1]["hardware_flops"]
        if step in rates:
            curve.append({"step": step, "seconds": seconds, "flops": flops, "rate": rates[step]})
    return {
        "steps": len(lines), "seconds": seconds, "flops": flops, "curve": curve, "after": evaluation["after"],
        "stop": evaluation["stop"]["reason"],
    }  # fmt: skip
