from __future__ import annotations

import importlib.util

import pytest
import torch

from unlearn_ds import ops, workspace
from unlearn_ds.config import UsageError
from unlearn_ds.registry import KERNELS, resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_takes_torch_and_says_why():
    assert ops.resolve_kernel("auto", CPU) == ("torch", "not triton: needs a CUDA GPU")


def test_a_gpu_takes_triton_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert ops.resolve_kernel("auto", CUDA) == ("triton", "the fastest")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ops.resolve_kernel("auto", CUDA) == ("torch", "not triton: package triton is not installed")


def test_a_kernel_that_cannot_work_is_refused():
    with pytest.raises(UsageError, match="--engine.loss_kernel triton cannot be used: needs a CUDA GPU"):
        ops.resolve_kernel("triton", CPU)


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_keeps_the_contract(name):
    kernel = resolve("kernel", name, KERNELS)
    assert isinstance(kernel.in_place, bool)
    assert all(
        callable(getattr(kernel, function)) for function in ("cross_entropy", "forward_kl", "statistics", "scale_")
    )


def test_the_workspace_follows_device_and_precision_unless_it_is_given():
    sizes = [workspace.num_bytes(0, *where) for where in (("cuda", True), ("cpu", True), ("cpu", False))]
    assert sizes == [1536 * 2**20, 128 * 2**20, 36 * 2**20]
    assert workspace.num_bytes(7, "cuda", True) == 7 * 2**20


@pytest.mark.parametrize("num_ce", [0, 1, 7, 40])
@pytest.mark.parametrize("num_kl", [0, 1, 7, 40])
@pytest.mark.parametrize("limit", [1, 10**4, 10**6])
@pytest.mark.parametrize("in_place", [True, False])
def test_blocks_and_chunks_cover_all_rows_in_order_within_the_workspace(num_ce, num_kl, limit, in_place):
    vocab, total = 300, num_ce + num_kl
    hidden = torch.zeros(total, 4, dtype=torch.bfloat16)
    plan = workspace.Plan.of(hidden, vocab, total, num_ce, in_place, limit)
    assert plan.over is in_place
    covered = []
    for block in plan.blocks:
        assert block.stop - block.start > 0 and block.border == min(max(num_ce, block.start), block.stop)
        parts = plan.parts(block)
        assert [is_kl for _, is_kl in parts] == sorted(is_kl for _, is_kl in parts)
        covered += [(row, is_kl) for rows, is_kl in parts for row in range(rows.start, rows.stop)]
        # Logits of the block, if gradients lie over them, and of the reference for a part of its KL rows.
        reference = max((rows.stop - rows.start for rows, is_kl in parts if is_kl), default=0)
        held = 4 * vocab * (block.stop - block.start + reference)
        assert not in_place or held <= max(limit, 2 * 4 * vocab * workspace.MIN_ROWS)
    assert covered == [(row, row >= num_ce) for row in range(total)]


def test_kl_rows_that_fit_the_workspace_are_one_block_although_the_references_outputs_would_not():
    """So that the head's gradient is one product, without a sum in fp32."""
    rows, vocab = 2048, 128256
    plan = workspace.Plan.of(torch.zeros(rows, 4, dtype=torch.bfloat16), vocab, rows, 0, True, 1536 * 2**20)
    assert len(plan.blocks) == 1 and 2 * rows * vocab * 4 > 1536 * 2**20
