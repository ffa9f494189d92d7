"""Mistakes of a user: exit code 2, one sentence to act on, no traceback, before any model is loaded."""

from __future__ import annotations

import json
import time

import pytest
from harness import run, write_data

pytestmark = pytest.mark.slow


def fails(cache, *flags, seconds=30):
    """Run, check the manner of the failure, and return the message."""
    began = time.monotonic()
    done = run(cache, *flags)
    assert done.returncode == 2, done.stdout
    assert time.monotonic() - began < seconds
    assert "Traceback" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--scenario", "halucination"], "hallucination"),
        (["--learning_rat", "1"], "learning_rate"),
        (["--preset", "opt-1.3"], "opt-1.3b"),
        (["--ds_config", "zero33"], "zero3"),
        (["--max_steps", "many"], "whole number"),
        (["--forget_data", "nowhere.jsonl", "--retain_data", "nowhere.csv"], "no such file"),
        (["--model", "./nowhere"], "no such folder"),
        (["surprise"], "surprise"),
    ],
)
def test_a_wrong_flag_is_told_with_the_nearest_right_one(tmp_path, flags, expected):
    assert expected in fails(tmp_path, *flags, "--output_dir", tmp_path / "out", seconds=10)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "expected"),
    [({"elasticity": {}}, "removed"), ({"gradient_clipping": 1.0}, "--gradient_clipping"),
     ({"zero_optimization": {"stage": "auto"}}, "auto")],
)  # fmt: skip
def test_a_deepspeed_json_with_a_bad_key_is_refused(tmp_path, values, expected):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    assert expected in fails(tmp_path, "--ds_config", path, seconds=10)


def test_an_output_folder_of_another_run_is_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert "--resume auto" in fails(tmp_path, "--output_dir", out)
    (out / "config.json").rename(out / "notes.txt")
    assert "no run of this program" in fails(tmp_path, "--output_dir", out, "--overwrite")
    assert (out / "notes.txt").exists()


def test_too_many_unusable_rows_stop_the_run_and_are_written_down(tmp_path, tiny_model_dir):
    forget, retain = write_data(tmp_path)
    with forget.open("a") as file:
        file.writelines(
            json.dumps({"question": "", "right_answer": "a", "hallucinated_answer": "b"}) + "\n" for _ in "12345678"
        )
    message = fails(
        tmp_path, "--model", tiny_model_dir, "--forget_data", forget, "--retain_data", retain,
        "--output_dir", tmp_path / "out", seconds=60,
    )  # fmt: skip
    assert "8 empty prompt" in message and "max_rejected" in message
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in rejected] == ["empty prompt"] * 8


def test_forget_rows_without_right_answers_cannot_be_measured(tmp_path, tiny_model_dir):
    _, retain = write_data(tmp_path)
    flags = ["--model", tiny_model_dir, "--forget_data", retain, "--retain_data", retain]
    message = fails(tmp_path, *flags, "--output_dir", tmp_path / "out", seconds=60)
    assert "right answer" in message


def test_help_and_dry_run_answer_without_training(tmp_path, tiny_model_dir):
    done = run(tmp_path, "--help")
    assert done.returncode == 0 and "--forget_bound" in done.stdout
    done = run(tmp_path, "--dry_run", "--model", tiny_model_dir, "--output_dir", tmp_path / "out")
    assert done.returncode == 0 and "memory plan" in done.stdout and not (tmp_path / "out").exists()
