from __future__ import annotations

import dataclasses

import pytest
import torch

from unlearn_ds.data.packing import Placed, kl_part, pack, pack_scored
from unlearn_ds.types import EncodedRow, PackedBatch, Term

TERMS = [
    Term("forget", "forget", "ce", -1.0, 6.0),
    Term("mismatch", "mismatch", "ce", 1.0),
    Term("retain", "retain", "kl", 1.0),
]
FORGET, MISMATCH, RETAIN = range(3)


def row(start: int, num_prompt: int, num_answer: int) -> EncodedRow:
    """A row of ids that occur in no other row: every token of a stream can be traced back."""
    ids = tuple(range(start, start + num_prompt + num_answer))
    return EncodedRow(ids[:num_prompt], ids[num_prompt:])


PLACED = [
    Placed(row(100, 4, 3), FORGET, -0.5),
    Placed(row(200, 1, 5), RETAIN, 0.25),
    Placed(row(300, 6, 1), MISMATCH, 1.0),
    Placed(row(400, 2, 2), RETAIN, 0.75),
    Placed(row(500, 3, 4), FORGET, -0.125),
]
ORDER = [PLACED[0], PLACED[2], PLACED[4], PLACED[1], PLACED[3]]  # KL rows last, the rest as given


@pytest.fixture
def batch() -> PackedBatch:
    return pack(PLACED, TERMS)


def test_the_stream_is_the_rows_end_to_end_without_padding(batch):
    expected = [token for item in ORDER for token in (*item.row.prompt_ids, *item.row.answer_ids)]
    assert batch.input_ids_T.tolist() == expected
    assert batch.num_tokens == sum(len(item.row) for item in PLACED)
    assert batch.cu_seqlens.tolist() == [0, 7, 14, 21, 27, 31] and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 7


def test_position_ids_restart_at_every_sequence(batch):
    expected = [position for item in ORDER for position in range(len(item.row))]
    assert batch.position_ids_T.tolist() == expected


def test_targets_are_the_stream_one_token_later(batch):
    assert torch.equal(batch.input_ids_T[batch.loss_index_N + 1], batch.targets_N)


def test_every_answer_token_is_a_target_once_the_first_one_too(batch):
    assert batch.targets_N.tolist() == [token for item in ORDER for token in item.row.answer_ids]
    assert batch.num_response_tokens == 15


def test_prompt_tokens_never_enter_the_loss(batch):
    """Defects D1 and D8: prompt tokens were trained by the mismatch term, and prompt and padding entered the KL."""
    prompts = {token for item in PLACED for token in item.row.prompt_ids}
    assert not prompts & set(batch.targets_N.tolist())


def test_no_target_is_predicted_by_a_neighbouring_sequence(batch):
    predictor = torch.bucketize(batch.loss_index_N, batch.cu_seqlens[1:].long(), right=True)
    predicted = torch.bucketize(batch.loss_index_N + 1, batch.cu_seqlens[1:].long(), right=True)
    assert torch.equal(predictor, batch.sequence_N) and torch.equal(predicted, batch.sequence_N)


def test_kl_rows_are_a_suffix(batch):
    is_kl = [TERMS[batch.term_of_sequence[s]].loss == "kl" for s in batch.sequence_N.tolist()]
    assert is_kl == sorted(is_kl) and sum(is_kl) == batch.num_kl_rows == 7
    assert batch.kl_keys == [PLACED[1].row.key, PLACED[3].row.key]
    assert batch.term_of_sequence == [FORGET, MISMATCH, FORGET, RETAIN, RETAIN]


def test_each_token_carries_the_coefficient_of_its_row_and_each_sequence_its_bound_and_length(batch):
    assert batch.coefficients_N.tolist() == [item.coefficient for item in ORDER for _ in item.row.answer_ids]
    assert batch.coefficients_N.dtype == torch.float32
    assert batch.bounds_S.tolist() == [6.0, float("inf"), 6.0, float("inf"), float("inf")]
    assert batch.sequence_lengths_S.tolist() == [3, 1, 4, 5, 2]


def test_the_kl_part_is_what_packing_the_kl_rows_alone_gives_but_for_the_longest_length(batch):
    part, alone = kl_part(batch), pack([PLACED[1], PLACED[3]], TERMS)
    for field in dataclasses.fields(PackedBatch):
        if field.name == "max_seqlen":
            assert part.max_seqlen >= alone.max_seqlen  # known without asking the GPU; attention allows it
            continue
        a, e = getattr(part, field.name), getattr(alone, field.name)
        assert torch.equal(a, e) and a.dtype == e.dtype if isinstance(e, torch.Tensor) else a == e, field.name


def test_the_kl_part_of_a_batch_of_kl_rows_only_is_the_batch():
    whole = pack([PLACED[1], PLACED[3]], TERMS)
    part = kl_part(whole)
    assert torch.equal(part.input_ids_T, whole.input_ids_T) and torch.equal(part.loss_index_N, whole.loss_index_N)


