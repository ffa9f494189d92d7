"""Stop rules by what real runs do: when they end, what they say, and which weights they leave."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from harness import SMALL_EVALUATION, as_if_killed, ds_config, metrics, run, without_measured, write_data
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
JUMP, PATIENCE_STEPS, EXTRA = 8.0, 2, 3
EVALUATION = (*SMALL_EVALUATION, "--eval.num_unlearned", 20)
NOTHING_WRITTEN = ("--log.tensorboard", "false", "--checkpoint.export", "false", "--eval.enabled", "false")
UNTOUCHED_ACCURACY = ("--stop.max_accuracy_drop", 1)  # four choices are too few to tell a drop


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_dir):
    """trained(name, *flags) -> folder and output of a finished run; its learning rate does not hang on max_steps."""
    folder = tmp_path_factory.mktemp("stop")
    forget, retain = write_data(folder)
    common = [
        "--forget_data", forget, "--retain_data", retain, "--schedule", "constant", "--warmup_ratio", 0,
        "--batch_size", 4, "--log.progress", "false", "--ds_config", ds_config(folder, 3),
    ]  # fmt: skip

    def finished(name, *flags, model=tiny_model_dir, ranks=0):
        done = run(folder / "cache", *common, "--model", model, "--output_dir", folder / name, *flags, ranks=ranks)
        assert done.returncode == 0, done.stdout
        return folder / name, done.stdout

    return finished


@pytest.fixture(scope="module")
def memorized(trained):
    """A model that gives the wrong answers, so that there is a rate to bring down."""
    settings = ("--memorize", "--memorize.epochs", 25, "--memorize.batch_size", 16, "--memorize.learning_rate", 1e-2)
    folder, _ = trained("memorized", *settings, *NOTHING_WRITTEN, "--max_steps", 1)
    (found,) = folder.parent.glob("cache/memorized/*/config.json")
    return found.parent


def evaluation(folder):
    """``evaluation.json`` without the time it took."""
    found = json.loads((folder / "evaluation.json").read_text())
    for entry in (found["before"], found["after"], *found["history"]):
        entry.pop("seconds", None)
    return found


def stop_of(folder):
    return json.loads((folder / "evaluation.json").read_text())["stop"]


def rewound(folder, copy, step):
    """A copy of a run as it was when its checkpoint of ``step`` was the newest."""
    shutil.copytree(folder, copy)
    as_if_killed(copy, step)
    assert (copy / "checkpoints" / f"step-{step:06d}" / "complete.json").exists()
    return copy


def jump(lines):
    """The step at which the forget loss has been above ``JUMP`` for long enough, from metrics.jsonl."""
    above = [-line["loss_forget"] > JUMP for line in lines]
    return next(n for n in range(1, len(above) + 1) if n >= PATIENCE_STEPS and all(above[n - PATIENCE_STEPS : n]))


# The forget loss


ASCENT = (
    *NOTHING_WRITTEN, "--learning_rate", 3e-3, "--stop.patience_steps", PATIENCE_STEPS, "--stop.extra", EXTRA,
)  # fmt: skip
SAVING = ("--save_every", 1, "--checkpoint.keep", 99)


@pytest.fixture(scope="module")
def jumped(trained):
    return trained("jumped", *ASCENT, *SAVING, "--max_steps", 60, "--stop", f"forget_loss:{JUMP},kl:1000")


def test_a_forget_loss_that_jumps_ends_the_run_at_one_plus_extra_times_that_step(jumped):
    folder, output = jumped
    lines = metrics(folder)
    step = jump(lines)
    assert -lines[0]["loss_forget"] < JUMP  # it was low before it rose
    assert len(lines) == (1 + EXTRA) * step < 60
    stop = stop_of(folder)
    assert (stop["step"], stop["rule"], stop["exit_code"], stop["best_step"]) == (len(lines), "forget_loss", 0, None)
    assert f"at step {step}, and {EXTRA * step} more ({EXTRA} x {step}) are done" in stop["reason"]
    assert f"end         step {len(lines)}: {stop['reason']}" in output
    assert f"stop        forget_loss asks for the end after step {len(lines)}\n" in output
    assert stop["reason"] in (folder / "report.html").read_text()


def test_resuming_between_the_jump_and_the_planned_end_comes_to_the_same_end(trained, jumped, tmp_path):
    whole = metrics(jumped[0])
    step = jump(whole) + 1
    copy = rewound(jumped[0], tmp_path / "copy", step)
    _, output = trained(
        copy, *ASCENT, *SAVING, "--max_steps", 60, "--stop", f"forget_loss:{JUMP},kl:1000", "--resume", "auto"
    )
    assert f"resume      after step {step}" in output
    assert without_measured(metrics(copy)) == without_measured(whole)
    assert stop_of(copy) == stop_of(jumped[0])


def test_max_steps_holds_in_the_middle_of_a_pass_and_of_what_a_rule_asked_for(trained, jumped):
    total = jump(metrics(jumped[0])) + 2
    folder, output = trained("short", *ASCENT, "--max_steps", total, "--stop", f"forget_loss:{JUMP}")
    planned = (1 + EXTRA) * (total - 2)
    assert len(metrics(folder)) == total < planned
    rows = int(output.partition("rows        ")[2].split()[0])
    assert total * 4 % rows  # the last step ends no pass over the forget rows
    stop = stop_of(folder)
    assert stop["rule"] == "max_steps"
    assert stop["reason"] == f"all {total} steps done; forget_loss had asked for {planned}"
    assert f"after step {planned}; --max_steps {total} comes first" in output


# The KL budget


def test_a_run_ends_once_the_mean_kl_of_the_window_is_above_the_budget(trained, jumped):
    window = 3
    kl = [line["loss_retain"] for line in metrics(jumped[0])]
    means = [sum(kl[n - window : n]) / window for n in range(window, len(kl) + 1)]
    budget = (means[0] + max(means)) / 2
    expected = window + next(n for n, mean in enumerate(means) if mean > budget)
    flags = [*ASCENT, "--max_steps", 60, "--stop.window", window, "--stop", f"kl:{budget}"]
    folder, _ = trained("kl", *flags)
    assert window < expected == len(metrics(folder))
    stop = stop_of(folder)
    assert stop["rule"] == "kl" and "the model has drifted" in stop["reason"] and stop["exit_code"] == 0


# The rate and its floor


def test_a_rate_that_is_low_enough_ends_the_run_at_that_evaluation(trained, memorized):
    target, most = 0.1, 0.5
    folder, output = trained(
        "rate", *EVALUATION, "--learning_rate", 5e-4, "--max_steps", 20, "--eval_every", 1, "--stop", f"rate:{target}",
        "--stop.max_perplexity_rise", most, *UNTOUCHED_ACCURACY, model=memorized,
    )  # fmt: skip
    found = evaluation(folder)
    before, *between, last = found["history"]
    assert before["step"] == 0 and between and found["after"] == last
    for entry in (before, *between):
        assert entry["unlearned"]["rate"] > target
    assert last["unlearned"]["rate"] <= target
    for name in ("neutral", "normal"):
        assert last[name]["perplexity"] <= (1 + most) * before[name]["perplexity"]
    stop = found["stop"]
    assert (stop["rule"], stop["floor_held"], stop["best_step"]) == ("rate", True, last["step"])
    assert stop["step"] == last["step"] == len(metrics(folder)) < 20
    assert output.count("evaluate    ") == len(found["history"])  # the last state is not measured twice
    card = (folder / "model" / "README.md").read_text()
    assert f"Training ended after step {stop['step']}: {stop['reason']}." in card


FLOOR = (
    *EVALUATION, *SAVING, "--learning_rate", 1e-2, "--eps_retain", 0, "--max_steps", 8, "--eval_every", 2, "--stop",
    "rate:0.99", "--stop.max_perplexity_rise", 0, *UNTOUCHED_ACCURACY,
)  # fmt: skip


@pytest.fixture(scope="module")
def floored(trained, memorized):
    return trained("floored", *FLOOR, model=memorized)


def test_a_rate_without_the_utility_floor_goes_on_and_ends_with_the_least_violation(floored):
    folder, output = floored
    found = evaluation(folder)
    before, *states = found["history"]
    assert [entry["step"] for entry in states] == [2, 4, 6, 8]
    assert all(entry["unlearned"]["rate"] <= 0.99 for entry in states)

    def violation(entry):
        rises = [entry[name]["perplexity"] / before[name]["perplexity"] - 1 for name in ("neutral", "normal")]
        return sum(max(0.0, rise) for rise in rises)

    least = min(states, key=violation)
    assert violation(least) > 0
    stop = found["stop"]
    assert (stop["step"], stop["rule"], stop["best_step"], stop["floor_held"]) == (8, "max_steps", least["step"], False)
    assert f"no evaluated state holds the utility floor; step {least['step']} violates it least" in stop["reason"]
    assert found["after"] == least
    assert "end         step 8: all 8 steps done" in output
    assert stop["reason"] in (folder / "report.html").read_text()


def test_resuming_a_run_that_keeps_its_best_state_comes_to_the_same_end(trained, memorized, floored, tmp_path):
    copy = rewound(floored[0], tmp_path / "copy", 4)
    _, output = trained(copy, *FLOOR, "--resume", "auto", model=memorized)
    assert "resume      after step 4" in output
    assert evaluation(copy) == evaluation(floored[0])
    for name in ("answers.jsonl", "model/model.safetensors"):
        assert (copy / name).read_bytes() == (floored[0] / name).read_bytes(), name


# Patience and the best state


@pytest.mark.dist
def test_patience_ends_the_run_and_the_best_state_is_what_is_exported(trained, memorized):
    """On two ranks, where only the main one has judged the answers."""
    patience = 2
    flags = ["--batch_size", 2, "--learning_rate", 2e-3]
    folder, output = trained(
        "patience", *flags, *EVALUATION, "--max_steps", 20, "--eval_every", 2, "--stop",
        f"patience:{patience}", "--stop.max_perplexity_rise", 3, *UNTOUCHED_ACCURACY, model=memorized, ranks=2,
    )  # fmt: skip
    found = evaluation(folder)
    before, *states = found["history"]
    best, waited = None, 0
    for entry in states:
        assert waited < patience
        held = all(entry[name]["perplexity"] <= 4 * before[name]["perplexity"] for name in ("neutral", "normal"))
        better = held and (best is None or entry["unlearned"]["rate"] < best["unlearned"]["rate"])
        best, waited = (entry, 0) if better else (best, waited + 1)
    stop = found["stop"]
    assert waited == patience and stop["rule"] == "patience" and stop["step"] == states[-1]["step"]
    assert stop["best_step"] == best["step"] == stop["step"] - 2 * patience and stop["floor_held"]
    assert [path.name for path in folder.glob("best/step-*")] == [f"step-{best['step']:06d}"]
    assert found["after"] == best
    assert f"{stop['reason'].split('; ')[1]}: back to it" in output

    flags += ["--max_steps", best["step"], "--eval.enabled", "false"]
    straight, _ = trained("straight", *flags, model=memorized, ranks=2)
    exported, expected = (load_file(path / "model" / "model.safetensors") for path in (folder, straight))
    assert exported.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(exported[name], weight), name
