"""The public maths: masked cross-entropy, masked forward KL and log-probabilities on response tokens only.

Plain torch, chunked over rows, with the gradient made in the forward pass, so that logits of more than one workspace
chunk never exist. This path is the oracle for kernels. Rows are compacted by the caller: a row of ``hidden_NH`` is a
response token, nothing else reaches the LM head.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from unlearn_ds.types import LossOutput, PackedBatch, ReferenceRows

CHUNK_BYTES = 24 * 2**20
"""fp32 logits made at a time."""

SERIES_LIMIT = 2.0**-5
"""Below it exp(d) - 1 - d is summed as a series: the direct form loses all digits while the two models are close."""


def masked_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    batch: PackedBatch,
    reference: ReferenceRows | None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    workspace_bytes: int = 512 * 2**20,
) -> LossOutput:
    """Loss of one micro-batch: sum over rows of coefficient times cross-entropy or KL(reference || policy).

    Args:
        hidden_NH: final hidden states of the policy at the response rows, cross-entropy rows first.
        weight_VH: LM head of the policy; V may be padded beyond the vocabulary.
        batch: coefficients, targets and bounds of the rows.
        reference: hidden states and LM head of the frozen model for the last ``batch.num_kl_rows`` rows.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma). logit_scale: factor on logits (Cohere).
        workspace_bytes: size of the largest [rows, V] buffer.

    A sequence whose mean loss lies above its bound is left out of loss and gradient.
    A loss that is not finite poisons the gradient, so that the optimizer step is skipped whatever the precision.
    N may be 0: the loss is then 0 with zero gradients, so every rank takes part in every collective.
    """
    if (batch.num_kl_rows > 0) != (reference is not None):
        raise ValueError("KL rows need a reference, and a reference needs KL rows")
    head = _Head(weight_VH, softcap, logit_scale, workspace_bytes)
    coefficients_N = batch.coefficients_N
    if torch.isfinite(batch.bounds_S).any() and batch.num_response_tokens:
        coefficients_N = coefficients_N * _below_bound(hidden_NH, head, batch)
    reference_hidden, reference_weight = reference or (None, None)
    loss, loss_N = _MaskedLoss.apply(
        hidden_NH, weight_VH, coefficients_N, batch.targets_N, reference_hidden, reference_weight, head
    )
    return LossOutput(loss, loss_N)


def token_nll(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    workspace_bytes: int = 512 * 2**20,
) -> torch.Tensor:
    """Negative log-probability of each target, fp32 [N], without gradients; memory as in ``masked_loss``."""
    return _nll_rows(hidden_NH.detach(), _Head(weight_VH.detach(), softcap, logit_scale, workspace_bytes), targets_N)


def sequence_means(loss_N: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Mean loss of each sequence over its response tokens, fp32 [S]."""
    sums_S = torch.zeros_like(batch.bounds_S).index_add_(0, batch.sequence_N, loss_N)
    return sums_S / batch.sequence_lengths_S


