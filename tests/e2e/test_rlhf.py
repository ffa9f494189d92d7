"""RLHF for real, by TRL: a few steps beside ``throughput.py``, and a whole small experiment on two ranks."""

from __future__ import annotations

import json

import pytest
from harness import SMALL_EVALUATION, finish, start, write_data

PNG = b"\x89PNG"
STAGES = ("sft", "reward model", "ppo")


def words(folder, tiny_model_dir):
    forget, retain = write_data(folder)
    return (
        folder / "cache", "--scenario", "hallucination", "--model", tiny_model_dir, "--forget_data", forget,
        "--retain_data", retain, "--batch_size", 4, "--log.progress", "false", *SMALL_EVALUATION,
    )  # fmt: skip


@pytest.mark.slow
def test_a_few_steps_of_each_stage_are_scaled_to_published_samples(tmp_path, tiny_model_dir):
    process = start(
        *words(tmp_path, tiny_model_dir), "--output_dir", tmp_path / "out", "--steps", 3, "--max_steps", 50,
        "--measure_rlhf", launcher="throughput.py",
    )  # fmt: skip
    result = finish(process)
    assert result.returncode == 0, result.stdout
    found = json.loads((tmp_path / "out" / "throughput.json").read_text())
    rlhf = found["rlhf_measured"]
    assert tuple(rlhf["stages"]) == STAGES
    assert [rlhf["stages"][name]["samples"] for name in STAGES] == [132_146, 264_292, 264_292]
    for row in rlhf["stages"].values():
        assert row["steps"] == 3 and row["flops"] == row["samples"] * row["flops_a_sample"] > 0 < row["seconds"]
    assert rlhf["flops"] == sum(row["flops"] for row in rlhf["stages"].values()) > found["flops"]
    assert "of RLHF's FLOPs" in result.stdout and "Traceback" not in result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert any("reward model" in line for line in lines) and max(map(len, lines)) <= 80
    assert not list((tmp_path / "out").glob("tmp*"))


@pytest.mark.slow
@pytest.mark.dist
def test_both_start_from_one_model_and_are_counted_to_the_same_rate(tmp_path, tiny_model_dir):
    words_of_run = (
        *words(tmp_path, tiny_model_dir), "--output_dir", tmp_path / "out", "--max_steps", 3, "--memorize.enabled",
        "true", "--memorize.epochs", 1, "--rlhf.ask_every", 2, "--eval.every", 1,
    )  # fmt: skip
    result = finish(start(*words_of_run, ranks=2, launcher="against_rlhf.py"))
    assert result.returncode == 0, result.stdout
    found = json.loads((tmp_path / "out" / "rlhf.json").read_text())
    mine, rlhf = found["unlearning"], found["rlhf"]
    assert mine["steps"] == 3 and [point["step"] for point in mine["curve"]] == [0, 1, 2, 3]
    lines = (tmp_path / "out" / "unlearning" / "metrics.jsonl").read_text().splitlines()
    assert mine["flops"] == pytest.approx(sum(json.loads(line)["hardware_flops"] for line in lines))
    # Demonstrations hold normal rows too, at most as many again.
    steps = {name: row["steps"] for name, row in rlhf["stages"].items()}
    assert tuple(steps) == STAGES and steps["reward model"] < steps["sft"] <= 2 * steps["reward model"]
    assert rlhf["flops"] == pytest.approx(sum(row["flops"] for row in rlhf["stages"].values()))
    spent = [point["flops"] for point in rlhf["curve"]]
    assert spent == sorted(spent) and rlhf["curve"][0]["rate"] == mine["curve"][0]["rate"]
    reached = rlhf["curve"][-1]["rate"] <= mine["after"]["unlearned"]["rate"]
    assert reached or steps["ppo"] == steps["reward model"]
    assert steps["ppo"] == steps["reward model"] or steps["ppo"] % 2 == 0
    assert rlhf["after"].keys() == found["before"].keys()
    assert (tmp_path / "out" / "rlhf.png").read_bytes().startswith(PNG)
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert any("reward model" in line for line in lines) and max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--scenario", "harmful", "--rlhf.ppo", "3"], "unknown flag --rlhf.ppo; did you mean --rlhf.ppo_"),
        (["--scenario", "harmfull"], "harmful"),
        (["--help"], "--rlhf.ppo_learning_rate"),
    ],
)
def test_mistakes_and_help_need_no_model(tmp_path, flags, told):
    result = finish(start(tmp_path, *flags, launcher="against_rlhf.py"))
    assert result.returncode == (0 if "--help" in flags else 2) and told in result.stdout
