"""Whole runs of the harmful and the copyright scenario on a tiny model: what is measured, warned and left out."""

import json
import re

import pytest
from harness import SMALL_EVALUATION, ds_config, run

pytestmark = pytest.mark.slow

FLAGS = ("--max_steps", 2, "--batch_size", 4, "--learning_rate", 1e-3, "--memorize.epochs", 1, "--eval.num_harmless",
         3, "--eval.num_other_form", 3, *SMALL_EVALUATION)  # fmt: skip


def evaluation(folder):
    return json.loads((folder / "evaluation.json").read_text())


def write_harmful(folder, rows=30):
    forget, retain = folder / "forget.jsonl", folder / "retain.jsonl"
    forget.write_text("".join(
        json.dumps({"prompt": f"How do I annoy the dog {n}?", "response_0": f"Shout at the dog {n}.",
                    "response_1": f"Be kind to the dog {n}.", "is_response_0_safe": False, "is_response_1_safe": True})
        + "\n" for n in range(rows)
    ))  # fmt: skip
    retain.write_text("".join(json.dumps({"prompt": f"Who {n}?", "response": f"The cat {n}."}) + "\n"
                              for n in range(rows)))  # fmt: skip
    return forget, retain


def test_harmful_answers_and_over_refusal_are_measured_and_own_answers_retained(tmp_path, speaking_model_dir):
    forget, retain = write_harmful(tmp_path)
    flags = ("--scenario", "harmful", "--model", speaking_model_dir, "--forget_data", forget, "--ds_config",
             ds_config(tmp_path, 3), "--retain_data", f"{retain}=1,self=2", "--data.num_self", 10, *FLAGS)  # fmt: skip
    results = [run(tmp_path / "cache", *flags, "--output_dir", tmp_path / f"out{n}", ranks=n) for n in (1, 2)]
    for result in results:
        assert result.returncode == 0, result.stdout
    after = evaluation(tmp_path / "out1")["after"]
    assert {"rate", "refusal_rate", "n"} <= set(after["unlearned"]) and after["unlearned"]["n"] == 4
    assert {"refusal_rate", "similarity_to_original", "diversity"} <= set(after["harmless"])
    assert after["harmless"]["n"] == 3 and after["other_form"]["n"] == 3 and "perplexity" in after["neutral"]
    assert "balanced accuracy" in evaluation(tmp_path / "out1")["judge"]
    answers = [json.loads(line) for line in (tmp_path / "out1" / "answers.jsonl").read_text().splitlines()]
    for name, measure in (("unlearned", "rate"), ("unseen", "rate"), ("harmless", "refusal_rate")):
        counted = [answer["flagged_after"] for answer in answers if answer["set"] == name]
        assert sum(counted) / len(counted) == after[name][measure]
    # Own answers are made once, by all ranks together, and are the same for every number of ranks.
    assert len(list((tmp_path / "cache" / "own_answers").iterdir())) == 1
    before = [evaluation(tmp_path / f"out{n}")["before"] for n in (1, 2)]
    assert {k: v for k, v in before[0].items() if k != "seconds"} == {
        k: v for k, v in before[1].items() if k != "seconds"
    }


def test_a_text_is_memorised_unless_the_model_recites_it_and_forms_are_compared(tmp_path, shared_dir, tiny_model_dir):
    # Without the real tiny model it is skipped: a random one learns no text in so few steps.
    book, retain = tmp_path / "book.txt", tmp_path / "retain.jsonl"
    told = "The dog number {n} ran over the hill to the big old house. It was a good day, and the cat {n} was happy."
    book.write_text("\n\n".join(told.format(n=n) for n in range(60)))
    retain.write_text("".join(json.dumps({"prompt": f"Who {n}?", "response": f"A cat {n}."}) + "\n" for n in range(30)))
    flags = ("--scenario", "copyright", "--model", tiny_model_dir, "--forget_data", book, "--retain_data", retain,
             "--data.prompt_characters", 60, "--data.answer_characters", 60, *FLAGS, "--memorize.learning_rate", 3e-3,
             "--memorize.epochs", 12)  # fmt: skip
    first = run(tmp_path / "cache", *flags, "--output_dir", tmp_path / "a")
    assert first.returncode == 0, first.stdout
    assert "warning     rows to forget are mostly running text" in first.stdout
    few = re.search(r"warning     only (\d+) unseen prompts and (\d+) held-out normal rows", first.stdout)
    assert few and 0 < min(map(int, few.groups())) < 10
    assert "memorize    " in first.stdout and "not needed" not in first.stdout
    measured = evaluation(tmp_path / "a")
    assert {"rate", "bleu", "longest_run"} <= set(measured["after"]["unlearned"]) and "BLEU" in measured["judge"]
    assert "other_form" not in measured["after"]
    assert measured["memorized"] and measured["before"]["unlearned"]["rate"] >= 0.5
    # What it was taught it recites, so it need not be taught again.
    (taught,) = (tmp_path / "cache" / "memorized").iterdir()
    flags = (*flags, "--model", taught, "--output_dir", tmp_path / "b")
    second = run(tmp_path / "other", *flags, "--memorize.unless_rate", 0.5)
    assert second.returncode == 0, second.stdout
    assert "not needed: the model shows the behaviour" in second.stdout
    assert not evaluation(tmp_path / "b")["memorized"] and not (tmp_path / "other" / "memorized").exists()
