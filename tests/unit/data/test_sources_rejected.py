"""Files that cannot be read, and rows that cannot be used: each is named with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unlearn_ds.config import UsageError
from unlearn_ds.data.sources import Source, check_rejected, read, write_rejected
from unlearn_ds.types import Row

GOOD = [{"question": "Who wrote it?", "answer": "Ann"}, {"question": "When?", "answer": "In May"}]


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def rejections(source: Source) -> list[tuple[int, str]]:
    return [(entry["row"], entry["reason"]) for entry in source.rejected]


# Files that cannot be read


@pytest.mark.parametrize("content", ["", "question,answer\n"], ids=["empty", "header_only"])
def test_a_csv_without_rows_is_refused(tmp_path, content):
    (tmp_path / "data.csv").write_text(content)
    with pytest.raises(UsageError, match="data.csv"):
        read(str(tmp_path / "data.csv"), "forget")


def test_broken_json_is_refused_with_the_file_in_the_message(tmp_path):
    (tmp_path / "data.jsonl").write_text("this is no json\n")
    with pytest.raises(UsageError, match=r"cannot read .*data\.jsonl"):
        read(str(tmp_path / "data.jsonl"), "forget")


@pytest.mark.parametrize(
    ("line", "said"),
    [('{"prompt": "a", "response" "b"}', "line 3 is no JSON: .* at character 28"), ("[1]", "line 3 is")],
)
def test_the_line_of_a_jsonl_file_that_is_broken_is_named(tmp_path, line, said):
    path = tmp_path / "data.jsonl"
    good = '{"prompt": "a", "response": "b"}'
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(UsageError, match=rf"cannot read .*data\.jsonl: {said}"):
        read(str(path), "forget")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*nowhere\.csv"):
        read(str(tmp_path / "nowhere.csv"), "forget")


def test_an_unknown_hub_id_is_refused_and_local_suffixes_are_named():
    with pytest.raises(UsageError, match=r"cannot read no-such-org/no-such-name: .*\.csv, \.json"):
        read("no-such-org/no-such-name", "forget")


# Rows that cannot be used


def test_empty_prompts_and_answers_are_rejected_with_a_reason(tmp_path):
    records = [
        *GOOD,
        {"question": " ", "answer": "x"},
        {"question": "q", "answer": "\n"},
        {"question": "q", "answer": None},
    ]
    source = read(write(tmp_path / "data.jsonl", records), "forget")
    assert len(source.rows) == 2
    assert rejections(source) == [(2, "empty prompt"), (3, "empty answer"), (4, "empty answer")]


def test_a_null_question_is_an_empty_prompt_and_no_running_text(tmp_path):
    source = read(write(tmp_path / "data.jsonl", [*GOOD, {"question": None, "answer": "x"}]), "forget")
    assert rejections(source) == [(2, "empty prompt")]


def test_a_row_without_incorrect_answers_is_rejected(tmp_path):
    good = {
        "question": "What happens?",
        "best_answer": "Nothing",
        "correct_answers": [],
        "incorrect_answers": ["A", "B"],
    }
    records = [good, {**good, "question": "q", "incorrect_answers": []}]
    assert rejections(read(write(tmp_path / "data.jsonl", records), "forget")) == [(1, "empty answer")]


def test_duplicates_are_rejected_and_other_answers_to_the_same_prompt_are_not(tmp_path):
    records = [*GOOD, {**GOOD[0], "answer": " Ann "}, {**GOOD[0], "answer": "Bob"}]
    source = read(write(tmp_path / "data.jsonl", records), "forget")
    assert [row.answer for row in source.rows] == ["Ann", "In May", "Bob"]
    assert rejections(source) == [(2, "duplicate")]


def source_with(good: int, bad: int) -> Source:
    source = Source("data.csv", "TOFU", [Row(f"q{i}", "a") for i in range(good)])
    for i in range(bad):
        source.reject(i, "empty answer", f"bad {i}")
    return source


def test_the_share_of_rejected_rows_may_reach_the_threshold_and_not_pass_it():
    check_rejected([source_with(9, 1)], 0.1)
    check_rejected([source_with(5, 0)], 0.0)
    with pytest.raises(UsageError, match=r"data\.csv: TOFU, 8 rows, 2 empty answer.*20%.*max_rejected 0\.1"):
        check_rejected([source_with(9, 1), source_with(8, 2)], 0.1)


def test_duplicates_are_no_unusable_rows(tmp_path):
    rows = [{"prompt": f"q{n // 3}", "response": f"a{n // 3}"} for n in range(30)]
    source = read(write(tmp_path / "thrice.jsonl", rows), "retain")
    assert len(source.rows) == 10 and len(source.rejected) == 20
    check_rejected([source], 0.0)


def test_a_source_without_any_usable_row_is_refused_whatever_the_threshold():
    with pytest.raises(UsageError):
        check_rejected([source_with(0, 3)], 1.0)


def test_rejected_rows_are_written_one_json_line_each(tmp_path):
    write_rejected([source_with(1, 2), source_with(1, 1)], tmp_path / "rejected.jsonl")
    entries = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [entry["prompt"] for entry in entries] == ["bad 0", "bad 1", "bad 0"]
    assert entries[0] == {"source": "data.csv", "row": 0, "reason": "empty answer", "prompt": "bad 0"}
