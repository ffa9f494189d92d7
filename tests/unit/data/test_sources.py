from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from unlearn_ds.config import UsageError
from unlearn_ds.data.sources import SCHEMAS, Source, check_rejected, content_key, read

TOFU = [{"question": "Who wrote it?", "answer": "Ann"}, {"question": "When?", "answer": "In May"}]
HALUEVAL = [{"knowledge": "k", "question": "Where?", "right_answer": "Here", "hallucinated_answer": "There"}]
TRUTHFUL_CSV = [
    {
        "Type": "Adversarial",
        "Question": "What happens?",
        "Best Answer": "Nothing",
        "Correct Answers": "Nothing; Not much",
        "Incorrect Answers": "You die; You fly",
    }
]
TRUTHFUL_HUB = [
    {
        "question": "What happens?",
        "best_answer": "Nothing",
        "correct_answers": ["Nothing", "Not much"],
        "incorrect_answers": ["You die", "You fly"],
    }
]
PKU = [
    {"prompt": prompt, "response_0": first, "response_1": second,
     "is_response_0_safe": safe, "is_response_1_safe": other}
    for prompt, first, second, safe, other in (
        ("How?", "Badly", "Kindly", False, True), ("Why?", "Spite", "Envy", False, False),
        ("When?", "Now", "Later", True, True),
    )
]  # fmt: skip
BEAVER = [
    {"prompt": "How?", "response": "Badly", "category": "c", "is_safe": False},
    {"prompt": "When?", "response": "Now", "category": "c", "is_safe": True},
]
MESSAGES = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "A model."},
        ]
    }
]


def write(path: Path, records: list[dict]) -> str:
    """Write records in the format that the file's name asks for."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text("\n\n".join(r["text"] for r in records), encoding="utf-8")
    return str(path)


def texts(source: Source) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(row.prompt, row.answer, row.right_answers) for row in source.rows]


FORGET = {
    "HaluEval qa": (HALUEVAL, [("Where?", "There", ("Here",))]),
    "TruthfulQA csv": (TRUTHFUL_CSV, [("What happens?", "You die", ("Nothing", "Not much"))]),
    "TruthfulQA generation": (TRUTHFUL_HUB, [("What happens?", "You die", ("Nothing", "Not much"))]),
    "PKU-SafeRLHF": (PKU, [("How?", "Badly", ("Kindly",)), ("Why?", "Spite", ()), ("Why?", "Envy", ())]),
    "BeaverTails": (BEAVER, [("How?", "Badly", ())]),
    "TOFU": (TOFU, [("Who wrote it?", "Ann", ()), ("When?", "In May", ())]),
    "chat messages": (MESSAGES, [("Who are you?", "A model.", ())]),
    "prompt/response": ([{"prompt": "p", "response": "r"}], [("p", "r", ())]),
    "prompt/completion": ([{"prompt": "p", "completion": "c"}], [("p", "c", ())]),
    "running text": ([{"text": "Once."}, {"text": "Twice."}], [("", "Once.", ()), ("", "Twice.", ())]),
}
RETAIN = {
    **FORGET,
    "HaluEval qa": (HALUEVAL, [("Where?", "Here", ("Here",))]),
    "TruthfulQA csv": (TRUTHFUL_CSV, [("What happens?", "Nothing", ("Nothing", "Not much"))]),
    "TruthfulQA generation": (TRUTHFUL_HUB, [("What happens?", "Nothing", ("Nothing", "Not much"))]),
    "PKU-SafeRLHF": (PKU, [("How?", "Kindly", ("Kindly",)), ("When?", "Now", ("Now", "Later")),
                           ("When?", "Later", ("Now", "Later"))]),
    "BeaverTails": (BEAVER, [("When?", "Now", ())]),
}  # fmt: skip
NESTED = ("TruthfulQA generation", "chat messages")


def test_the_cases_below_name_every_schema():
    assert list(FORGET) == [schema.name for schema in SCHEMAS]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("schema", FORGET)
def test_each_schema_is_recognised_in_each_format(tmp_path, schema, suffix):
    if suffix == "csv" and schema in NESTED:
        pytest.skip("a csv cell holds no list")
    records, expected = FORGET[schema]
    source = read(write(tmp_path / f"data.{suffix}", records), "forget")
    assert source.schema == schema
    assert texts(source) == expected
    assert not source.rejected


@pytest.mark.parametrize("schema", RETAIN)
def test_retain_rows_carry_the_right_answer(tmp_path, schema):
    records, expected = RETAIN[schema]
    assert texts(read(write(tmp_path / "data.jsonl", records), "retain")) == expected


def test_both_releases_of_pku_saferlhf_are_read(tmp_path):
    """Issue 7 of the published code: its split and columns are gone; today's release has more columns."""
    old = [{**record, "better_response_id": 0, "safer_response_id": 1} for record in PKU]
    today = [
        {**record, "prompt_source": "x", "response_0_severity_level": 2, "better_response_id": 0,
         "response_0_sha256": "0", "response_0_harm_category": {"Violence": False}}
        for record in PKU
    ]  # fmt: skip
    for n, records in enumerate((old, today)):
        source = read(write(tmp_path / f"{n}.jsonl", records), "forget")
        assert source.schema == "PKU-SafeRLHF" and texts(source) == FORGET["PKU-SafeRLHF"][1]


