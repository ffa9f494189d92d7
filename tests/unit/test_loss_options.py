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


@pytest.mark.parametrize("num_rows", [0, 1, 7, 40])
@pytest.mark.parametrize("num_kl", [0, 1, 7, 40])
@pytest.mark.parametrize("limit", [1, 100, 1000, 10**6])
def test_blocks_cover_all_rows_in_order_within_the_workspace(num_rows, num_kl, limit):
    first_kl, total = num_rows, num_rows + num_kl
    blocks = workspace.cut_into_blocks(total, first_kl, 10, 25, limit)
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks)][: len(blocks)]
    assert (blocks[-1].stop if blocks else 0) == total
    for block in blocks:
        num_ce, kl = block.border - block.start, block.stop - block.border
        assert num_ce + kl > 0 and block.border == min(max(first_kl, block.start), block.stop)
        assert 10 * num_ce + 25 * kl <= max(limit, 25 * workspace.MIN_ROWS)
