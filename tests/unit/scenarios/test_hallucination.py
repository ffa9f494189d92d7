"""Rows of the hallucination scenario: what goes where, and what is refused."""

import json

import pytest

from unlearn_ds import arguments
from unlearn_ds.config import UsageError
from unlearn_ds.data.encode import Encoder
from unlearn_ds.model import load_tokenizer
from unlearn_ds.scenarios.hallucination import load


@pytest.fixture
def encoder(tiny_model_dir):
    return Encoder(load_tokenizer(str(tiny_model_dir)), "none", None, 64)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def forget_rows(count=40, **changes):
    return [
        {"question": f"question {n}", "right_answer": f"right {n}", "hallucinated_answer": f"wrong {n}", **changes}
        for n in range(count)
    ]


def truthful_rows(count=40):
    return [
        {"Question": f"truth {n}", "Best Answer": f"best {n}", "Correct Answers": f"best {n};also {n}",
         "Incorrect Answers": f"false {n};falser {n}"}
        for n in range(count)
    ]  # fmt: skip


def config(tmp_path, forget, retain, **flags):
    return arguments.parse({
        "forget_data": write(tmp_path / "forget.jsonl", forget),
        "retain_data": write(tmp_path / "retain.jsonl", retain),
        **flags,
    })  # fmt: skip


def test_mismatch_answers_are_right_answers_of_normal_training_rows_only(tmp_path, encoder):
    """Defect D15: the published pool holds false answers and rows held out for validation and test."""
    data = load(config(tmp_path, forget_rows(), truthful_rows()), encoder)
    training = {row.prompt.removeprefix("truth ") for row in data.normal["train"]}
    assert 0 < len(training) < 40
    assert sorted(data.mismatch_answers) == sorted([*(f"best {n}" for n in training), *(f"also {n}" for n in training)])


def test_one_fixed_text_or_a_file_replaces_the_mismatch_answers(tmp_path, encoder):
    fixed = load(config(tmp_path, forget_rows(), truthful_rows(), mismatch_text="Sorry, no."), encoder)
    assert fixed.mismatch_answers == ["Sorry, no."]
    other = write(tmp_path / "other.jsonl", [{"prompt": "p", "response": f"other {n}"} for n in range(3)])
    given = load(config(tmp_path, forget_rows(), truthful_rows(), mismatch_data=other), encoder)
    assert given.mismatch_answers == ["other 0", "other 1", "other 2"]


def test_held_out_answers_are_no_mismatch_answers_where_both_come_from_one_file(tmp_path, encoder):
    retain = [{"prompt": f"question {n}", "response": f"answer {n}"} for n in range(40)]
    path = write(tmp_path / "retain.jsonl", retain)
    data = load(config(tmp_path, forget_rows(), retain, mismatch_data=path), encoder)
    held_out = {row.answer for side in ("validation", "test") for row in data.normal[side]}
    assert held_out and data.mismatch_answers and not held_out & set(data.mismatch_answers)


def test_sides_are_divided_and_the_unseen_are_memorised_but_never_unlearned(tmp_path, encoder):
    data = load(config(tmp_path, forget_rows(), truthful_rows()), encoder)
    prompts = {side: {row.prompt for row in rows} for side, rows in data.forget.items()}
    assert not prompts["train"] & prompts["test"] and sum(map(len, prompts.values())) == 40
    assert {row.prompt for row in data.memorize} == prompts["train"] | prompts["test"]


def test_wrong_answers_alone_are_enough(tmp_path, encoder):
    rows = [{"prompt": f"question {n}", "response": f"wrong {n}"} for n in range(40)]
    data = load(config(tmp_path, rows, truthful_rows()), encoder)
    assert len(data.sources[0].rows) == 40 and not any(row.right_answers for row in data.sources[0].rows)


def test_a_right_answer_may_be_a_number(tmp_path, encoder):
    data = load(config(tmp_path, forget_rows(right_answer=1969), truthful_rows()), encoder)
    assert data.sources[0].rows[0].right_answers == ("1969",)


def test_too_few_rows_for_three_sides_are_refused(tmp_path, encoder):
    with pytest.raises(UsageError, match="too few rows"):
        load(config(tmp_path, forget_rows(2), truthful_rows()), encoder)


def test_a_limit_keeps_the_first_rows_of_each_source(tmp_path, encoder):
    data = load(config(tmp_path, forget_rows(), truthful_rows(), **{"data.limit": 20}), encoder)
    assert [len(source.rows) for source in data.sources] == [20, 20]