def test_a_txt_file_is_running_text_one_row_a_paragraph(tmp_path):
    (tmp_path / "book.txt").write_text("One line\nand another.\n\nSecond.\n\n\n\nThird.\n", encoding="utf-8")
    source = read(str(tmp_path / "book.txt"), "forget")
    assert source.schema == "running text"
    assert texts(source) == [("", "One line\nand another.", ()), ("", "Second.", ()), ("", "Third.", ())]


def test_json_lines_in_a_file_called_json_are_read(tmp_path):
    (tmp_path / "data.json").write_text("".join(json.dumps(r) + "\n" for r in TOFU))
    assert len(read(str(tmp_path / "data.json"), "forget").rows) == 2


def test_extra_columns_do_not_hide_a_schema(tmp_path):
    records = [{"id": 1, **TOFU[0], "paraphrase": "x"}]
    assert read(write(tmp_path / "data.csv", records), "forget").schema == "TOFU"


@pytest.mark.parametrize(
    ("turns", "rows"),
    [
        ([("user", "q1"), ("assistant", "a1"), ("user", "q2")], [("q1", "a1", ())]),
        ([("user", "q2")], []),
        ([("assistant", "a1"), ("user", "q2")], []),
    ],
    ids=["no_reply_to_the_last", "no_reply", "reply_before"],
)
def test_a_chat_answer_is_never_paired_with_a_later_question(tmp_path, turns, rows):
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert texts(read(write(tmp_path / "data.jsonl", [record]), "forget")) == rows


def test_keys_name_the_content(tmp_path):
    rows = read(write(tmp_path / "a.jsonl", TOFU), "forget").rows
    again = read(write(tmp_path / "b.csv", TOFU[::-1]), "retain").rows
    assert {row.key for row in rows} == {row.key for row in again} and len({row.key for row in rows}) == 2
    assert rows[0].key == content_key("Who wrote it?", "Ann") != content_key("Who wrote it?A", "nn")


# Columns


def test_unknown_columns_are_listed_with_the_flags_that_name_them(tmp_path):
    path = write(tmp_path / "data.csv", [{"frage": "q", "antwort": "a"}])
    with pytest.raises(UsageError, match="columns antwort, frage.*--forget_columns.*--retain_columns.*TOFU"):
        read(path, "forget")


def test_named_columns_are_taken(tmp_path):
    path = write(tmp_path / "data.csv", [{"frage": "q", "antwort": "a", "richtig": "r"}])
    assert texts(read(path, "forget", ("frage", "antwort"))) == [("q", "a", ())]
    assert texts(read(path, "forget", ("frage", "antwort", "richtig"))) == [("q", "a", ("r",))]
    assert texts(read(path, "retain", ("antwort",))) == [("", "a", ())]


def test_a_missing_named_column_is_named_and_so_are_those_there(tmp_path):
    path = write(tmp_path / "data.csv", [{"frage": "q", "antwort": "a"}])
    with pytest.raises(UsageError, match="no column answer; it has antwort, frage"):
        read(path, "forget", ("frage", "answer"))


def test_too_many_named_columns_are_refused(tmp_path):
    path = write(tmp_path / "data.csv", [dict.fromkeys("abcd", "x")])
    with pytest.raises(UsageError, match="one .*two .*three columns"):
        read(path, "forget", tuple("abcd"))


# Encodings


