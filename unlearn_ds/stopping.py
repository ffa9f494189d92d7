"""When a run ends before its last step, and which of its evaluated states is the best.

A rule is a class here and a row in ``registry.STOP_RULES``; ``--stop name:value`` asks for it. The trainer shows
``Stopping`` every line of metrics.jsonl and every evaluation, and ends the run when a ``Stop`` comes back. Every rank
shows it the same numbers, so every rank comes to the same answer. No torch here: ``checks.check`` asks the rules too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from unlearn_ds.config import RunConfig, StopConfig, UsageError, stop_rules
from unlearn_ds.registry import STOP_RULES, resolve


class Stop(NamedTuple):
    """The rule that ends a run, and why in words."""

    rule: str
    reason: str


class Evaluated(NamedTuple):
    """What a rule sees of an evaluation.

    rate: headline rate on the unlearned prompts, a fraction. violation: by how much the utility floor is missed, 0 when
    it holds. improved: it holds, and the rate is lower than that of any state before which held it. best: the lowest
    such rate and its step, None when no state has held the floor.
    """

    rate: float
    violation: float
    improved: bool
    best: tuple[float, int] | None


class Rule:
    """Base of the rules. ``state`` holds plain numbers and travels in checkpoints.

    ``needs``: a term of the objective and its loss that the rule looks at. ``planned_end``: step after which it will
    end the run; infinite until that is known.
    """

    needs: tuple[str, str] | None = None
    evaluates = False
    planned_end = math.inf

    def __init__(self, value: float, settings: StopConfig):
        self.value, self.settings = value, settings
        self.state: dict[str, Any] = {}

    @staticmethod
    def check(value: float, config: RunConfig) -> None:
        """Raise ``UsageError`` when the rule cannot act in this run."""
        raise NotImplementedError

    def after_step(self, line: Mapping[str, Any]) -> str | None:
        """The reason to end after the step of this line of metrics.jsonl."""

    def after_evaluation(self, seen: Evaluated) -> str | None:
        """The reason to end after this evaluation."""


class ForgetLoss(Rule):
    """Once the forget loss has jumped, go on for ``stop.extra`` times the steps it took, then end.

    The paper unlearns 3 to 5 times more batches after the forget loss has risen to an abnormally high level (Yao, Xu,
    Liu, arXiv 2310.10683). The published code compares the negated loss with the threshold, so it never stops.
    """

    needs = ("forget", "ce")

    def __init__(self, value: float, settings: StopConfig):
        super().__init__(value, settings)
        self.state = {"in_a_row": 0, "jumped": None}

    @staticmethod
    def check(value: float, config: RunConfig) -> None:
        bound, patience = config.objective.forget_bound, config.stop.patience_steps
        if not value > 0:
            raise UsageError(f"--stop forget_loss takes a mean NLL a token above 0; got {value:g}.")
        if config.objective.eps_forget == 0:
            raise UsageError("--stop forget_loss looks at the forget term, which --eps_forget 0 leaves out.")
        if 0 < bound <= value:
            raise UsageError(
                f"--stop forget_loss:{value:g} can never be exceeded: --forget_bound {bound:g} caps the forget loss. "
                "Give a value below the bound, or --forget_bound 0."
            )
        if patience > config.optim.max_steps:
            raise UsageError(f"--stop.patience_steps {patience} is more than --max_steps {config.optim.max_steps}.")

    @property
    def planned_end(self) -> float:
        jumped = self.state["jumped"]
        return math.inf if jumped is None else jumped + math.ceil(self.settings.extra * jumped - 1e-9)

    def after_step(self, line: Mapping[str, Any]) -> str | None:
        step, jumped = line["step"], self.state["jumped"]
        if jumped is None:
            # Written with the sign of its weight, negative for ascent; the NLL itself never is. NaN is not above.
            above = abs(line["loss_forget"]) > self.value
            self.state["in_a_row"] = self.state["in_a_row"] + 1 if above else 0
            if self.state["in_a_row"] >= self.settings.patience_steps:
                self.state["jumped"] = jumped = step
        if jumped is None or step < self.planned_end:
            return None
        return (
            f"the forget loss was above {self.value:g} for {_count(self.settings.patience_steps, 'step')} in a row at "
            f"step {jumped}, and {step - jumped} more ({self.settings.extra:g} x {jumped}) are done"
        )


class Kl(Rule):
    """End when the model has drifted: the mean retain KL of the last ``stop.window`` steps is above the budget.

    A step whose KL is NaN tells nothing and is left out.
    """

    needs = ("retain", "kl")

    def __init__(self, value: float, settings: StopConfig):
        super().__init__(value, settings)
        self.state = {"last": []}

    @staticmethod
    def check(value: float, config: RunConfig) -> None:
        window = config.stop.window
        if not value > 0:
            raise UsageError(f"--stop kl takes a KL in nats a token above 0; got {value:g}.")
        if config.objective.eps_retain == 0:
            raise UsageError("--stop kl looks at the retain term, which --eps_retain 0 leaves out.")
        if window > config.optim.max_steps:
            raise UsageError(f"--stop.window {window} is more than --max_steps {config.optim.max_steps}.")

    def after_step(self, line: Mapping[str, Any]) -> str | None:
        if not math.isnan(line["loss_retain"]):
            self.state["last"] = [*self.state["last"], line["loss_retain"]][-self.settings.window :]
        last = self.state["last"]
        mean = sum(last) / max(1, len(last))
        if len(last) < self.settings.window or mean <= self.value:
            return None
        return (
            f"the model has drifted: the mean retain KL of the last {_count(len(last), 'step')}, {mean:.3g}, is above "
            f"the budget of {self.value:g}"
        )


def _check_evaluations(rule: str, config: RunConfig) -> None:
    every, total = config.eval.every, config.optim.max_steps
    if not config.eval.enabled or every == 0:
        raise UsageError(f"--stop {rule} looks at evaluations during the run: give --eval_every N.")
    if every >= total:
        raise UsageError(f"--stop {rule}: --eval_every {every} comes too late for --max_steps {total}.")


class Rate(Rule):
    """End at the first evaluation with a headline rate low enough, provided the utility floor holds."""

    evaluates = True

    @staticmethod
    def check(value: float, config: RunConfig) -> None:
        if not 0 <= value < 1:
            raise UsageError(f"--stop rate takes a fraction from 0 to below 1 (0.05 is 5 %); got {value:g}.")
        _check_evaluations("rate", config)

    def after_evaluation(self, seen: Evaluated) -> str | None:
        if seen.rate > self.value or seen.violation > 0:
            return None
        return f"the rate of {_percent(seen.rate)} is at most {_percent(self.value)} and the utility floor holds"


class Patience(Rule):
    """End after so many evaluations in a row without a better rate among the states that hold the utility floor."""

    evaluates = True

    def __init__(self, value: float, settings: StopConfig):
        super().__init__(value, settings)
        self.state = {"in_a_row": 0}

    @staticmethod
    def check(value: float, config: RunConfig) -> None:
        if value < 1 or value != int(value):
            raise UsageError(f"--stop patience takes a whole number of evaluations from 1; got {value:g}.")
        _check_evaluations("patience", config)

    def after_evaluation(self, seen: Evaluated) -> str | None:
        self.state["in_a_row"] = 0 if seen.improved else self.state["in_a_row"] + 1
        if self.state["in_a_row"] < self.value:
            return None
        evaluations = _count(self.state["in_a_row"], "evaluation")
        if seen.best is None:
            return f"{evaluations} in a row without a state that holds the utility floor"
        rate = f"the {_percent(seen.best[0])} of step {seen.best[1]}"
        return f"{evaluations} in a row without a rate below {rate} that holds the utility floor"


class Best:
    """Keeps account of which evaluated state is the best: the floor holds and the headline rate is the lowest.

    While none holds the floor, the one that violates it least. The state before the first step is what the floor is
    measured from, and no candidate.
    """

    def __init__(self, settings: StopConfig):
        self.settings = settings
        self.state: dict[str, Any] = {"before": None, "count": 0}
        self.forget()

    def forget(self) -> None:
        """Start to look for the best state anew."""
        self.state |= {"step": None, "rate": math.inf, "violation": math.inf, "missed": {}}

    def add(self, result: Mapping[str, Any]) -> Evaluated:
        """Take in an evaluation E of evaluation.json that came after the first step."""
        rate = _known(result["unlearned"]["rate"])
        missed = self._missed(result)
        violation = sum(missed.values())
        best = self.state
        if better := best["step"] is None or (violation, rate) < (best["violation"], best["rate"]):
            best |= {"step": result["step"], "rate": rate, "violation": violation, "missed": missed}
        best["count"] += 1
        held = (best["rate"], best["step"]) if best["violation"] == 0 else None
        return Evaluated(rate, violation, better and violation == 0, held)

    def _missed(self, result: Mapping[str, Any]) -> dict[str, float]:
        """Measure -> how far it is beyond what the floor allows, as a fraction; only those that are."""
        before, settings = self.state["before"], self.settings
        changes = {
            **{
                label: (before["neutral"][key] - result["neutral"][key], allowed)
                for label, key, allowed in (
                    ("neutral accuracy", "accuracy", settings.max_accuracy_drop),
                    ("neutral questions", "question_accuracy", settings.max_question_drop),
                )
            },
            **{
                f"{name} perplexity": (
                    result[name]["perplexity"] / before[name]["perplexity"] - 1, settings.max_perplexity_rise
                )
                for name in ("neutral", "normal")
            },
        }  # fmt: skip
        # A drop from 0.97 to 0.94 is 0.03 and a little more in binary.
        return {name: _known(by - allowed) for name, (by, allowed) in changes.items() if not by <= allowed + 1e-9}

    def describe(self) -> str:
        """Which state is the best, and why, in words."""
        best = self.state
        if not best["missed"]:
            states, rate = _count(best["count"], "evaluated state"), _percent(best["rate"])
            return f"step {best['step']} is the best of {states}, with a rate of {rate} and the utility floor held"
        missed = ", ".join(f"{name} by {_percent(by)} too much" for name, by in best["missed"].items())
        return f"no evaluated state holds the utility floor; step {best['step']} violates it least ({missed})"


class Stopping:
    """The rules of one run: ask after every step and every evaluation.

    losses: term of the objective -> its loss. say: called with a line for the user when the end of the run is planned.
    Raises ``UsageError`` when a rule looks at a term that the objective does not have.
    """

    def __init__(self, config: RunConfig, losses: Mapping[str, str], say: Callable[[str], None]):
        self._max_steps, self._say = config.optim.max_steps, say
        self._rules: dict[str, Rule] = {
            name: resolve("stop rule", name, STOP_RULES)(value, config.stop)
            for name, value in stop_rules(config.stop.rules).items()
        }
        for name, rule in self._rules.items():
            if rule.needs and losses.get(rule.needs[0]) != rule.needs[1]:
                raise UsageError(
                    f"--stop {name} looks at the {rule.needs[1].upper()} of {rule.needs[0]} rows, which the objective "
                    f"{config.objective.name} does not have."
                )
        self._best = Best(config.stop) if any(rule.evaluates for rule in self._rules.values()) else None

    @property
    def last_step(self) -> int:
        """The step after which the run ends, as far as is known."""
        return int(min([self._max_steps, *(rule.planned_end for rule in self._rules.values())]))

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluated state; None when the rules keep none, or none has been evaluated."""
        return self._best.state["step"] if self._best else None

    def after_step(self, line: Mapping[str, Any]) -> Stop | None:
        """``line``: the object of metrics.jsonl."""
        for name, rule in self._rules.items():
            planned = rule.planned_end
            if reason := rule.after_step(line):
                return Stop(name, reason)
            if rule.planned_end != planned:
                first = f"; --max_steps {self._max_steps} comes first" if rule.planned_end > self._max_steps else ""
                self._say(f"stop        {name} asks for the end after step {rule.planned_end:.0f}{first}")
        return None

    def after_last_step(self) -> str:
        """Why the run ends when all steps are done, and which rule had asked for more."""
        asked = {name: rule.planned_end for name, rule in self._rules.items() if rule.planned_end < math.inf}
        more = "".join(f"; {name} had asked for {end:.0f}" for name, end in asked.items())
        return f"all {self._max_steps} steps done{more}"

    def after_evaluation(self, result: Mapping[str, Any]) -> Stop | None:
        """``result``: E of evaluation.json; that of step 0 is what the utility floor is measured from."""
        if self._best is None:
            return None
        if result["step"] == 0:
            self._best.state["before"] = {name: result[name] for name in ("neutral", "normal")}
            return None
        seen = self._best.add(result)
        for name, rule in self._rules.items():
            if reason := rule.after_evaluation(seen):
                return Stop(name, reason)
        return None

    def summary(self) -> dict[str, Any]:
        """What evaluation.json tells of the best state."""
        held = self._best.state["violation"] == 0 if self._best and self.best_step is not None else None
        return {"best_step": self.best_step, "floor_held": held}

    def describe_best(self) -> str:
        """The best evaluated state in words; there must be one."""
        assert self._best is not None and self.best_step is not None
        return self._best.describe()

    def forget_best(self) -> None:
        """The best state is no longer at hand: look for it anew."""
        assert self._best is not None
        self._best.forget()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep for the rules to go on as if nothing had happened."""
        rules = {name: dict(rule.state) for name, rule in self._rules.items()}
        return {"rules": rules, "best": dict(self._best.state) if self._best else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` returned; the rules must be the same."""
        for name, rule in self._rules.items():
            rule.state = dict(state["rules"][name])
        if self._best:
            self._best.state = dict(state["best"])


def _known(value: float | None) -> float:
    """A number to compare by: one that is missing or NaN counts as the worst."""
    return math.inf if value is None or math.isnan(value) else value


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"
