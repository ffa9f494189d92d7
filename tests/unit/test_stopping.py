"""Each stop rule on sequences of lines and evaluations, at the edges that a run seldom reaches."""

from __future__ import annotations

import json
import math

import pytest

from unlearn_ds import arguments, stopping
from unlearn_ds.checks import check
from unlearn_ds.config import UsageError, fingerprint, replace

NAN = math.nan
LOSSES = {"forget": "ce", "mismatch": "ce", "retain": "kl"}


def config(rules, **changes):
    flags = {"objective.forget_bound": 0.0, "eval.every": 1, "optim.max_steps": 100}
    return replace(arguments.parse({"stop": rules}), **{**flags, **changes})


def rules_of(rules, said=None, **changes):
    return stopping.Stopping(config(rules, **changes), LOSSES, [].append if said is None else said.append)


def ends(stop, losses, name="loss_forget", first=1):
    """(step, Stop) after which a run with these losses ends; None when it goes on."""
    for step, loss in enumerate(losses, first):
        line = {"step": step, "loss_forget": -1.0, "loss_retain": 0.0, name: loss}
        if fired := stop.after_step(line):
            return step, fired
    return None


def evaluated(step, rate, accuracy=0.9, neutral=20.0, normal=10.0, questions=0.5):
    return {
        "step": step, "unlearned": {"rate": rate}, "unseen": {"rate": 1.0}, "normal": {"perplexity": normal},
        "neutral": {"perplexity": neutral, "accuracy": accuracy, "question_accuracy": questions}, "seconds": 1.0,
    }  # fmt: skip


def shown(stop, *evaluations):
    """What comes back for each evaluation after that of step 0."""
    assert stop.after_evaluation(evaluated(0, 0.7)) is None
    return [stop.after_evaluation(entry) for entry in evaluations]


# The forget loss


def test_a_jump_of_the_forget_loss_plans_the_end_at_one_plus_extra_times_its_step():
    said = []
    stop = rules_of("forget_loss:20", said, **{"stop.patience_steps": 2})
    assert stop.last_step == 100
    assert ends(stop, [-3.0, -21.0, -20.0, -21.0, -22.0]) is None  # 20 is not above 20, and starts the row anew
    assert stop.last_step == 20
    assert said == ["stop        forget_loss asks for the end after step 20"]
    step, fired = ends(stop, [-1.0] * 50, first=6)  # what the loss does afterwards plays no part
    assert step == 20 and fired.rule == "forget_loss" and "at step 5, and 15 more (3 x 5)" in fired.reason


@pytest.mark.parametrize(("extra", "end"), [(0.0, 10), (0.25, 13), (1.1, 21), (3.0, 40)])
def test_a_part_of_a_step_is_a_whole_one(extra, end):
    stop = rules_of("forget_loss:5", **{"stop.extra": extra, "stop.patience_steps": 1})
    assert ends(stop, [-1.0] * 9 + [-6.0] * 60)[0] == end


def test_the_sign_that_descent_gives_the_loss_plays_no_part():
    assert ends(rules_of("forget_loss:5", **{"stop.extra": 0.0}), [1.0, 6.0, 6.0, 6.0])[0] == 4


def test_a_loss_that_is_not_a_number_is_no_jump_and_an_infinite_one_is():
    changes = {"stop.extra": 0.0, "stop.patience_steps": 2}
    assert ends(rules_of("forget_loss:5", **changes), [-6.0, NAN, -6.0, NAN, NAN]) is None
    assert ends(rules_of("forget_loss:5", **changes), [-math.inf, -math.inf])[0] == 2


def test_a_planned_end_beyond_max_steps_is_told_when_planned_and_at_the_end():
    said = []
    stop = rules_of("forget_loss:5", said, **{"optim.max_steps": 10})
    assert ends(stop, [-6.0] * 10) is None and stop.last_step == 10
    assert said == ["stop        forget_loss asks for the end after step 12; --max_steps 10 comes first"]
    assert stop.after_last_step() == "all 10 steps done; forget_loss had asked for 12"


# The KL budget


def test_the_kl_budget_waits_for_a_whole_window_and_takes_its_mean():
    stop = rules_of("kl:0.5", **{"stop.window": 3})
    assert ends(stop, [9.0, 9.0], "loss_retain") is None
    step, fired = ends(rules_of("kl:0.5", **{"stop.window": 3}), [0.0, 0.5, 0.9, 0.1, 0.6], "loss_retain")
    assert step == 5 and fired.rule == "kl" and "drifted" in fired.reason and "0.533" in fired.reason
    assert ends(rules_of("kl:0.5", **{"stop.window": 3}), [0.5] * 20, "loss_retain") is None


