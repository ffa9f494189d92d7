"""Cases of the loss, and the plain float64 computation with all logits that every path is held against."""

from __future__ import annotations

from typing import NamedTuple

import torch

from unlearn_ds import ops
from unlearn_ds.registry import KERNELS, resolve
from unlearn_ds.types import PackedBatch, ReferenceRows

HIDDEN = 24
KERNEL = "torch"
"""The row kernel under test; fixture ``kernel`` sets it."""


class Case(NamedTuple):
    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    batch: PackedBatch
    reference: ReferenceRows | None


class Result(NamedTuple):
    loss: torch.Tensor
    loss_N: torch.Tensor
    grad_hidden: torch.Tensor | None
    grad_weight: torch.Tensor | None


def loss_batch(coefficients, targets, num_kl_rows=0, lengths=None, bounds=None, smoothing=None) -> PackedBatch:
    """A batch that holds what the loss reads; the stream itself is of no interest here."""
    coefficients_N = torch.as_tensor(coefficients, dtype=torch.float32)
    lengths = [len(coefficients_N)] if lengths is None else lengths
    sequence_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    bounds_S = torch.tensor([float("inf")] * len(lengths) if bounds is None else bounds)
    none = torch.empty(0, dtype=torch.long)
    return PackedBatch(
        input_ids_T=none,
        position_ids_T=none,
        cu_seqlens=none.int(),
        max_seqlen=0,
        loss_index_N=torch.arange(len(coefficients_N)),
        targets_N=torch.as_tensor(targets, dtype=torch.long),
        coefficients_N=coefficients_N,
        sequence_N=sequence_N,
        bounds_S=bounds_S,
        sequence_lengths_S=torch.tensor(lengths, dtype=torch.float32),
        num_kl_rows=num_kl_rows,
        bounded_index=None if bounds is None else torch.isfinite(bounds_S)[sequence_N].nonzero().squeeze(1),
        smoothing_N=None if smoothing is None else torch.as_tensor(smoothing, dtype=torch.float32),
    )


def make_case(num_ce: int, num_kl: int, vocab: int, dtype=torch.float32, seed=0, lengths=None, bounds=None) -> Case:
    draw = torch.Generator().manual_seed(seed)
    num_rows = num_ce + num_kl

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=draw) * scale).to(dtype)

    coefficients = torch.randn(num_rows, generator=draw)
    coefficients[num_ce:].abs_()
    targets = torch.randint(vocab, (num_rows,), generator=draw)
    reference = None
    hidden, weight = normal(num_rows, HIDDEN), normal(vocab, HIDDEN, scale=0.4)
    if num_kl:
        reference = ReferenceRows(normal(num_kl, HIDDEN), normal(vocab, HIDDEN, scale=0.4))
    return Case(hidden, weight, loss_batch(coefficients, targets, num_kl, lengths, bounds), reference)


def plain_logits(hidden, weight, softcap, logit_scale):
    logits = hidden @ weight.t() * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def truth(case: Case, softcap=None, logit_scale=1.0, dtype=torch.float64, outer=1.0) -> Result:
    """Plain autograd: full logits in ``dtype``, log_softmax in at least fp32, gather, the textbook KL."""
    hidden = case.hidden_NH.detach().to(dtype).requires_grad_()
    weight = case.weight_VH.detach().to(dtype).requires_grad_()
    batch = case.batch
    num_ce = batch.num_response_tokens - batch.num_kl_rows
    wide = torch.promote_types(dtype, torch.float32)
    logp = torch.log_softmax(plain_logits(hidden, weight, softcap, logit_scale).to(wide), dim=1)
    loss_N = -logp[:num_ce].gather(1, batch.targets_N[:num_ce, None]).squeeze(1)
    if batch.smoothing_N is not None:
        smoothing = batch.smoothing_N[:num_ce].to(wide)
        loss_N = (1 - smoothing) * loss_N - smoothing * logp[:num_ce].mean(1)
    if case.reference is not None:
        there = plain_logits(*(x.to(dtype) for x in case.reference), softcap, logit_scale)
        logq = torch.log_softmax(there.to(wide), dim=1)
        loss_N = torch.cat([loss_N, (logq.exp() * (logq - logp[num_ce:])).sum(1)])
    loss = (loss_N * batch.coefficients_N.to(wide)).sum()
    (loss * outer).backward()
    return Result(loss.detach(), loss_N.detach(), hidden.grad, weight.grad)


def textbook_kl(logits: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(reference || policy) of each row and its gradient with respect to the logits, in float64."""
    logp, logq = (torch.log_softmax(x.double(), dim=1) for x in (logits, reference))
    return (logq.exp() * (logq - logp)).sum(1), logp.exp() - logq.exp()


def loss_options(softcap=None, logit_scale=1.0, **options) -> ops.LossOptions:
    return ops.LossOptions(ops.LogitMap(logit_scale, softcap), **{"kernel": KERNEL, **options})


def kl_of_logits(logits_CV: torch.Tensor, reference_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL of each row and its gradient from the row kernel under test."""
    gradient_CV = torch.empty_like(logits_CV)
    loss_C = resolve("kernel", KERNEL, KERNELS).forward_kl(
        logits_CV.clone(), reference_CV.clone(), torch.ones(len(logits_CV)), gradient_CV
    )
    return loss_C, gradient_CV


def ours(case: Case, train_hidden=True, train_weight=True, outer=1.0, **options) -> Result:
    hidden = case.hidden_NH.clone().requires_grad_(train_hidden)
    weight = case.weight_VH.clone().requires_grad_(train_weight)
    output = ops.masked_loss(hidden, weight, case.batch, case.reference, loss_options(**options))
    (output.loss * outer).backward()
    return Result(output.loss.detach(), output.loss_N, hidden.grad, weight.grad)


def assert_close(actual: Result, expected: Result, tolerance=2e-6) -> None:
    """Each value to ``tolerance`` of the largest entry of its tensor."""
    for name, a, e in zip(Result._fields, actual, expected, strict=True):
        assert a.shape == e.shape, name
        if e.numel():
            error = (a.double() - e.double()).abs().max().item()
            assert error <= tolerance * max(e.abs().max().item(), 1e-3), f"{name}: off by {error}"
