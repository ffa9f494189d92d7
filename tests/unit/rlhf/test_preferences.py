"""What RLHF learns from: rows of a scenario as token ids."""

from __future__ import annotations

import pytest
import transformers

from unlearn_ds.config import UsageError
from unlearn_ds.data.encode import Encoder
from unlearn_ds.rlhf.preferences import Preferences, padded, preferences
from unlearn_ds.scenarios import ScenarioData
from unlearn_ds.types import Row


@pytest.fixture
def encoder(random_llama_dir):
    return Encoder(transformers.AutoTokenizer.from_pretrained(random_llama_dir))


def data(forget, normal):
    found = ScenarioData.__new__(ScenarioData)
    found.forget, found.normal = {"train": forget}, {"train": normal}
    return found


def test_right_answers_are_demonstrated_and_preferred_and_normal_rows_stand_beside_them(encoder):
    forget = [Row("A dog?", "Bad.", ("Good.", "Fine.")), Row("A cat?", "Worse.", ("Better.",)), Row("A bird?", "None.")]
    found = preferences(data(forget, [Row("Where?", "There.")] * 5), encoder)
    text = encoder.tokenizer.decode
    assert [len(rows) for rows in found] == [4, 2, 2]
    assert [text(r["chosen_ids"]).rpartition("assistant\n")[2] for r in found.pairs] == [
        "Good.<|im_end|>",
        "Better.<|im_end|>",
    ]
    assert [text(r["rejected_ids"]).rpartition("assistant\n")[2] for r in found.pairs] == [
        "Bad.<|im_end|>",
        "Worse.<|im_end|>",
    ]
    assert [text([i for i in r["labels"] if i >= 0]) for r in found.demonstrations] == [
        "Good.<|im_end|>", "Better.<|im_end|>", "There.<|im_end|>", "There.<|im_end|>",
    ]  # fmt: skip
    for row, pair in zip(found.prompts, found.pairs, strict=True):
        assert pair["chosen_ids"][: len(row["input_ids"])] == row["input_ids"]


def test_rows_without_right_answers_are_refused(encoder):
    with pytest.raises(UsageError, match="an answer that is preferred to each bad one"):
        preferences(data([Row("A dog?", "Bad.")], []), encoder)


def test_the_padding_token_ends_no_answer_and_stands_in_no_prompt(encoder):
    """ChatML writes <|im_start|> into every prompt."""
    tokenizer = encoder.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    learned = preferences(data([Row("A dog?", "Bad.", ("Good.",))], []), encoder)
    assert padded(tokenizer, encoder.end_id, learned).pad_token == "<|endoftext|>"
    assert tokenizer.padding_side == "left"


def test_a_tokenizer_whose_special_tokens_all_stand_in_rows_is_refused(encoder):
    used = [token for token, entry in encoder.tokenizer.added_tokens_decoder.items() if entry.special]
    learned = Preferences([], [{"chosen_ids": used, "rejected_ids": []}], [])
    with pytest.raises(UsageError, match="a special token that stands in no row"):
        padded(encoder.tokenizer, encoder.end_id, learned)