def test_a_kl_that_is_not_a_number_neither_hides_nor_makes_a_drift():
    assert ends(rules_of("kl:0.5", **{"stop.window": 3}), [0.6, NAN, 0.6, NAN, 0.6], "loss_retain")[0] == 5
    assert ends(rules_of("kl:0.5", **{"stop.window": 2}), [NAN] * 9, "loss_retain") is None


# Evaluations: the rate, the floor, patience and the best state


def test_the_rate_may_be_exactly_the_one_asked_for():
    higher, exact = shown(rules_of("rate:0.05"), evaluated(1, 0.06), evaluated(2, 0.05))
    assert higher is None and exact.rule == "rate" and "5 %" in exact.reason


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({"accuracy": 0.87}, True),  # 0.9 - 0.87 is 0.03 and a little more in binary
        ({"accuracy": 0.86}, False),
        ({"questions": 0.4}, True),
        ({"questions": 0.39}, False),
        ({"neutral": 22.0}, True),
        ({"neutral": 22.1}, False),
        ({"normal": 11.0}, True),
        ({"normal": 11.1}, False),
        ({"normal": math.inf}, False),
        ({"neutral": NAN}, False),
        ({"accuracy": 1.0, "neutral": 1.0, "normal": 1.0}, True),
    ],
)
def test_each_measure_of_the_floor_holds_up_to_its_limit(changes, holds):
    stop = rules_of("rate:0.05")
    (fired,) = shown(stop, evaluated(1, 0.0, **changes))
    assert (fired is not None) is holds is stop.summary()["floor_held"]
    assert ("no evaluated state holds" not in stop.describe_best()) is holds


@pytest.mark.parametrize("rate", [NAN, None])
def test_a_rate_that_was_not_measured_is_no_low_rate(rate):
    stop = rules_of("rate:0.05,patience:2")
    first, second = shown(stop, evaluated(1, rate), evaluated(2, 0.3))
    assert first is None and second is None and stop.best_step == 2


def test_patience_counts_evaluations_without_a_better_rate_and_those_below_the_floor():
    stop = rules_of("patience:3")
    *before, fired = shown(
        stop, evaluated(1, 0.5), evaluated(2, 0.5), evaluated(3, 0.1, normal=99.0), evaluated(4, 0.4),
        evaluated(5, 0.4), evaluated(6, 0.0, accuracy=0.1), evaluated(7, 0.6),
    )  # fmt: skip
    assert before == [None] * 6
    assert fired.rule == "patience" and "3 evaluations in a row" in fired.reason and "40 % of step 4" in fired.reason
    assert stop.best_step == 4 and stop.summary() == {"best_step": 4, "floor_held": True}


def test_patience_ends_a_run_that_never_holds_the_floor():
    stop = rules_of("patience:2")
    first, second = shown(stop, evaluated(1, 0.0, normal=30.0), evaluated(2, 0.0, normal=20.0))
    assert first is None and "without a state that holds the utility floor" in second.reason
    assert stop.best_step == 2 and "normal perplexity by 90 % too much" in stop.describe_best()


def test_the_best_state_holds_the_floor_first_and_has_the_lowest_rate_then():
    stop = rules_of("patience:9")
    steps = []
    for entry in (
        evaluated(0, 0.7), evaluated(1, 0.0, normal=30.0), evaluated(2, 0.0, normal=20.0), evaluated(3, 0.6),
        evaluated(4, 0.7), evaluated(5, 0.0, normal=11.5), evaluated(6, 0.2), evaluated(7, 0.2),
    ):  # fmt: skip
        stop.after_evaluation(entry)
        steps.append(stop.best_step)
    assert steps == [None, 1, 2, 3, 3, 3, 6, 6]
    assert "step 6 is the best of 7 evaluated states, with a rate of 20 %" in stop.describe_best()


def test_a_best_state_that_is_gone_is_looked_for_anew_from_the_same_floor():
    stop = rules_of("patience:9")
    shown(stop, evaluated(1, 0.1))
    stop.forget_best()
    assert stop.best_step is None
    stop.after_evaluation(evaluated(2, 0.3))
    assert stop.best_step == 2 and stop.summary()["floor_held"]


def test_without_rules_on_evaluations_no_best_state_is_kept():
    stop = rules_of("kl:1")
    assert shown(stop, evaluated(1, 0.0)) == [None]
    assert stop.best_step is None and stop.summary() == {"best_step": None, "floor_held": None}


# Checkpoints


