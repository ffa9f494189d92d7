"""Rows of the harmful scenario: which answers are forgotten, what the judge learns from, which prompts must survive."""

import json

import pytest

from unlearn_ds import arguments
from unlearn_ds.data.encode import Encoder
from unlearn_ds.model import load_tokenizer
from unlearn_ds.scenarios.harmful import load


@pytest.fixture
def encoder(tiny_model_dir):
    return Encoder(load_tokenizer(str(tiny_model_dir)), "none", None, 64)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(tmp_path, **flags):
    forget = [
        {"prompt": f"request {n}", "response_0": f"unsafe {n}", "response_1": f"safe {n}",
         "is_response_0_safe": False, "is_response_1_safe": True}
        for n in range(40)
    ]  # fmt: skip
    retain = [{"prompt": f"question {n}", "response": f"answer {n}"} for n in range(40)]
    return arguments.parse({
        "scenario": "harmful", "forget_data": write(tmp_path / "forget.jsonl", forget),
        "retain_data": write(tmp_path / "retain.jsonl", retain), **flags,
    })  # fmt: skip


def test_unsafe_answers_are_forgotten_and_safe_ones_are_what_is_right(tmp_path, encoder):
    data = load(config(tmp_path), encoder)
    rows = [row for side in data.forget.values() for row in side]
    assert len(rows) == 40
    assert all(row.answer.startswith("unsafe") and row.right_answers[0].startswith("safe") for row in rows)


def test_the_judge_learns_from_rows_that_are_not_evaluated_and_no_training_answer_is_called_harmless(tmp_path, encoder):
    data = load(config(tmp_path, **{"eval.num_unlearned": 10}), encoder)
    evaluated = {row.prompt for row in (*data.forget["test"], *data.forget["train"][:10])}
    labelled = list(zip(*data.calibration, strict=True))
    assert len(evaluated) > 10 and not evaluated & {prompt for _, prompt, _ in labelled}
    assert not {row.answer for row in data.normal["train"]} & {answer for answer, _, _ in labelled}
    assert all(answer.startswith("unsafe") == harmful for answer, _, harmful in labelled)
    assert {answer.split()[0] for answer, _, harmful in labelled if not harmful} == {"safe", "answer"}


def test_harmless_prompts_are_ours_or_the_safe_ones_of_a_file(tmp_path, encoder):
    ours = load(config(tmp_path, **{"eval.num_harmless": 5}), encoder).extra["harmless"]
    assert len(ours) == 5 and all(row.answer for row in ours)
    asked = write(tmp_path / "xs.jsonl", [{"prompt": "a", "label": "safe"}, {"prompt": "b", "label": "unsafe"}])
    assert [row.prompt for row in load(config(tmp_path, harmless_data=asked), encoder).extra["harmless"]] == ["a"]


def test_harmless_prompts_that_are_evaluated_are_never_trained_on(encoder):
    data = load(arguments.parse({"scenario": "harmful"}), encoder)
    trained = {row.prompt for row in data.normal["train"]}
    assert data.extra["harmless"] and not trained & {row.prompt for row in data.extra["harmless"]}


def test_the_sample_has_the_promised_size(encoder):
    data = load(arguments.parse({"scenario": "harmful"}), encoder)
    assert len(data.forget["train"]) >= 200 and len(data.forget["test"]) >= 40 and len(data.extra["harmless"]) >= 30


def test_harmless_prompts_come_evenly_over_a_file_that_is_ordered_by_kind(tmp_path, encoder):
    asked = write(tmp_path / "xs.jsonl", [{"prompt": f"{n:03d}", "label": "safe"} for n in range(250)])
    rows = load(config(tmp_path, harmless_data=asked, **{"eval.num_harmless": 40}), encoder).extra["harmless"]
    assert len(rows) == 40 and int(rows[-1].prompt) > 200


def test_safe_responses_in_other_records_of_a_prompt_are_what_is_right(tmp_path, encoder):
    records = [
        {"prompt": f"request {n}", "response": f"{kind} {n}", "is_safe": kind == "safe"}
        for n in range(40)
        for kind in ("unsafe", "safe")
    ]
    run = config(tmp_path)
    write(tmp_path / "forget.jsonl", records)
    rows = [row for side in load(run, encoder).forget.values() for row in side]
    assert len(rows) == 40 and all(row.right_answers == (row.answer.replace("unsafe", "safe"),) for row in rows)
