"""Rows of the harmful scenario: which answers are forgotten, what the judge learns from, which prompts must survive."""

import json

import pytest

from unlearn_ds import arguments, build
from unlearn_ds.config import UsageError
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
    evaluated = {row.prompt for row in (*data.forget["test"], *data.unlearned(10))}
    labelled = list(zip(*data.calibration, strict=True))
    assert len(evaluated) > 10 and not evaluated & {prompt for _, prompt, _ in labelled}
    assert not {row.answer for row in data.normal["train"]} & {answer for answer, _, _ in labelled}
    assert all(answer.startswith("unsafe") == harmful for answer, _, harmful in labelled)
    assert {answer.split()[0] for answer, _, harmful in labelled if not harmful} == {"safe", "answer"}


def test_prompts_with_several_answers_are_on_one_side_and_asked_once(tmp_path, encoder):
    """PKU-SafeRLHF and BeaverTails answer most prompts several times."""
    rows = [
        {"prompt": f"request {n}", "response_0": f"unsafe {n} {k}", "response_1": f"safe {n} {k}",
         "is_response_0_safe": False, "is_response_1_safe": True}
        for n in range(120) for k in range(1 + 3 * (n % 2))
    ]  # fmt: skip
    flags = {"forget_data": write(tmp_path / "several.jsonl", rows), "eval.num_unlearned": 20}
    data = load(config(tmp_path, **flags), encoder)
    trained, unseen = ({row.prompt for row in data.forget[side]} for side in ("train", "test"))
    assert unseen and not trained & unseen
    asked = [row.prompt for row in data.unlearned(20)]
    assert len(set(asked)) == len(asked) == 20
    assert data.calibration.prompts and not {*asked, *unseen} & {*data.calibration.prompts}


def test_what_is_evaluated_as_unlearned_is_what_a_run_trains_on_first(tmp_path, encoder):
    run = config(tmp_path, seed=3, batch_size=4)
    data = load(run, encoder)
    loader = build.loader(run, encoder, data, data.forget["train"])
    forget = next(n for n, term in enumerate(loader.terms) if term.name == "forget")
    units = [unit for step in range(3) for part in loader.global_batch(step) for unit in part]
    trained = [row for unit in units for n, row in unit if n == forget]
    assert len(trained) == 12 and {row.key for row in trained} == {
        row.key for row in encoder.encode_all(data.unlearned(12))
    }


def test_a_file_of_harmless_prompts_without_any_is_an_error(tmp_path, encoder):
    asked = write(tmp_path / "xs.jsonl", [{"prompt": "b", "label": "unsafe"}])
    with pytest.raises(UsageError, match="no prompt to ask"):
        load(config(tmp_path, harmless_data=asked), encoder)


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