@pytest.mark.parametrize("cut", range(1, 9))
def test_restored_rules_go_on_as_if_nothing_had_happened(cut):
    def play(stop, first, last):
        for step in range(first, last + 1):
            line = {"step": step, "loss_forget": -3.0 * step, "loss_retain": 0.1 * step}
            entry = evaluated(step, 0.5 + 0.1 * (step % 3))
            fired = stop.after_step(line) or stop.after_evaluation(entry)
            if fired:
                return step, fired, stop.state()
        return None

    def fresh():
        settings = {"stop.patience_steps": 1, "stop.extra": 7.0, "stop.window": 4}
        return rules_of("forget_loss:5,kl:5,rate:0.1,patience:6", **settings)

    whole, first = fresh(), fresh()
    for stop in (whole, first):
        stop.after_evaluation(evaluated(0, 0.7))
    assert play(first, 1, cut) is None
    resumed = fresh()
    resumed.restore(json.loads(json.dumps(first.state())))
    assert play(resumed, cut + 1, 30) == play(whole, 1, 30)
    assert resumed.best_step == whole.best_step


def test_a_saved_state_does_not_change_while_the_run_goes_on():
    stop = rules_of("kl:5,patience:9")
    shown(stop, evaluated(1, 0.5))
    saved = stop.state()
    before = json.dumps(saved)
    ends(stop, [0.1] * 3, "loss_retain")
    stop.after_evaluation(evaluated(2, 0.1))
    assert json.dumps(saved) == before


# What is refused


BAD = [
    ("forget_los:20", {}, "--stop: unknown stop rule 'forget_los'. Did you mean 'forget_loss'"),
    ("kl", {}, "takes name:value"),
    ("kl:", {}, "takes name:value"),
    ("kl:much", {}, "got 'kl:much'"),
    ("", {}, "unknown stop rule ''"),
    ("kl:1,kl:2", {}, "names kl twice"),
    ("kl:nan", {}, "finite"),
    ("forget_loss:inf", {}, "finite"),
    ("kl:0", {}, "above 0"),
    ("forget_loss:-20", {}, "above 0"),
    ("rate:5", {}, "fraction"),
    ("rate:-0.1", {}, "fraction"),
    ("patience:0", {}, "whole number"),
    ("patience:1.5", {}, "whole number"),
    ("forget_loss:3", {"objective.forget_bound": 3.0}, "--forget_bound 3 caps the forget loss"),
    ("forget_loss:20", {"objective.forget_bound": 3.0}, "can never be exceeded"),
    ("forget_loss:20", {"objective.eps_forget": 0.0}, "--eps_forget 0"),
    ("kl:1", {"objective.eps_retain": 0.0}, "--eps_retain 0"),
    ("rate:0.1", {"eval.every": 0}, "--eval_every"),
    ("patience:2", {"eval.every": 0}, "--eval_every"),
    ("rate:0.1", {"eval.enabled": False}, "--eval_every"),
    ("rate:0.1", {"eval.every": 100}, "too late"),
    ("kl:1", {"stop.window": 101}, "--stop.window 101 is more than --max_steps 100"),
    ("forget_loss:1", {"stop.patience_steps": 101}, "--stop.patience_steps 101"),
    ("kl:1", {"stop.window": 0}, "--stop.window must be above 0"),
    ("kl:1", {"stop.patience_steps": 0}, "--stop.patience_steps must be above 0"),
    ("kl:1", {"stop.extra": -1.0}, "--stop.extra must not be negative"),
    ("kl:1", {"stop.max_accuracy_drop": -1.0}, "--stop.max_accuracy_drop must not be negative"),
    ("kl:1", {"stop.max_perplexity_rise": NAN}, "--stop.max_perplexity_rise must not be negative"),
]


@pytest.mark.parametrize(("rules", "changes", "message"), BAD, ids=[f"{rules} {changes}" for rules, changes, _ in BAD])
def test_a_rule_that_cannot_act_is_told(rules, changes, message):
    with pytest.raises(UsageError) as raised:
        check(config(rules, **changes))
    assert message in str(raised.value)


def test_what_the_help_shows_is_accepted():
    assert check(config("forget_loss:20, kl:0.5,rate:0.05,patience:3")) is None
    assert check(config("forget_loss:2.9", **{"objective.forget_bound": 3.0})) is None
    assert check(config("kl:1", **{"objective.forget_bound": 3.0, "eval.every": 0})) is None


@pytest.mark.parametrize(
    ("rules", "losses"),
    [
        ("kl:1", {"forget": "ce", "retain": "ce"}),
        ("kl:1", {"forget": "ce"}),
        ("forget_loss:1", {"forget": "other", "retain": "kl"}),
    ],
)
def test_a_rule_without_its_term_in_the_objective_is_refused(rules, losses):
    with pytest.raises(UsageError, match="which the objective ga_mismatch does not have"):
        stopping.Stopping(config(rules), losses, print)


def test_the_evaluation_cadence_decides_the_numbers_only_under_stop_rules():
    assert fingerprint(config("rate:0.1")) != fingerprint(config("rate:0.1", **{"eval.every": 2}))
    assert fingerprint(config("rate:0.1")) != fingerprint(config("rate:0.2"))
