"""One whole run: what it writes, and that the exported model is the one that was evaluated."""

from __future__ import annotations

import json

import pytest
from harness import SMALL_EVALUATION, metrics, run, says_what_was_recorded, write_data
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
WEIGHTS = {"forget": 0.5, "mismatch": 0.25, "retain": 2.0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("run")
    forget, retain = write_data(folder)
    flags = [
        "--scenario", "hallucination", "--model", tiny_model_dir, "--forget_data", forget, "--retain_data", retain,
        "--max_steps", 4, "--batch_size", 4, "--eval_every", 2, "--memorize", "--memorize.epochs", 1,
        "--learning_rate", 1e-3, *(word for name, w in WEIGHTS.items() for word in (f"--eps_{name}", w)),
        *SMALL_EVALUATION,
    ]  # fmt: skip
    done = run(folder / "cache", *flags, "--output_dir", folder / "out", ranks=1, launched=True)
    assert done.returncode == 0, done.stdout
    return folder, flags, done.stdout


def test_the_folder_holds_what_the_readme_lists(finished):
    out = finished[0] / "out"
    for name in ("config.json", "rejected.jsonl", "answers.jsonl", "report.html", "model/README.md",
                 "model/model.safetensors", "model/tokenizer_config.json"):  # fmt: skip
        assert (out / name).exists(), name
    assert list((out / "tensorboard").iterdir())
    config = json.loads((out / "config.json").read_text())
    assert config["scenario"] == "hallucination" and config["versions"]["deepspeed"]


def test_each_step_is_one_line_whose_loss_is_the_weighted_sum_of_its_terms(finished):
    lines = metrics(finished[0] / "out")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["loss"] == pytest.approx(sum(w * line[f"loss_{name}"] for name, w in WEIGHTS.items()))
        assert line["loss_forget"] < 0 < line["loss_mismatch"]
        assert line["response_tokens"] < line["tokens"] and line["mfu"] is None
        assert line["response_tokens"] == sum(line[f"response_tokens_{name}"] for name in WEIGHTS)
        assert {"grad_norm", "lr", "tokens_per_second", "step_seconds", "tflops_per_device"} <= line.keys()


def test_evaluation_has_the_documented_shape(finished):
    evaluation = json.loads((finished[0] / "out" / "evaluation.json").read_text())
    assert {"scenario", "headline", "judge", "before", "after", "history"} <= evaluation.keys()
    assert [entry["step"] for entry in evaluation["history"]] == [0, 2, 4]
    assert evaluation["memorized"] is True and evaluation["stop"]["exit_code"] == 0
    for side in ("before", "after"):
        found = evaluation[side]
        assert {"rate", "n", "nll"} <= found["unlearned"].keys() & found["unseen"].keys()
        assert {"perplexity", "similarity_to_original"} <= found["normal"].keys()
        assert {"perplexity", "accuracy", "question_accuracy"} <= found["neutral"].keys()


def test_no_third_party_warning_reaches_the_user(finished):
    noise = [line for line in finished[2].splitlines() if "arning" in line or "WARN" in line]
    # Ours: the tiny model knows none of the answers, and of 40 rows few are held out.
    ours = ("warning     no prompt shows the behaviour", "warning     only ")
    assert all(line.startswith(ours) for line in noise)


def test_the_exported_model_generates_what_the_last_evaluation_recorded(finished):
    out = finished[0] / "out"
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 5 * 4
    recorded = json.loads((out / "evaluation.json").read_text())
    for name in ("unlearned", "unseen"):
        for when in ("before", "after"):
            flags = [answer[f"flagged_{when}"] for answer in answers if answer["set"] == name]
            assert sum(flags) / len(flags) == recorded[when][name]["rate"]
    for when in ("before", "after"):
        right = [answer[f"flagged_{when}"] for answer in answers if answer["set"] == "neutral"]
        assert sum(right) / len(right) == recorded[when]["neutral"]["question_accuracy"]
    assert says_what_was_recorded(out)


def test_two_ranks_measure_the_same_and_the_memorized_model_comes_from_the_cache(finished):
    folder, flags, _ = finished
    done = run(
        folder / "cache", *flags, "--max_steps", 1, "--eval_every", 0, "--output_dir", folder / "two", ranks=2
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    one, two = (json.loads((folder / n / "evaluation.json").read_text())["before"] for n in ("out", "two"))
    assert "taken from" in done.stdout
    for evaluation in (one, two):
        evaluation.pop("seconds")
    assert two == one
    whole, exported = (AutoModelForCausalLM.from_pretrained(folder / n / "model").state_dict() for n in ("out", "two"))
    assert {name: x.shape for name, x in exported.items()} == {name: x.shape for name, x in whole.items()}
