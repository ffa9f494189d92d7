"""An interrupted and resumed run writes the same lines as one that was left alone."""

from __future__ import annotations

import json
import shutil
import signal
import time

import pytest
from harness import SMALL_EVALUATION, ds_config, finish, metrics, run, start, without_measured, write_data

pytestmark = pytest.mark.slow
STEPS, SAVE_EVERY, STOP_AFTER = 12, 4, 5


@pytest.fixture(scope="module")
def flags(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("resume")
    forget, retain = write_data(folder)
    return folder, [
        "--model", tiny_model_dir, "--forget_data", forget, "--retain_data", retain, "--max_steps", STEPS,
        "--ds_config", ds_config(folder, 3, bf16=True), "--batch_size", 4, "--learning_rate", 1e-3,
        "--save_every", SAVE_EVERY, "--checkpoint.export", "false", "--log.tensorboard", "false",
        "--log.progress", "false", *SMALL_EVALUATION,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(flags):
    folder, common = flags
    done = run(folder / "cache", *common, "--output_dir", folder / "whole")
    assert done.returncode == 0, done.stdout
    assert checkpoints(folder / "whole") == [8, 12]
    return folder / "whole"


@pytest.fixture(scope="module")
def stopped(flags):
    """The folder of a run that got SIGTERM soon after its fifth step. Tests that resume take a copy."""
    folder, common = flags
    out = folder / "stopped"
    process = start(folder / "cache", *common, "--output_dir", out)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= STOP_AFTER:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    done = finish(process)
    assert done.returncode == 75, done.stdout
    assert "--resume auto" in done.stdout and "Traceback" not in done.stdout
    return out


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "copy")


def checkpoints(folder):
    """Steps of the checkpoints that were written to the end."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in folder.glob("checkpoints/*/complete.json"))


def evaluation(folder):
    """``evaluation.json`` without the time it took."""
    found = json.loads((folder / "evaluation.json").read_text())
    for entry in (found["before"], found["after"] or {}, *found["history"]):
        entry.pop("seconds", None)
    return found


def test_a_signal_ends_the_run_after_saving(stopped):
    lines = metrics(stopped)
    assert STOP_AFTER <= len(lines) < STEPS
    assert checkpoints(stopped)[-1] == len(lines)
    found = evaluation(stopped)
    assert found["before"] and found["after"] is None
    assert found["stop"]["exit_code"] == 75 and found["stop"]["step"] == len(lines)


def test_resume_continues_bit_identically(flags, uninterrupted, copy):
    folder, common = flags
    before = len(metrics(copy))
    done = run(folder / "cache", *common, "--output_dir", copy, "--resume", "auto")
    assert done.returncode == 0, done.stdout
    assert f"resume      after step {before}" in done.stdout
    assert without_measured(metrics(copy)) == without_measured(metrics(uninterrupted))
    assert evaluation(copy) == evaluation(uninterrupted)
    assert (copy / "answers.jsonl").read_text() == (uninterrupted / "answers.jsonl").read_text()


def test_a_checkpoint_that_was_not_written_to_the_end_is_passed_over(flags, uninterrupted, copy):
    folder, common = flags
    older, newest = checkpoints(copy)
    (copy / "checkpoints" / f"step-{newest:06d}" / "complete.json").unlink()
    (copy / "checkpoints" / "step-000099").mkdir()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": ')  # a line that a crash has cut
    # How often is measured may change between a run and its continuation.
    done = run(folder / "cache", *common, "--output_dir", copy, "--resume", "auto", "--eval.every", 3)
    assert done.returncode == 0, done.stdout
    assert f"resume      after step {older}" in done.stdout
    assert without_measured(metrics(copy)) == without_measured(metrics(uninterrupted))


def test_resuming_with_another_learning_rate_is_refused_by_name(flags, copy):
    folder, common = flags
    before = (copy / "config.json").read_text()
    done = run(folder / "cache", *common, "--learning_rate", 0.5, "--output_dir", copy, "--resume", "auto")
    assert done.returncode == 2, done.stdout
    assert "optim.learning_rate" in done.stdout and "Traceback" not in done.stdout
    assert (copy / "config.json").read_text() == before


def test_resuming_with_another_number_of_ranks_is_refused(flags, copy):
    folder, common = flags
    before = (copy / "config.json").read_text()
    done = run(folder / "cache", *common, "--output_dir", copy, "--resume", "auto", ranks=2)
    assert "1 rank" in done.stdout and "has 2" in done.stdout
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stdout
    assert (copy / "config.json").read_text() == before  # a refused run leaves the folder as it was
