"""Sequences laid end to end: rows and signed weights to one ``PackedBatch``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from unlearn_ds.types import EncodedRow, PackedBatch, Term


class Placed(NamedTuple):
    """A row at its place in a batch: the index of its term and the fp weight of each of its response tokens."""

    row: EncodedRow
    term: int
    coefficient: float


def pack(placed: Sequence[Placed], terms: Sequence[Term]) -> PackedBatch:
    """Pack rows into one stream, rows of KL terms last.

    A response token at stream position t is predicted by the hidden state at t - 1; prompts have at least one token,
    so no sequence is predicted by its neighbour.
    """
    placed = sorted(placed, key=lambda item: terms[item.term].loss == "kl")
    if any(not item.row.prompt_ids or not item.row.answer_ids for item in placed):
        raise ValueError("a packed row needs at least one prompt token and one answer token")
    lengths = [len(item.row) for item in placed]
    ends = list(itertools.accumulate(lengths))
    starts = [0, *ends][: len(placed)]
    counts = [len(item.row.answer_ids) for item in placed]
    first_answer = [start + len(item.row.prompt_ids) for start, item in zip(starts, placed, strict=True)]
    kl = [item for item in placed if terms[item.term].loss == "kl"]
    long, real = {"dtype": torch.long}, {"dtype": torch.float32}
    return PackedBatch(
        input_ids_T=torch.tensor(
            [token for item in placed for token in (*item.row.prompt_ids, *item.row.answer_ids)], **long
        ),
        position_ids_T=torch.tensor([position for length in lengths for position in range(length)], **long),
        cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32),
        max_seqlen=max(lengths, default=0),
        loss_index_N=torch.tensor(
            [first - 1 + j for first, count in zip(first_answer, counts, strict=True) for j in range(count)], **long
        ),
        targets_N=torch.tensor([token for item in placed for token in item.row.answer_ids], **long),
        coefficients_N=torch.tensor(
            [item.coefficient for item, count in zip(placed, counts, strict=True) for _ in range(count)], **real
        ),
        sequence_N=torch.tensor([s for s, count in enumerate(counts) for _ in range(count)], **long),
        bounds_S=torch.tensor([terms[item.term].bound for item in placed], **real),
        sequence_lengths_S=torch.tensor(counts, **real),
        num_kl_rows=sum(len(item.row.answer_ids) for item in kl),
        kl_keys=[item.row.key for item in kl],
        term_of_sequence=[item.term for item in placed],
    )


def pack_scored(rows: Sequence[EncodedRow]) -> PackedBatch:
    """Pack rows whose response tokens are only scored: no weights, no KL."""
    return pack([Placed(row, 0, 0.0) for row in rows], [Term("score", "score", "ce", 0.0)])


def kl_part(batch: PackedBatch) -> PackedBatch:
    """The sequences with KL rows alone, as the reference model needs them."""
    first = batch.cu_seqlens.numel() - 1 - len(batch.kl_keys)
    start = int(batch.cu_seqlens[first])
    rows = slice(batch.num_response_tokens - batch.num_kl_rows, None)
    cu_seqlens = batch.cu_seqlens[first:] - start
    return PackedBatch(
        input_ids_T=batch.input_ids_T[start:],
        position_ids_T=batch.position_ids_T[start:],
        cu_seqlens=cu_seqlens,
        max_seqlen=batch.max_seqlen,
        loss_index_N=batch.loss_index_N[rows] - start,
        targets_N=batch.targets_N[rows],
        coefficients_N=batch.coefficients_N[rows],
        sequence_N=batch.sequence_N[rows] - first,
        bounds_S=batch.bounds_S[first:],
        sequence_lengths_S=batch.sequence_lengths_S[first:],
        num_kl_rows=batch.num_kl_rows,
        kl_keys=batch.kl_keys,
        term_of_sequence=batch.term_of_sequence[first:],
    )
