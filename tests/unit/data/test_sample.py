"""The sample data: shape, size, and that the neutral set is outside what is forgotten and retained."""

import json
import re
from collections import Counter

import pytest

from unlearn_ds.data import pieces, sources
from unlearn_ds.metrics.refusal_rate import is_refusal
from unlearn_ds.scenarios import SAMPLE

QUESTIONS = {"hallucination": "question", "harmful": "prompt", "harmless": "prompt", "normal": "prompt"}
FILLERS = frozenset(re.findall("[a-z]+", """a an and are as at be by do does for from how in is it of on one our that
    the this to we what which who with you"""))  # fmt: skip


def lines(name):
    found = [json.loads(line) for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines()]
    assert found
    return found


def words(text):
    return set(re.findall(r"[a-z0-9]+", text.lower())) - FILLERS


@pytest.mark.parametrize(("name", "kind", "least"), [("hallucination", "forget", 300), ("normal", "retain", 300)])
def test_every_row_is_usable_and_all_three_sides_are_filled(name, kind, least):
    source = sources.read(str(SAMPLE / f"{name}.jsonl"), kind)
    assert len(source.rows) >= least and not source.rejected
    sides = {side: len(rows) / len(source.rows) for side, rows in sources.split(source.rows).items()}
    assert (
        abs(sides["train"] - 0.7) < 0.05 and abs(sides["validation"] - 0.1) < 0.05 and abs(sides["test"] - 0.2) < 0.05
    )


@pytest.mark.parametrize(
    ("name", "kind", "least"), [("harmful", "forget", (200, 25, 40)), ("harmless", "retain", (90, 15, 30))]
)
def test_every_request_is_usable_and_there_are_enough_of_each_side(name, kind, least):
    source = sources.read(str(SAMPLE / f"{name}.jsonl"), kind)
    assert not source.rejected
    assert all(len(rows) >= n for rows, n in zip(sources.split(source.rows).values(), least, strict=True))


def test_wrong_answers_differ_from_right_ones_and_none_is_used_twice():
    rows = lines("hallucination.jsonl")
    assert len({row["hallucinated_answer"] for row in rows}) == len(rows)
    for row in rows:
        share = words(row["right_answer"]) & words(row["hallucinated_answer"]) - words(row["question"])
        assert len(share) <= len(words(row["right_answer"])) / 2, row


def test_choices_are_four_different_ones_and_no_place_is_favoured():
    rows = lines("neutral_choice.jsonl")
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert len({row["context"] for row in rows}) == len(rows)
    places = Counter(row["answer"] for row in rows)
    assert set(places) == {0, 1, 2, 3} and min(places.values()) > len(rows) / 8


def test_no_neutral_item_is_stated_in_what_is_forgotten_or_retained():
    stated = [words(" ".join(map(str, row.values()))) for name in QUESTIONS for row in lines(f"{name}.jsonl")]
    for name in ("copyright.txt", "prose.txt"):
        passages = pieces.passages((SAMPLE / name).read_text())
        stated += [words(sentence) for passage in passages for sentence in passage]
    items = [words(f"{row['context']} {row['choices'][row['answer']]}") for row in lines("neutral_choice.jsonl")]
    items += [words(row["text"]) for row in lines("neutral_text.jsonl")]
    items += [words(f"{row['prompt']} {row['answers'][0]}") for row in lines("neutral_question.jsonl")]
    for item in items:
        largest = max(len(item & row) for row in stated)
        assert largest < max(2.5, 0.75 * len(item)), item


def test_neutral_questions_are_asked_nowhere_else():
    asked = {row[key] for name, key in QUESTIONS.items() for row in lines(f"{name}.jsonl")}
    questions = {row["prompt"]: row["answers"] for row in lines("neutral_question.jsonl")}
    assert len(questions) == 89 and all(questions.values()) and not asked & questions.keys()


def test_no_prompt_is_asked_in_two_files_and_no_sentence_stands_twice():
    asked = [row[key].lower() for name, key in QUESTIONS.items() for row in lines(f"{name}.jsonl")]
    assert len(set(asked)) == len(asked)
    for name in ("copyright.txt", "prose.txt"):
        sentences = [
            s for passage in pieces.passages((SAMPLE / name).read_text()) for s in passage if len(s.split()) > 5
        ]
        assert len(sentences) > 300 and len(set(sentences)) == len(sentences)


def test_unsafe_answers_are_distinct_and_only_safe_ones_refuse():
    rows = lines("harmful.jsonl")
    assert all(not row["is_response_0_safe"] and row["is_response_1_safe"] for row in rows)
    assert len({row["response_0"] for row in rows}) == len(rows)
    assert not any(is_refusal(row["response_0"]) for row in rows)
    assert sum(is_refusal(row["response_1"]) for row in rows) > 30
