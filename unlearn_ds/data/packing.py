"""Sequences laid end to end: rows and signed weights to one ``PackedBatch``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from unlearn_ds.types import EncodedRow, PackedBatch, SharedPrompts, Term


class Placed(NamedTuple):
    """A row at its place in a batch: the index of its term and the fp weight of each of its response tokens."""

    row: EncodedRow
    term: int
    coefficient: float


def pack(placed: Sequence[Placed], terms: Sequence[Term], share_prompts: bool = False) -> PackedBatch:
    """Pack rows into one stream, rows of KL terms last.

    share_prompts: cross-entropy rows that follow each other with the same prompt follow one copy of it.

    A response token is predicted by the hidden state of the token before it; prompts have at least one token, so no
    sequence is predicted by its neighbour. The first tokens of answers to a shared prompt are predicted by one state.
    """
    placed = sorted(placed, key=lambda item: terms[item.term].loss == "kl")
    if any(not item.row.prompt_ids or not item.row.answer_ids for item in placed):
        raise ValueError("a packed row needs at least one prompt token and one answer token")
    stream, shared = _lay(placed, terms, share_prompts)
    counts = [len(item.row.answer_ids) for item in placed]
    ends = list(itertools.accumulate(len(item.row) for item in placed))
    kl = [item for item in placed if terms[item.term].loss == "kl"]
    bounds = [terms[item.term].bound for item in placed]
    bounded = [math.isfinite(bound) for bound, count in zip(bounds, counts, strict=True) for _ in range(count)]
    smoothing = [terms[item.term].smoothing for item, count in zip(placed, counts, strict=True) for _ in range(count)]
    long, real = {"dtype": torch.long}, {"dtype": torch.float32}
    return PackedBatch(
        input_ids_T=torch.tensor(stream.input_ids, **long),
        position_ids_T=torch.tensor(stream.position_ids, **long),
        cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32),
        max_seqlen=max((len(item.row) for item in placed), default=0),
        loss_index_N=torch.tensor(stream.loss_index, **long),
        targets_N=torch.tensor([token for item in placed for token in item.row.answer_ids], **long),
        coefficients_N=torch.tensor(
            [item.coefficient for item, count in zip(placed, counts, strict=True) for _ in range(count)], **real
        ),
        sequence_N=torch.tensor([s for s, count in enumerate(counts) for _ in range(count)], **long),
        bounds_S=torch.tensor(bounds, **real),
        sequence_lengths_S=torch.tensor(counts, **real),
        num_kl_rows=sum(len(item.row.answer_ids) for item in kl),
        first_kl_token=len(stream.input_ids) - sum(len(item.row) for item in kl),
        max_kl_seqlen=max((len(item.row) for item in kl), default=0),
        kl_keys=[item.row.key for item in kl],
        term_of_sequence=[item.term for item in placed],
        shared=shared,
        bounded_index=torch.tensor(bounded).nonzero().squeeze(1) if any(bounded) else None,
        smoothing_N=torch.tensor(smoothing, **real) if any(smoothing) else None,
    )


class _Stream(NamedTuple):
    """Tokens in the order of the stream, their positions, and the places that predict response tokens."""

    input_ids: list[int]
    position_ids: list[int]
    loss_index: list[int]


def _lay(placed: Sequence[Placed], terms: Sequence[Term], share_prompts: bool) -> tuple[_Stream, SharedPrompts | None]:
    stream = _Stream([], [], [])
    places: list[int] = []  # of each token of each sequence
    begin, before = 0, None
    for item in placed:
        prompt, answer = item.row.prompt_ids, item.row.answer_ids
        key = (prompt, terms[item.term].loss)
        # KL rows have prompts of their own, so that the reference can run on their part of the stream alone.
        if not (share_prompts and key == before and key[1] == "ce"):
            begin = len(stream.input_ids)
            stream.input_ids.extend(prompt)
            stream.position_ids.extend(range(len(prompt)))
        before = key
        first = len(stream.input_ids)
        stream.input_ids.extend(answer)
        stream.position_ids.extend(range(len(prompt), len(item.row)))
        predicting = [begin + len(prompt) - 1, *range(first, first + len(answer) - 1)]
        stream.loss_index.extend(predicting)
        places += [*range(begin, begin + len(prompt)), *range(first, first + len(answer))]
    if len(places) == len(stream.input_ids):
        return stream, None
    stream_U = torch.tensor(places)
    home_T = torch.empty(len(stream.input_ids), dtype=torch.long)
    # A prompt's tokens stand at several places; the first of them is written last.
    home_T[stream_U.flip(0)] = torch.arange(len(places)).flip(0)
    return stream, SharedPrompts(stream_U, home_T)


def pack_scored(rows: Sequence[EncodedRow]) -> PackedBatch:
    """Pack rows whose response tokens are only scored: no weights, no KL."""
    return pack([Placed(row, 0, 0.0) for row in rows], [Term("score", "score", "ce", 0.0)])


def kl_part(batch: PackedBatch) -> PackedBatch:
    """The sequences with KL rows alone, as the reference model needs them."""
    first = batch.cu_seqlens.numel() - 1 - len(batch.kl_keys)
    start = batch.first_kl_token
    rows = slice(batch.num_response_tokens - batch.num_kl_rows, None)
    cu_seqlens = batch.cu_seqlens[first:] - batch.cu_seqlens[first]
    return PackedBatch(
        input_ids_T=batch.input_ids_T[start:],
        position_ids_T=batch.position_ids_T[start:],
        cu_seqlens=cu_seqlens,
        max_seqlen=batch.max_kl_seqlen,
        loss_index_N=batch.loss_index_N[rows] - start,
        targets_N=batch.targets_N[rows],
        coefficients_N=batch.coefficients_N[rows],
        sequence_N=batch.sequence_N[rows] - first,
        bounds_S=batch.bounds_S[first:],
        sequence_lengths_S=batch.sequence_lengths_S[first:],
        num_kl_rows=batch.num_kl_rows,
        max_kl_seqlen=batch.max_kl_seqlen,
        kl_keys=batch.kl_keys,
        term_of_sequence=batch.term_of_sequence[first:],
    )
