"""An interrupted and resumed run writes the same lines as one that was left alone."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest
from harness import command, ds_config, environment, metrics, run, without_measured, write_data

pytestmark = pytest.mark.slow
STEPS = 8


@pytest.fixture(scope="module")
def flags(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("resume")
    forget, retain = write_data(folder)
    return folder, [
        "--model", tiny_model_dir, "--forget_data", forget, "--retain_data", retain, "--max_steps", STEPS,
        "--ds_config", ds_config(folder, 3, bf16=True), "--batch_size", 4, "--learning_rate", 1e-3, "--eval.enabled",
        "false", "--log.tensorboard", "false", "--log.progress", "false",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(flags):
    folder, common = flags
    done = run(folder / "cache", *common, "--output_dir", folder / "whole")
    assert done.returncode == 0, done.stdout
    return metrics(folder / "whole")


@pytest.fixture(scope="module")
def stopped(flags):
    """A run that got SIGTERM after its third step; returns its folder and output."""
    folder, common = flags
    out = folder / "stopped"
    process = subprocess.Popen(
        command(*common, "--output_dir", out), env=environment(folder / "cache"), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= 2:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    return out


def test_a_signal_ends_the_run_after_saving_and_resume_continues_bit_identically(flags, uninterrupted, stopped):
    folder, common = flags
    before = metrics(stopped)
    assert 0 < len(before) < STEPS
    assert [path.name for path in (stopped / "checkpoints").glob("step-*")] == [f"step-{len(before):06d}"]
    # A checkpoint whose marker is missing was interrupted while it was written.
    (stopped / "checkpoints" / "step-000099").mkdir()
    done = run(folder / "cache", *common, "--output_dir", stopped, "--resume", "auto")
    assert done.returncode == 0, done.stdout
    assert f"resume      after step {len(before)}" in done.stdout
    assert without_measured(metrics(stopped)) == without_measured(uninterrupted)


def test_resuming_with_another_learning_rate_is_refused_by_name(flags, stopped):
    folder, common = flags
    done = run(folder / "cache", *common, "--learning_rate", 0.5, "--output_dir", stopped, "--resume", "auto")
    assert done.returncode == 2
    assert "optim.learning_rate" in done.stdout


def test_a_model_that_diverges_is_never_updated_and_ends_with_3(flags):
    folder, common = flags
    out = folder / "diverged"
    done = run(
        folder / "cache", *common, "--ds_config", ds_config(folder, 0), "--output_dir", out, "--learning_rate", 1e18,
        "--gradient_clipping", 0, "--warmup_ratio", 0, "--reference", "resident",
    )  # fmt: skip
    assert done.returncode == 3, done.stdout
    lines = metrics(out)
    assert [line["skipped"] for line in lines[-3:]] == [True] * 3
    assert "not finite" in done.stdout and (out / "checkpoints").is_dir()
