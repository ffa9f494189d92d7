"""Attention where sequences share prompts: copies for attention alone, and the mask that FlexAttention takes."""

from __future__ import annotations

import pytest
import torch

from unlearn_ds.attention import ATTENTION, Packing, mask_function, resolve, sdpa
from unlearn_ds.config import UsageError
from unlearn_ds.data.packing import Placed, pack
from unlearn_ds.types import EncodedRow, PackedBatch, Term

TERMS = [Term("forget", "forget", "ce", -1.0), Term("retain", "retain", "kl", 1.0)]


@pytest.fixture(params=[(5, 3), (40, 25), (300, 40)], ids=["short", "middle", "long"])
def batch(request) -> PackedBatch:
    """Two prompts with three and two answers, and two sequences alone."""
    num_prompt, num_answer = request.param
    prompts = [tuple(range(100, 100 + num_prompt)), tuple(range(500, 501 + num_prompt // 2))]
    answers = [tuple(range(n)) for n in (num_answer, 1, num_answer - 1)]
    rows = [EncodedRow(prompts[0], a) for a in answers] + [EncodedRow(prompts[1], a) for a in answers[:2]]
    alone = [EncodedRow((7, 8), (9,)), EncodedRow(prompts[1], answers[2])]
    placed = [Placed(row, 0, 1.0) for row in rows] + [Placed(row, 1, 1.0) for row in alone]
    return pack(placed, TERMS, share_prompts=True)


def packing(batch: PackedBatch, **options) -> Packing:
    return Packing(batch.cu_seqlens, batch.max_seqlen, shared=batch.shared, **options)


def apart(batch: PackedBatch, x: torch.Tensor) -> torch.Tensor:
    return x[batch.shared.stream_U]


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 2.0}, {"scale": 0.1}], ids=str)
def test_sdpa_equals_sequences_with_prompts_of_their_own(batch, options):
    draw = torch.Generator().manual_seed(0)
    streams = [torch.randn(batch.num_tokens, heads, 8, generator=draw).requires_grad_() for heads in (4, 2, 2)]
    weights = torch.randn(batch.num_tokens, 4, 8, generator=draw)
    out = sdpa(*streams, packing(batch, **options))
    (out * weights).sum().backward()
    gradients = [x.grad.clone() for x in streams]
    for x in streams:
        x.grad = None
    alone = sdpa(*(apart(batch, x) for x in streams), packing(batch, **options)._replace(shared=None))
    # The copies of a prompt's token come to the same, so any of them is what the stream holds.
    torch.testing.assert_close(apart(batch, out), alone, rtol=0, atol=2e-6)
    (alone[batch.shared.home_T] * weights).sum().backward()
    for x, gradient in zip(streams, gradients, strict=True):
        torch.testing.assert_close(gradient, x.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_the_mask_of_flex_is_that_of_each_sequence_alone(batch, window):
    count = batch.num_tokens
    allowed = mask_function(packing(batch, window=window), count)
    index = torch.arange(count)
    found = allowed(None, None, index[:, None], index[None, :])
    expected = torch.zeros(count, count, dtype=torch.bool)
    ends = batch.cu_seqlens.tolist()
    for start, stop in zip(ends, ends[1:], strict=False):
        places = batch.shared.stream_U[start:stop]
        for n, place in enumerate(places):
            seen = places[max(0, n + 1 - (window or n + 1)) : n + 1]
            expected[place, seen] = True
    assert torch.equal(found, expected)


def test_the_mask_of_flex_without_sharing_is_that_of_each_sequence_alone():
    ends = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    index = torch.arange(9)
    found = mask_function(Packing(ends, 5), 9)(None, None, index[:, None], index[None, :])
    assert torch.equal(found, torch.block_diag(*(torch.ones(n, n).tril() for n in (3, 1, 5))).bool())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["flash", "varlen", "flex"])
def test_each_implementation_on_a_gpu_equals_sdpa(batch, name):
    device, draw = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    try:
        resolve(name, device, torch.bfloat16)
    except UsageError as error:
        pytest.skip(str(error))
    on_device = batch.to(device)
    streams = [
        torch.randn(batch.num_tokens, heads, 64, generator=draw, device=device).bfloat16().requires_grad_()
        for heads in (4, 2, 2)
    ]
    weights = torch.randn(batch.num_tokens, 4, 64, generator=draw, device=device)
    results = []
    for attend in (ATTENTION[name], sdpa):
        out = attend(*streams, packing(on_device))
        (out * weights).sum().backward()
        results.append([out.detach(), *(x.grad.clone() for x in streams)])
        for x in streams:
            x.grad = None
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= 1e-2 * expected.norm()
