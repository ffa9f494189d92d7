"""The sample data: shape, size, and that the neutral set is outside what is forgotten and retained."""

import json
import re
from collections import Counter

import pytest

from unlearn_ds.data import sources
from unlearn_ds.scenarios import SAMPLE

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
    stated = [words(" ".join(row.values())) for name in ("hallucination", "normal") for row in lines(f"{name}.jsonl")]
    items = [words(f"{row['context']} {row['choices'][row['answer']]}") for row in lines("neutral_choice.jsonl")]
    items += [words(row["text"]) for row in lines("neutral_text.jsonl")]
    for item in items:
        largest = max(len(item & row) for row in stated)
        assert largest < max(2.5, 0.75 * len(item)), item


def test_neutral_questions_are_asked_nowhere_else():
    asked = {
        row[key]
        for name, key in (("hallucination", "question"), ("normal", "prompt"))
        for row in lines(f"{name}.jsonl")
    }
    assert not asked & {row["prompt"] for row in lines("neutral_question.jsonl")}