class _Head:
    """The LM head as chunks of fp32 logits, and the way back from their gradients."""

    def __init__(self, weight_VH: torch.Tensor, softcap: float | None, logit_scale: float, workspace_bytes: int):
        self.weight_VH, self.softcap, self.logit_scale = weight_VH, softcap, logit_scale
        self._promoted: dict[int, torch.Tensor] = {}  # fp32 copies of the heads, made once a call
        row_bytes = 4 * max(1, weight_VH.shape[0])
        # A block's gradients of the logits stay until its two matrix products; fp32 work goes through it in chunks
        # small enough for the allocator to hand the same memory out again.
        self.block_rows = max(8, workspace_bytes // row_bytes)
        self.chunk_rows = max(8, min(workspace_bytes // 8, CHUNK_BYTES) // row_bytes)

    def blocks(self, num_rows: int) -> list[slice]:
        return [slice(a, min(a + self.block_rows, num_rows)) for a in range(0, num_rows, self.block_rows)]

    def chunks(self, start: int, stop: int) -> list[slice]:
        return [slice(a, min(a + self.chunk_rows, stop)) for a in range(start, stop, self.chunk_rows)]

    def logits(self, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, exact: bool) -> torch.Tensor:
        """fp32 logits of a chunk. ``exact``: never rounded to bf16, as a KL between close models needs."""
        if exact and hidden_NH.dtype != torch.float32 and hidden_NH.device.type == "cuda":
            logits = torch.mm(hidden_NH, weight_VH.t(), out_dtype=torch.float32)
        elif exact:
            if id(weight_VH) not in self._promoted:
                self._promoted[id(weight_VH)] = _promote(weight_VH)
            logits = torch.mm(_promote(hidden_NH), self._promoted[id(weight_VH)].t())
        else:
            logits = torch.mm(hidden_NH, weight_VH.t()).to(_promote(hidden_NH).dtype)
        if self.logit_scale != 1.0:
            logits *= self.logit_scale
        if self.softcap is not None:
            logits = torch.tanh_(logits.div_(self.softcap)).mul_(self.softcap)
        return logits

    def undo(self, gradient_NV: torch.Tensor, logits_NV: torch.Tensor) -> torch.Tensor:
        """Carry a gradient with respect to the final logits back through softcap and scale."""
        if self.softcap is not None:
            gradient_NV = gradient_NV * (1 - (logits_NV / self.softcap) ** 2)
        return gradient_NV * self.logit_scale if self.logit_scale != 1.0 else gradient_NV


def _promote(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@torch.no_grad()
def _below_bound(hidden_NH: torch.Tensor, head: _Head, batch: PackedBatch) -> torch.Tensor:
    """1 for rows of sequences still below their bound, else 0 (fp32 [N]); costs one more product with the head."""
    bounded_N = torch.isfinite(batch.bounds_S)[batch.sequence_N]
    index = bounded_N.nonzero().squeeze(1)
    loss_N = torch.zeros_like(batch.coefficients_N)
    loss_N[index] = _nll_rows(hidden_NH[index], head, batch.targets_N[index]).to(loss_N.dtype)
    return (sequence_means(loss_N, batch) < batch.bounds_S)[batch.sequence_N].to(batch.coefficients_N.dtype)


@torch.no_grad()
def _nll_rows(hidden_NH: torch.Tensor, head: _Head, targets_N: torch.Tensor) -> torch.Tensor:
    loss_N = torch.empty(targets_N.shape, dtype=_promote(hidden_NH).dtype, device=hidden_NH.device)
    for rows in head.chunks(0, targets_N.numel()):
        logits_CV = head.logits(hidden_NH[rows], head.weight_VH, exact=False)
        target_C = logits_CV.gather(1, targets_N[rows, None]).squeeze(1)
        loss_N[rows] = torch.logsumexp(logits_CV, dim=1) - target_C
    return loss_N


def _cross_entropy_chunk(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [C] and its gradient [C, V] (softmax minus one-hot), both fp32."""
    target_C = logits_CV.gather(1, targets_C[:, None]).squeeze(1)
    loss_C = torch.logsumexp(logits_CV, dim=1) - target_C
    gradient_CV = torch.softmax(logits_CV, dim=1)
    gradient_CV.scatter_add_(1, targets_C[:, None], -torch.ones_like(loss_C)[:, None])
    return loss_C, gradient_CV


def _kl_chunk(logits_CV: torch.Tensor, reference_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(reference || policy) [C] and its gradient [C, V], exact near zero.

    With d = log p - log p_ref the KL is the sum of p_ref * (exp(d) - 1 - d): every term is at least 0 and second order
    in d, where the textbook form subtracts first-order terms and loses all digits of a small KL.
    """
    logp_CV, logq_CV = torch.log_softmax(logits_CV, dim=1), torch.log_softmax(reference_CV, dim=1)
    q_CV = logq_CV.exp()
    # Without mass in the reference d means nothing (-inf minus -inf in a padded vocabulary); the policy's mass counts.
    d_CV = torch.where(q_CV > 0, logp_CV - logq_CV, 0.0)
    small_CV = d_CV.clamp(-SERIES_LIMIT, SERIES_LIMIT)
    series_CV = small_CV**2 * (0.5 + small_CV * (1 / 6 + small_CV * (1 / 24 + small_CV * (1 / 120))))
    is_small_CV = (d_CV.abs() < SERIES_LIMIT) & (q_CV > 0)
    difference_CV = torch.where(is_small_CV, q_CV * (small_CV + series_CV), logp_CV.exp() - q_CV)
    loss_C = torch.where(is_small_CV, q_CV * series_CV, difference_CV - q_CV * d_CV).sum(dim=1)
    return loss_C, difference_CV


class _MaskedLoss(torch.autograd.Function):
    """Loss and gradients in one pass over row chunks; ``backward`` only scales what ``forward`` stored."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, coefficients_N, targets_N, reference_NH, reference_VH, head):
        num_rows = targets_N.numel()
        first_kl_row = num_rows - (0 if reference_NH is None else reference_NH.shape[0])
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = _promote(hidden_NH[:0]).dtype
        loss_N = torch.zeros(num_rows, dtype=wide, device=hidden_NH.device)
        grad_hidden = torch.zeros_like(hidden_NH) if needs_hidden else None
        blocks = head.blocks(num_rows)
        grad_weight = None
        if needs_weight:
            # One block is summed inside one matrix product; several are summed here, which needs fp32.
            grad_weight = torch.zeros_like(weight_VH, dtype=wide if len(blocks) > 1 else weight_VH.dtype)
        for block in blocks:
            border = min(max(first_kl_row, block.start), block.stop)
            gradient_BV = hidden_NH.new_empty(block.stop - block.start, weight_VH.shape[0])
            for rows in head.chunks(block.start, border) + head.chunks(border, block.stop):
                is_kl = rows.start >= first_kl_row
                logits_CV = head.logits(hidden_NH[rows], weight_VH, exact=is_kl)
                if is_kl:
                    there = slice(rows.start - first_kl_row, rows.stop - first_kl_row)
                    reference_CV = head.logits(reference_NH[there], reference_VH, exact=True)
                    loss_N[rows], gradient_CV = _kl_chunk(logits_CV, reference_CV)
                else:
                    loss_N[rows], gradient_CV = _cross_entropy_chunk(logits_CV, targets_N[rows])
                gradient_CV = head.undo(gradient_CV, logits_CV).mul_(coefficients_N[rows, None])
                gradient_BV[rows.start - block.start : rows.stop - block.start] = gradient_CV
            if needs_hidden:
                torch.mm(gradient_BV, weight_VH, out=grad_hidden[block])
            if needs_weight and len(blocks) == 1:
                grad_weight = torch.mm(gradient_BV.t(), hidden_NH)
            elif needs_weight:
                grad_weight += torch.mm(gradient_BV.t(), hidden_NH[block])
        # 0 * inf is NaN: rows that a bound has switched off may hold any loss without poisoning the sum.
        active_N = coefficients_N != 0
        loss = torch.where(active_N, loss_N * coefficients_N, 0.0).sum()
        poison = torch.where(torch.isfinite(loss), 1.0, float("nan")).to(wide)
        ctx.save_for_backward(
            grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight_VH.dtype), poison
        )
        ctx.mark_non_differentiable(loss_N)
        return loss, loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _grad_rows):
        grad_hidden, grad_weight, poison = ctx.saved_tensors
        scale = grad_loss * poison
        scaled = [None if g is None else g * scale.to(g.dtype) for g in (grad_hidden, grad_weight)]
        return scaled[0], scaled[1], None, None, None, None, None
