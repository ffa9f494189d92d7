"""A whole study on a tiny model: interrupted in its second variant, gone on with, left alone once it is finished."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from harness import REPOSITORY, SMALL_EVALUATION, ds_config, environment, finish, metrics, write_data

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny_model_dir):
    """Starts ``launchers/ablate.py`` with flags of its own after the common ones; returns the folder and that."""
    folder = tmp_path_factory.mktemp("ablation")
    forget, retain = write_data(folder)
    flags = [
        "--study", "mismatch", "--model", tiny_model_dir, "--forget_data", forget, "--retain_data", retain,
        "--ds_config", ds_config(folder, 0), "--max_steps", STEPS, "--batch_size", 4, "--learning_rate", 1e-3,
        "--checkpoint.export", "false", "--log.tensorboard", "false", "--log.progress", "false",
        "--output_dir", folder / "out", *SMALL_EVALUATION,
    ]  # fmt: skip

    def start(*more):
        words = [str(word) for word in (*flags, *more)]
        return subprocess.Popen(
            [sys.executable, str(REPOSITORY / "launchers" / "ablate.py"), *words],
            env=environment(folder / "cache"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return folder / "out", start


@pytest.fixture(scope="module")
def interrupted(study):
    """The output of a study that got SIGTERM in the first steps of its second variant."""
    out, start = study
    process = start()
    lines = out / "with-mismatch" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if lines.exists() and lines.read_text():
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    done = finish(process)
    assert done.returncode == 75, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def finished(study, interrupted):
    out, start = study
    first, steps = (out / "ascent-alone" / "metrics.jsonl").read_text(), len(metrics(out / "with-mismatch"))
    done = finish(start())
    assert done.returncode == 0, done.stdout
    assert (out / "ascent-alone" / "metrics.jsonl").read_text() == first
    return done.stdout, steps


def test_a_variant_that_ends_early_stops_the_study_with_its_exit_code_and_says_where_to_look(study, interrupted):
    out, _ = study
    assert "ascent-alone: new" in interrupted and "with-mismatch: new" in interrupted
    assert f"with-mismatch ended with exit code 75: see above, and {out}/with-mismatch." in interrupted
    assert not (out / "comparison.json").exists()
    assert json.loads((out / "ascent-alone" / "evaluation.json").read_text())["after"]


def test_the_same_command_goes_on_with_the_second_variant_and_leaves_the_first_alone(study, finished):
    out, _ = study
    output, steps = finished
    assert 0 < steps < STEPS and f"resume      after step {steps}" in output
    assert "ascent-alone: finished" in output and "with-mismatch: unfinished" in output
    assert [line["step"] for line in metrics(out / "with-mismatch")] == list(range(1, STEPS + 1))


def test_the_comparison_holds_both_variants(study, finished):
    out, _ = study
    written = json.loads((out / "comparison.json").read_text())
    assert written["study"] == "mismatch" and list(written["variants"]) == ["ascent-alone", "with-mismatch"]
    for label, variant in written["variants"].items():
        recorded = json.loads((out / label / "evaluation.json").read_text())
        assert variant["after"] == recorded["after"] and variant["steps"] == STEPS and variant["tokens"] > 0
        assert written["before"]["unlearned"] == recorded["before"]["unlearned"]
    assert [variant["changes"] for variant in written["variants"].values()] == [
        {"objective.eps_mismatch": 0.0}, {"objective.eps_mismatch": 1.0},
    ]  # fmt: skip
    page = (out / "report.html").read_text()
    assert "with mismatch" in page and page.count("<svg") == 6
    table = finished[0][finished[0].rindex("Unlearned prompts (4)") : finished[0].index("*: the best of the variants")]
    assert "hallucinated-answer rate" in table and "multiple-choice accuracy" in table


def test_the_first_variant_is_a_plain_run_without_mismatch(study, finished):
    out, _ = study
    ascent, both = metrics(out / "ascent-alone"), metrics(out / "with-mismatch")
    assert "loss_mismatch" not in ascent[0] and "loss_mismatch" in both[0]
    assert ascent[0]["loss_forget"] == pytest.approx(both[0]["loss_forget"], rel=1e-5)  # same model, rows and order


def test_a_finished_study_runs_nothing(study, finished):
    out, start = study
    done = finish(start())
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(": finished, ") == 2 and "engine" not in done.stdout
    assert f"report      {out}/report.html" in done.stdout


def test_other_settings_are_not_mixed_into_a_study_and_nothing_starts(study, finished):
    out, start = study
    done = finish(start("--max_steps", 3))
    assert done.returncode == 2, done.stdout
    assert f"{out}/ascent-alone holds a run with other settings" in done.stdout and "Traceback" not in done.stdout
    assert len(metrics(out / "ascent-alone")) == STEPS


def test_a_dry_run_says_what_would_be_run_and_runs_nothing(study):
    out, start = study
    done = finish(start("--overwrite", "--dry_run", "--output_dir", out.parent / "never"))
    assert done.returncode == 0, done.stdout
    first, second = [line for line in done.stdout.splitlines() if "launchers/train.py" in line]
    assert "--objective.eps_mismatch=0.0" in first and "--objective.eps_mismatch" not in second
    assert "--checkpoint.overwrite=True" in first and "--checkpoint.overwrite=True" in second
    assert not (out.parent / "never").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--study", "mismach"), "unknown study 'mismach'. Did you mean 'mismatch'?"),
        (("--eval.enabled", "false"), "a study compares evaluations"),
        (("--forget_data", "missing.jsonl"), "no such file: missing.jsonl"),
    ],
)
def test_mistakes_are_told_before_anything_runs(study, flags, said):
    out, start = study
    done = finish(start(*flags, "--output_dir", out.parent / "never"))
    assert done.returncode == 2 and said in done.stdout and "Traceback" not in done.stdout, done.stdout
    assert not (out.parent / "never").exists()