def test_a_byte_order_mark_does_not_become_part_of_the_first_column(tmp_path):
    (tmp_path / "data.csv").write_bytes(b"\xef\xbb\xbfquestion,answer\nq1,a1\n")
    assert texts(read(str(tmp_path / "data.csv"), "forget")) == [("q1", "a1", ())]


@pytest.mark.parametrize(
    ("name", "content"),
    [("data.jsonl", b'{"question": "q1", "answer": "a1"}\n'), ("data.txt", b"a1\n")],
    ids=["jsonl", "txt"],
)
def test_a_byte_order_mark_does_not_become_part_of_the_first_row(tmp_path, name, content):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert read(str(tmp_path / name), "forget").rows[0].answer == "a1"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.csv", b"question,answer\nq1,a1\nq2,caf\xe9\nq3,a3\n"),
        ("data.jsonl", b"".join(b'{"text": "%s"}\n' % text for text in (b"a1", b"caf\xe9", b"a3"))),
        ("data.txt", b"a1\n\ncaf\xe9\n\na3\n"),
    ],
    ids=["csv", "jsonl", "txt"],
)  # fmt: skip
def test_bytes_that_are_not_utf8_cost_their_row_and_not_the_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    source = read(str(tmp_path / name), "forget")
    assert [row.answer for row in source.rows] == ["a1", "a3"]
    assert [(entry["row"], entry["reason"]) for entry in source.rejected] == [(1, "bad encoding")]


def test_text_of_any_script_survives(tmp_path):
    answers = ["café", "東京", "“quoted”", "a\u00a0b", "emoji 🙂"]
    for suffix in ("csv", "jsonl", "parquet"):
        path = write(tmp_path / f"data.{suffix}", [{"question": f"q{i}", "answer": a} for i, a in enumerate(answers)])
        assert [row.answer for row in read(path, "forget").rows] == answers


@pytest.mark.parametrize(
    "answers", [["007", "1.50"], ["1984", "42"], ["NA", "None"], ["nan", "null"], ["true", "FALSE"]], ids=str
)
def test_csv_cells_are_text_whatever_they_look_like(tmp_path, answers):
    path = write(tmp_path / "data.csv", [{"question": f"q{i}", "answer": a} for i, a in enumerate(answers)])
    assert [row.answer for row in read(path, "forget").rows] == answers


def test_quoted_csv_cells_keep_commas_and_newlines(tmp_path):
    path = write(tmp_path / "data.csv", [{"question": "a, b", "answer": 'one\ntwo "three"'}])
    assert texts(read(path, "forget")) == [("a, b", 'one\ntwo "three"', ())]


def test_a_csv_row_with_too_many_cells_does_not_shift_the_columns(tmp_path):
    (tmp_path / "data.csv").write_text("question,answer\nq1,a1,oops\nq2,a2\n")
    try:
        source = read(str(tmp_path / "data.csv"), "forget")
    except UsageError:
        return
    assert texts(source)[-1] == ("q2", "a2", ())


# The public files themselves


@pytest.mark.parametrize(
    ("path", "schema", "at_least"),
    [
        ("halueval/halueval_qa_one-turn_500.jsonl", "HaluEval qa", 490),
        ("truthfulqa/TruthfulQA.csv", "TruthfulQA csv", 780),
        ("tofu/forget01.json", "TOFU", 40),
        ("tofu/retain_perturbed.json", "TOFU", 390),
    ],
)
@pytest.mark.parametrize("kind", ["forget", "retain"])
def test_public_files_are_recognised_and_nearly_all_rows_usable(shared_dir, path, schema, at_least, kind):
    if not (shared_dir / "data" / path).exists():
        pytest.skip(f"{path} is not at hand")
    source = read(str(shared_dir / "data" / path), kind)
    assert source.schema == schema and len(source.rows) >= at_least, source.describe()
    check_rejected([source], 0.02)


def test_halueval_keeps_right_and_hallucinated_answers_apart(shared_dir):
    path = shared_dir / "data/halueval/halueval_qa_one-turn_500.jsonl"
    if not path.exists():
        pytest.skip("HaluEval is not at hand")
    forget, retain = read(str(path), "forget").rows[0], read(str(path), "retain").rows[0]
    assert forget.prompt == retain.prompt
    assert forget.answer == "First for Women was started first."
    assert retain.answer == "Arthur's Magazine" and forget.right_answers == ("Arthur's Magazine",)
