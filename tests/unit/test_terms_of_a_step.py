"""The value of each term and its response tokens, as ``metrics.jsonl`` has them."""

from __future__ import annotations

import pytest
import torch

from unlearn_ds.data.packing import Placed, pack
from unlearn_ds.loop import response_tokens, term_values
from unlearn_ds.types import EncodedRow, Term

TERMS = [
    Term("forget", "forget", "ce", -0.5, 6.0),
    Term("mismatch", "mismatch", "ce", 1.0),
    Term("retain", "retain", "kl", 2.0),
]


def row(num_prompt: int, num_answer: int) -> EncodedRow:
    return EncodedRow(tuple(range(num_prompt)), tuple(range(num_answer)))


def test_values_are_means_over_sequences_and_tokens_those_of_answers():
    # Two rows to forget and two to retain, so each has half of its term's weight, spread over its answer.
    batch = pack(
        [
            Placed(row(4, 3), 0, -0.25 / 3), Placed(row(1, 5), 2, 1.0 / 5), Placed(row(6, 1), 1, 1.0),
            Placed(row(2, 2), 2, 1.0 / 2), Placed(row(3, 4), 0, -0.25 / 4),
        ],
        TERMS,
    )  # fmt: skip
    # In the order of the stream, where KL rows are last: forget 3, mismatch 1, forget 4, retain 5, retain 2.
    losses = [*[1.0, 2.0, 3.0], 7.0, *[9.0] * 4, *[0.1, 0.2, 0.3, 0.4, 0.5], *[0.5, 0.9]]
    assert response_tokens(batch, TERMS) == [3 + 4, 1, 5 + 2]
    values = term_values(torch.tensor(losses), batch, TERMS).tolist()
    assert values == pytest.approx([(2.0 + 6.0) / 2, 7.0, (0.3 + 0.7) / 2])  # the mean of 9 counts with its bound, 6


def test_an_empty_batch_has_no_tokens_of_any_term():
    assert response_tokens(pack([], TERMS), TERMS) == [0, 0, 0]
