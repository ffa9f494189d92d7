"""How many rows of logits exist at a time: the blocks and buffers of the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch

CHUNK_BYTES = 24 * 2**20
"""fp32 logits made at a time on a CPU where they are of no use later: its allocator hands small memory out again."""
MIN_ROWS = 8
"""Of a block, however small the workspace."""


def num_bytes(mib: int, device_type: str, is_bf16: bool) -> int:
    """Bytes of logits at a time. 0: what blocks of hundreds of rows need, so that the head's gradient is few products.
    On a GPU these are 1,500 rows of KL for Llama-3's 128k tokens, on a CPU in bf16 682 rows of SmolLM2's 49k. A CPU in
    fp32 adds products up as they are and takes small blocks: less memory, no slower."""
    return 2**20 * (mib or (1536 if device_type != "cpu" else 128 if is_bf16 else 36))


def wide_type(hidden_NH: torch.Tensor) -> torch.dtype:
    return torch.promote_types(hidden_NH.dtype, torch.float32)


def chunk_rows(hidden_NH: torch.Tensor, vocab: int, workspace_bytes: int) -> int:
    """Rows whose outputs are made at a time where they are of no use later."""
    limit = min(workspace_bytes, CHUNK_BYTES) if hidden_NH.device.type == "cpu" else workspace_bytes
    return max(MIN_ROWS, limit // (wide_type(hidden_NH).itemsize * vocab))


def rows_of_logits(like: torch.Tensor, num_rows: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised [rows, V] whose rows start at multiples of at least 32 bytes, whatever V is: with odd rows,
    products and loads are half as fast. On a CPU what fills them up is 0, for the reason in ``clear_behind``."""
    rows = like.new_empty(num_rows, -(-vocab // 16) * 16, dtype=dtype)
    if like.device.type == "cpu":
        rows[:, vocab:] = 0
    return rows[:, :vocab]


def clear_behind(rows_CV: torch.Tensor, dtype: torch.dtype) -> None:
    """Clear what lies behind rows of ``dtype`` that were written over wider ones, before a matrix product of them.

    On CPUs with AMX oneDNN (torch 2.13) multiplies bf16 in tiles of 32 elements: those behind a row's last one by 0,
    which gives NaN where NaN or an infinity was left there.
    """
    if rows_CV.device.type == "cpu" and rows_CV.dtype != dtype:
        num_columns = rows_CV.shape[1]
        rows_CV.view(dtype)[:, num_columns : num_columns + 32] = 0


class Block(NamedTuple):
    """Rows whose gradients with respect to the logits exist together; KL rows begin at ``border``."""

    start: int
    border: int
    stop: int


def cut_into_blocks(num_rows: int, first_kl: int, size: int) -> list[Block]:
    """Cut the rows into blocks of ``size``; a block may hold rows of both kinds."""
    starts = range(0, num_rows, size)
    ends = [min(start + size, num_rows) for start in starts]
    return [Block(start, min(max(first_kl, start), end), end) for start, end in zip(starts, ends, strict=True)]


class Plan(NamedTuple):
    """How rows go through the workspace.

    over: gradients lie over the outputs they come from, where the kernel or equal types allow it; KL rows then go in
    chunks, so that outputs of the reference, which are of no use later, take a quarter of the workspace at most.
    Otherwise (bf16 in the torch kernel) all outputs are made in chunks, and only gradients wait for the products with a
    block.
    """

    blocks: list[Block]
    over: bool
    chunk: int

    @classmethod
    def of(cls, hidden_NH: torch.Tensor, vocab: int, num_rows: int, first_kl: int, in_place: bool, limit: int):
        over = in_place or hidden_NH.dtype == wide_type(hidden_NH)
        if over:
            width = wide_type(hidden_NH).itemsize * vocab
            chunk = min(num_rows - first_kl, max(MIN_ROWS, limit // 4 // width))
            size = max(MIN_ROWS, limit // width - chunk)
            return cls(cut_into_blocks(num_rows, first_kl, size), True, chunk)
        chunk = chunk_rows(hidden_NH, vocab, limit // 4)  # of the policy and of the reference
        width = hidden_NH.dtype.itemsize * vocab
        return cls(cut_into_blocks(num_rows, first_kl, max(MIN_ROWS, limit // 2 // width)), False, chunk)

    def parts(self, block: Block) -> list[tuple[slice, bool]]:
        """(rows, whether they are KL rows) of what goes through a row kernel together."""
        found = []
        for start, stop, is_kl in ((block.start, block.border, False), (block.border, block.stop, True)):
            size = self.chunk if is_kl or not self.over else stop - start
            found += [(slice(a, min(a + size, stop)), is_kl) for a in range(start, stop, max(1, size))]
        return found