def test_a_batch_without_kl_rows_has_no_keys():
    batch = pack([PLACED[0], PLACED[2]], TERMS)
    assert batch.num_kl_rows == 0 and batch.kl_keys == []


def test_nothing_packs_to_an_empty_batch():
    batch = pack([], TERMS)
    assert batch.num_tokens == batch.num_response_tokens == batch.num_kl_rows == batch.max_seqlen == 0
    assert batch.cu_seqlens.tolist() == [0]
    assert batch.input_ids_T.dtype == batch.targets_N.dtype == torch.long


@pytest.mark.parametrize(("prompt", "answer"), [((), (1, 2)), ((1, 2), ())], ids=["no_prompt", "no_answer"])
def test_a_row_without_prompt_or_answer_is_refused(prompt, answer):
    with pytest.raises(ValueError, match="at least one prompt token and one answer token"):
        pack([Placed(EncodedRow(prompt, answer), FORGET, 1.0)], TERMS)


def test_scored_rows_keep_their_order_and_carry_no_weight():
    batch = pack_scored([item.row for item in PLACED])
    assert batch.targets_N.tolist() == [token for item in PLACED for token in item.row.answer_ids]
    assert not batch.coefficients_N.any() and batch.num_kl_rows == 0


def test_moving_a_batch_keeps_every_field(batch):
    moved = batch.to(torch.device("cpu"))
    for field in dataclasses.fields(PackedBatch):
        a, e = getattr(moved, field.name), getattr(batch, field.name)
        assert torch.equal(a, e) if isinstance(e, torch.Tensor) else a == e, field.name


# Shared prompts

UNIT = [
    Placed(row(100, 4, 3), FORGET, -0.5),
    Placed(EncodedRow(row(100, 4, 3).prompt_ids, (600, 601)), MISMATCH, 1.0),
    Placed(EncodedRow(row(100, 4, 3).prompt_ids, (700,)), MISMATCH, 1.0),
]
MIXED = [*UNIT, PLACED[2], PLACED[1], PLACED[3]]


def test_answers_to_one_prompt_follow_one_copy_of_it():
    batch = pack(MIXED, TERMS, share_prompts=True)
    assert batch.input_ids_T[:10].tolist() == [100, 101, 102, 103, 104, 105, 106, 600, 601, 700]
    assert batch.position_ids_T[:10].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 4]
    assert batch.loss_index_N[:6].tolist() == [3, 4, 5, 3, 7, 3]


def test_attention_finds_every_sequence_with_a_prompt_of_its_own():
    batch, apart = pack(MIXED, TERMS, share_prompts=True), pack(MIXED, TERMS)
    assert torch.equal(batch.input_ids_T[batch.shared.stream_U], apart.input_ids_T)
    assert torch.equal(batch.position_ids_T[batch.shared.stream_U], apart.position_ids_T)
    assert torch.equal(batch.cu_seqlens, apart.cu_seqlens) and batch.max_seqlen == apart.max_seqlen
    assert torch.equal(apart.input_ids_T[batch.shared.home_T], batch.input_ids_T)
    assert torch.equal(batch.shared.stream_U[batch.shared.home_T], torch.arange(batch.num_tokens))


def test_sharing_leaves_the_rows_of_the_loss_as_they_are():
    batch, apart = pack(MIXED, TERMS, share_prompts=True), pack(MIXED, TERMS)
    for name in ("targets_N", "coefficients_N", "sequence_N", "bounds_S", "sequence_lengths_S", "bounded_index"):
        assert torch.equal(getattr(batch, name), getattr(apart, name)), name
    assert torch.equal(batch.shared.home_T[batch.loss_index_N[6:]], apart.loss_index_N[6:])


def test_the_reference_gets_its_rows_whatever_is_shared_before_them():
    shared, apart = kl_part(pack(MIXED, TERMS, share_prompts=True)), kl_part(pack(MIXED, TERMS))
    assert shared.shared is None
    for field in dataclasses.fields(PackedBatch):
        one, two = getattr(shared, field.name), getattr(apart, field.name)
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, field.name


def test_kl_rows_with_equal_prompts_keep_their_own():
    placed = [Placed(PLACED[1].row, RETAIN, 1.0), Placed(PLACED[1].row, RETAIN, 1.0)]
    assert pack(placed, TERMS, share_prompts=True).shared is None


def test_nothing_is_shared_unless_asked_for():
    assert pack(UNIT, TERMS).shared is None


def test_label_smoothing_goes_to_the_rows_of_its_term():
    terms = [TERMS[0], TERMS[1]._replace(smoothing=0.25), TERMS[2]]
    assert pack(UNIT, terms).smoothing_N.tolist() == [0, 0, 0, 0.25, 0.25, 0.25]
    assert pack(UNIT, TERMS).smoothing_N is None
