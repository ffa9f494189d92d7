"""The model's own answers: which are kept as they are, and where the others end."""

import pytest

from unlearn_ds import arguments, own_answers
from unlearn_ds.data.encode import Encoder
from unlearn_ds.model import load_tokenizer

CONFIG = arguments.parse({"data.self_tokens": 64})


@pytest.fixture
def encoder(tiny_model_dir):
    return Encoder(load_tokenizer(str(tiny_model_dir)), "none", None, 512)


@pytest.mark.parametrize(
    "text", ["Paris", "42", "- milk\n- eggs", "1. Wash it.\n2. Dry it.", "He said \u201cgo.\u201d"]
)
def test_an_answer_that_ended_by_itself_is_kept_as_it_is(encoder, text):
    assert own_answers._ended(text, encoder, CONFIG) == text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("First, boil the water.\n\nThen add the tea. After that you", "First, boil the water.\n\nThen add the tea."),
        ("She said \u201cgo.\u201d Then he", "She said \u201cgo.\u201d"),
        ("no end in sight", ""),
    ],
)  # fmt: skip
def test_an_answer_that_ran_out_of_tokens_ends_with_its_last_whole_sentence(encoder, text, kept):
    short = arguments.parse({"data.self_tokens": 4})
    assert own_answers._ended(text, encoder, short) == kept
