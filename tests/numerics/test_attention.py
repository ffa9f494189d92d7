"""Packed attention against a float64 computation of one sequence at a time."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from unlearn_ds import attention, rectangles
from unlearn_ds.attention import ATTENTION, SHORT, Packing, resolve, sdpa

CPU = torch.device("cpu")
SHORT_LENGTHS = [1, 7, 33, 2, 64]
LONG_LENGTHS = [300, 2, 41]  # the longest goes past SHORT, to torch's fused kernel
LENGTHS = {"short": SHORT_LENGTHS, "long": LONG_LENGTHS, "one": [5], "ones": [1, 1, 1]}


class Stream(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    lengths: list[int]

    def packing(self, longest: int | None = None, **options) -> Packing:
        ends = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)
        return Packing(ends, max(self.lengths) if longest is None else longest, **options)


def make_stream(lengths, heads=4, kv_heads=2, width=8, dtype=torch.float32) -> Stream:
    draw = torch.Generator().manual_seed(0)

    def normal(num_heads):
        return torch.randn(sum(lengths), num_heads, width, generator=draw).to(dtype)

    return Stream(normal(heads), normal(kv_heads), normal(kv_heads), lengths)


def one_by_one(stream: Stream, window=None, scale=None, softcap=None, dtype=torch.float64) -> torch.Tensor:
    """Scores of all pairs, masked and normalised in ``dtype``, each sequence alone and each head spelled out."""
    scale = stream.query.shape[-1] ** -0.5 if scale is None else scale
    repeats = stream.query.shape[1] // stream.key.shape[1]
    outputs = []
    for query, key, value in zip(*(x.to(dtype).split(stream.lengths) for x in stream[:3]), strict=True):
        at = torch.arange(len(query))
        distance = at[:, None] - at[None, :]
        keep = (distance >= 0) & (distance < (window or len(query)))
        heads = []
        for head in range(query.shape[1]):
            scores = query[:, head] @ key[:, head // repeats].t() * scale
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            heads.append(scores.masked_fill(~keep, float("-inf")).softmax(-1) @ value[:, head // repeats])
        outputs.append(torch.stack(heads, 1))
    return torch.cat(outputs)


def test_rectangles_hold_each_token_once_and_sequences_of_about_one_length():
    lengths = [5, 90, 4, 6, 5, 4, 6, 5, 5, 91, 4]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    laid = rectangles.lay(ends, None)
    assert laid.shapes == rectangles.shapes(lengths) == [(8, 6), (3, 91)]
    assert sum(rows * length for rows, length in laid.shapes) == len(laid.source_P)
    assert laid.source_P[laid.home_T].tolist() == list(range(sum(lengths)))


def test_a_stream_without_tokens_stays_one():
    stream = make_stream([])
    assert sdpa(*stream[:3], Packing(torch.zeros(1, dtype=torch.int32), 0)).shape == (0, 4, 8)


def test_the_lengths_below_reach_both_ways_of_computing():
    assert max(SHORT_LENGTHS) <= SHORT < max(LONG_LENGTHS)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_fp32_equals_each_sequence_alone_in_float64(lengths, heads):
    stream = make_stream(lengths, *heads)
    actual = sdpa(*stream[:3], stream.packing())
    torch.testing.assert_close(actual.double(), one_by_one(stream), rtol=0, atol=2e-6)


@pytest.mark.parametrize("lengths", [SHORT_LENGTHS, LONG_LENGTHS], ids=["short", "long"])
def test_gradients_equal_each_sequence_alone_in_float64(lengths):
    stream = make_stream(lengths)
    weights = torch.randn(stream.query.shape, generator=torch.Generator().manual_seed(1))
    fp32 = [x.clone().requires_grad_() for x in stream[:3]]
    (sdpa(*fp32, stream.packing()) * weights).sum().backward()
    fp64 = [x.double().requires_grad_() for x in stream[:3]]
    (one_by_one(Stream(*fp64, lengths)) * weights).sum().backward()
    for a, e in zip(fp32, fp64, strict=True):
        torch.testing.assert_close(a.grad.double(), e.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [SHORT_LENGTHS, LONG_LENGTHS], ids=["short", "long"])
def test_bf16_error_is_at_most_twice_that_of_torch_alone(lengths):
    stream = make_stream(lengths, dtype=torch.bfloat16)
    exact = one_by_one(stream)
    parts = zip(*(x.split(lengths) for x in stream[:3]), strict=True)
    alone = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part), is_causal=True, enable_gqa=True)
        for part in parts
    ]
    theirs = torch.cat([x[0].transpose(0, 1) for x in alone])
    actual = sdpa(*stream[:3], stream.packing())
    assert actual.dtype == torch.bfloat16
    error, allowed = (actual.double() - exact).norm(), (theirs.double() - exact).norm()
    assert error <= 2 * allowed + 1e-3 * exact.norm()


@pytest.mark.parametrize("window", [1, 5, 64, 10_000])
@pytest.mark.parametrize("lengths", [SHORT_LENGTHS, LONG_LENGTHS], ids=["short", "long"])
def test_a_window_of_n_lets_a_token_see_itself_and_the_n_minus_one_before(lengths, window):
    stream = make_stream(lengths)
    actual = sdpa(*stream[:3], stream.packing(window=window))
    torch.testing.assert_close(actual.double(), one_by_one(stream, window=window), rtol=0, atol=2e-6)


@pytest.mark.parametrize("lengths", [SHORT_LENGTHS, LONG_LENGTHS], ids=["short", "long"])
def test_a_scale_of_the_model_replaces_the_usual_one(lengths):
    stream = make_stream(lengths)
    actual = sdpa(*stream[:3], stream.packing(scale=0.05))
    torch.testing.assert_close(actual.double(), one_by_one(stream, scale=0.05), rtol=0, atol=2e-6)


@pytest.mark.parametrize("longest", [80, SHORT + 1])
def test_a_longest_length_above_the_real_one_changes_nothing(longest):
    stream = make_stream(SHORT_LENGTHS)
    actual = sdpa(*stream[:3], stream.packing(longest=longest))
    torch.testing.assert_close(actual.double(), one_by_one(stream), rtol=0, atol=2e-6)


@pytest.mark.parametrize("lengths", [[9, 30, 20], [9, 300, 20]], ids=["short", "long"])
def test_one_sequence_perturbed_leaves_the_others_bitwise_unchanged(lengths):
    stream = make_stream(lengths)
    start, stop = lengths[0], lengths[0] + lengths[1]
    changed = [x.clone() for x in stream[:3]]
    for x in changed:
        x[start:stop] += 1000.0
    before, after = (sdpa(*qkv, stream.packing()) for qkv in (stream[:3], changed))
    assert torch.equal(before[:start], after[:start]) and torch.equal(before[stop:], after[stop:])
    assert not torch.equal(before[start:stop], after[start:stop])


@pytest.mark.parametrize("lengths", [[9, 30, 20], [9, 300, 20]], ids=["short", "long"])
def test_gradients_do_not_cross_sequences_nor_reach_the_future(lengths):
    stream = make_stream(lengths)
    qkv = [x.clone().requires_grad_() for x in stream[:3]]
    token = lengths[0] + 4  # the fifth of the second sequence
    sdpa(*qkv, stream.packing())[token].sum().backward()
    query, key, value = (x.grad.flatten(1).abs().sum(1).nonzero().flatten().tolist() for x in qkv)
    assert query == [token]
    assert value == list(range(lengths[0], token + 1))
    assert set(key) <= set(value)


def test_a_perturbed_future_token_leaves_the_past_bitwise_unchanged():
    stream = make_stream([20])
    changed = [x.clone() for x in stream[:3]]
    for x in changed:
        x[12:] -= 7.0
    before, after = (sdpa(*qkv, stream.packing()) for qkv in (stream[:3], changed))
    assert torch.equal(before[:12], after[:12])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("lengths", [SHORT_LENGTHS, LONG_LENGTHS], ids=["short", "long"])
def test_scores_are_soft_capped_before_they_are_masked(lengths, window):
    stream = make_stream(lengths)
    actual = sdpa(*stream[:3], stream.packing(softcap=0.5, window=window))
    torch.testing.assert_close(actual.double(), one_by_one(stream, window, softcap=0.5), rtol=0, atol=2e-6)
    assert (actual - sdpa(*stream[:3], stream.packing(window=window))).abs().max() > 0.01


def test_an_implementation_that_cannot_soft_cap_is_not_taken_and_refuses_to_forget_it():
    assert resolve("auto", CPU, torch.bfloat16, softcap=True)[0] == "sdpa"
    with pytest.raises(ValueError, match="cannot soft-cap scores as this model does; use flash, flex or sdpa"):
        attention.varlen(*make_stream([4])[:3], make_stream([4]).packing(softcap=30.0))


# The resolver


def test_auto_takes_sdpa_on_a_cpu_and_says_why_not_the_others():
    name, reason = resolve("auto", CPU, torch.float32)
    assert name == "sdpa"
    assert all(f"not {other}" in reason for other in ("flash", "varlen", "flex"))


@pytest.mark.parametrize(("name", "missing"), [("flash", "CUDA"), ("varlen", "CUDA"), ("flex", "no backward on cpu")])
def test_a_named_implementation_that_cannot_work_raises_and_says_what_is_missing(name, missing):
    with pytest.raises(ValueError, match=f"--attention {name} cannot be used: .*{missing}"):
        resolve(name, CPU, torch.bfloat16)


def test_a_named_implementation_that_works_is_taken():
    assert resolve("sdpa", CPU, torch.float32)[0] == "sdpa"


def test_resolver_and_table_know_the_same_names():
    assert all(resolve("auto", CPU, torch.float32)[1].count(f"not {name}") == 1 for name in ATTENTION if name != "sdpa")
    assert all(callable(getattr(attention, name)) for name in ATTENTION)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_implementation_that_works_here_equals_float64(name, window, dtype):
    device = torch.device("cuda")
    try:
        resolve(name, device, dtype)
    except ValueError as error:
        pytest.skip(str(error))
    stream = make_stream(SHORT_LENGTHS, width=64, dtype=dtype)
    packing = stream.packing(window=window)
    actual = ATTENTION[name](
        *(x.to(device) for x in stream[:3]), packing._replace(cu_seqlens=packing.cu_seqlens.to(device))
    )
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(actual.cpu().double(), one_by_one(stream, window=window), rtol=0, atol=tolerance)
