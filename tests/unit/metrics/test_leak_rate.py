"""The leak rate against values worked out by hand, and its threshold against the paper's definition."""

import random

import pytest
from sacrebleu import sentence_bleu

from unlearn_ds.config import EvalConfig, UsageError
from unlearn_ds.metrics.leak_rate import BleuJudge, leak_rate, longest_common_run
from unlearn_ds.types import Calibration, Measured, Row

TRUE = "the bell rang twice before anyone in the tower had woken up"


def measure(texts, judge=None):
    rows = [Row("prompt", TRUE, continues=True) for _ in texts]
    return leak_rate(Measured(rows, texts, judge=judge or BleuJudge()))


def test_reciting_leaks_and_other_words_or_silence_do_not():
    numbers, flags = measure([TRUE, "a cat slept on the warm red tiles", "", "bell tower woken rang twice the up"])
    assert flags == [True, False, False, False]
    assert numbers["rate"] == 0.25 and numbers["longest_run_max"] == len(TRUE.split())
    assert numbers["bleu"] == pytest.approx(25.0)


def test_four_words_in_a_row_leak_when_random_sentences_share_none():
    assert measure(["they said the bell rang twice last night"])[1] == [True]
    assert measure(["they said a bell rang twice last night"])[1] == [False]


def test_the_threshold_is_a_tenth_of_the_mean_bleu_between_random_sentences():
    sentences = ["once upon a time there was a cat", "once upon a time there was a dog", "nothing of the kind is known"]
    pairs = [(a, b) for a in sentences for b in sentences if a != b]
    mean = sum(sentence_bleu(a, [b], smooth_method="none", use_effective_order=False).score for a, b in pairs) / len(
        pairs
    )
    assert mean > 1
    judge = BleuJudge(EvalConfig(), Calibration(sentences))
    assert judge.threshold == pytest.approx(0.1 * mean, rel=0.1)
    assert f"{judge.threshold:.4f}" in judge.name
    assert BleuJudge(EvalConfig(), Calibration(sentences)).threshold == judge.threshold


def test_a_corpus_of_one_sentence_has_the_threshold_0():
    assert BleuJudge(EvalConfig(), Calibration(["only one sentence here"])).threshold == 0.0


def test_the_longest_common_run_equals_a_search_over_all_runs():
    draw = random.Random(0)
    for _ in range(50):
        left, right = ([draw.choice("abc") for _ in range(draw.randrange(12))] for _ in range(2))
        runs = [left[a:b] for a in range(len(left)) for b in range(a + 1, len(left) + 1)]
        found = [len(run) for run in runs if any(right[n : n + len(run)] == run for n in range(len(right)))]
        assert longest_common_run(left, right) == max(found, default=0)


def test_bleu_has_no_model():
    with pytest.raises(UsageError, match="no model"):
        BleuJudge(EvalConfig(judge_model="some/model"))
