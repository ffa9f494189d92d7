"""The public maths: masked cross-entropy, masked forward KL and log-probabilities on response tokens only.

Rows are compacted by the caller: a row of ``hidden_NH`` is a response token, nothing else reaches the LM head. Large
matrix products are the vendor library's; what happens to a row of logits is a row kernel's (``registry.KERNELS``). The
gradient is made in the forward pass, block by block, so that logits of more than one workspace never exist, and the LM
head is read by one call of one module, as ZeRO-3 needs it.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from unlearn_ds.config import UsageError
from unlearn_ds.registry import KERNELS, resolve
from unlearn_ds.types import LossOutput, PackedBatch, ReferenceRows
from unlearn_ds.workspace import Plan, chunk_rows, clear_behind, rows_of_logits, wide_type

PANEL_BYTES = 16 * 2**20
"""Part of an LM head that is widened to fp32 at a time where the device cannot multiply bf16 into fp32."""


class LogitMap(NamedTuple):
    """From the output of the LM head to logits: ``softcap * tanh(scale * output / softcap)``, or ``scale * output``."""

    scale: float = 1.0
    softcap: float | None = None


class LossOptions(NamedTuple):
    """How a loss is computed: the map to logits, the bytes of the largest [rows, V] buffers, the row kernel."""

    logits: LogitMap = LogitMap()
    workspace_bytes: int = 512 * 2**20
    kernel: str = "torch"


DEFAULT = LossOptions()


class TokenStatistics(NamedTuple):
    """Of each target, [N]: log-probability, entropy of the distribution it is from, whether no token is likelier."""

    logp_N: torch.Tensor
    entropy_N: torch.Tensor
    is_top_N: torch.Tensor


def resolve_kernel(name: str, device: torch.device) -> tuple[str, str]:
    """Return (row kernel, reason). ``auto`` takes Triton's on a GPU; one that cannot work raises ``UsageError``."""
    missing = None
    if device.type != "cuda":
        missing = "needs a CUDA GPU"
    elif not importlib.util.find_spec("triton"):
        missing = "package triton is not installed"
    if name == "triton" and missing:
        raise UsageError(f"--engine.loss_kernel triton cannot be used: {missing}. Use --engine.loss_kernel auto.")
    if name != "auto":
        return name, "asked for"
    return ("torch", f"not triton: {missing}") if missing else ("triton", "the fastest")


def masked_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    batch: PackedBatch,
    reference: ReferenceRows | None,
    options: LossOptions = DEFAULT,
) -> LossOutput:
    """Loss of one micro-batch: sum over rows of coefficient times cross-entropy or KL(reference || policy).

    Args:
        hidden_NH: final hidden states of the policy at the response rows, cross-entropy rows first.
        weight_VH: LM head of the policy; V may be padded beyond the vocabulary.
        batch: coefficients, targets, bounds and label smoothing of the rows.
        reference: hidden states and LM head of the frozen model for the last ``batch.num_kl_rows`` rows.

    A sequence whose mean loss lies above its bound is left out of loss and gradient.
    A loss that is not finite poisons the gradient, so that the optimizer step is skipped whatever the precision.
    N may be 0: the loss is then 0 with zero gradients, so every rank takes part in every collective.
    """
    num_reference = 0 if reference is None else reference.hidden_NH.shape[0]
    if num_reference != batch.num_kl_rows:
        raise ValueError(f"{batch.num_kl_rows} KL rows need as many of the reference; there are {num_reference}")
    coefficients_N = batch.coefficients_N
    if batch.bounded_index is not None:
        coefficients_N = coefficients_N * _below_bound(hidden_NH, weight_VH, batch, options)
    reference_hidden, reference_weight = reference or (None, None)
    loss, loss_N = _MaskedLoss.apply(
        hidden_NH, weight_VH, coefficients_N, batch.targets_N, batch.smoothing_N, reference_hidden, reference_weight,
        options,
    )  # fmt: skip
    return LossOutput(loss, loss_N)


@torch.no_grad()
def token_statistics(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor, options: LossOptions = DEFAULT
) -> TokenStatistics:
    """Log-probability, entropy and top-1 agreement of each target without gradients, for one product with the head.

    Memory as in ``masked_loss``; logits are those of the cross-entropy rows there.
    """
    rows_of = resolve("kernel", options.kernel, KERNELS)
    num_rows, wide = targets_N.numel(), wide_type(hidden_NH)
    size = chunk_rows(hidden_NH, weight_VH.shape[0], options.workspace_bytes)
    buffer_CV = rows_of_logits(hidden_NH, min(size, num_rows), weight_VH.shape[0], wide)
    columns = [torch.empty_like(targets_N, dtype=dtype) for dtype in (wide, wide, torch.bool)]
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        outputs_CV = buffer_CV[: rows.stop - rows.start]
        _head_outputs(hidden_NH[rows], weight_VH, outputs_CV, exact=False)
        found = rows_of.statistics(outputs_CV, targets_N[rows], **options.logits._asdict())
        for column, values in zip(columns, found, strict=True):
            column[rows] = values
    return TokenStatistics(*columns)


def sequence_means(loss_N: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Mean loss of each sequence over its response tokens, fp32 [S]."""
    sums_S = torch.zeros_like(batch.bounds_S).index_add_(0, batch.sequence_N, loss_N)
    return sums_S / batch.sequence_lengths_S


@torch.no_grad()
def _below_bound(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, batch: PackedBatch, options: LossOptions
) -> torch.Tensor:
    """1 for rows of sequences still below their bound, else 0 (fp32 [N]); costs the bounded rows one more product.

    A mean that is not a number is below every bound: it has to poison the loss.
    """
    index = batch.bounded_index
    loss_N = torch.zeros_like(batch.coefficients_N)
    logp = token_statistics(hidden_NH[index], weight_VH, batch.targets_N[index], options).logp_N
    loss_N[index] = -logp.to(loss_N.dtype)
    above_S = sequence_means(loss_N, batch) >= batch.bounds_S
    return (~above_S)[batch.sequence_N].to(batch.coefficients_N.dtype)


def _head_outputs(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, out_CV: torch.Tensor, exact: bool) -> None:
    """Write the outputs of the head in fp32 (or float64) to ``out_CV``.

    exact: never rounded to bf16 on the way, as a KL between close models needs. CUDA never rounds them; a CPU cannot
    multiply bf16 into fp32, so there the head is widened, a panel at a time.
    """
    if hidden_CH.dtype == out_CV.dtype:
        torch.mm(hidden_CH, weight_VH.t(), out=out_CV)
    elif hidden_CH.device.type == "cuda":
        torch.mm(hidden_CH, weight_VH.t(), out_dtype=out_CV.dtype, out=out_CV)
    elif exact:
        wide_CH = hidden_CH.to(out_CV.dtype)
        size = max(1, PANEL_BYTES // (weight_VH.shape[1] * out_CV.element_size()))
        for a in range(0, weight_VH.shape[0], size):
            torch.mm(wide_CH, weight_VH[a : a + size].to(out_CV.dtype).t(), out=out_CV[:, a : a + size])
    else:
        out_CV.copy_(torch.mm(hidden_CH, weight_VH.t()))


class _MaskedLoss(torch.autograd.Function):
    """Loss and gradients in one pass over blocks of rows; ``backward`` only scales what ``forward`` stored."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH, weight_VH, coefficients_N, targets_N, smoothing_N, reference_NH, reference_VH, options
    ):
        rows_of = resolve("kernel", options.kernel, KERNELS)
        num_rows, vocab, wide = targets_N.numel(), weight_VH.shape[0], wide_type(hidden_NH)
        first_kl = num_rows - (0 if reference_NH is None else reference_NH.shape[0])
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        plan = Plan.of(hidden_NH, vocab, num_rows, first_kl, rows_of.in_place, options.workspace_bytes)
        loss_N = torch.zeros(num_rows, dtype=wide, device=hidden_NH.device)
        grad_hidden = torch.empty_like(hidden_NH) if needs_hidden else None
        grad_weight = None
        if needs_weight:
            # One block is summed inside one matrix product; several are summed here, which needs fp32.
            grad_weight = torch.empty_like(weight_VH, dtype=wide if len(plan.blocks) > 1 else weight_VH.dtype)
            if not plan.blocks:
                grad_weight.zero_()
        for block in plan.blocks:
            size = block.stop - block.start
            block_CV = rows_of_logits(hidden_NH, size, vocab, wide if plan.over else hidden_NH.dtype)
            gradient_CV = block_CV.view(hidden_NH.dtype)[:, :vocab]
            for rows, is_kl in plan.parts(block):
                mine = slice(rows.start - block.start, rows.stop - block.start)
                outputs_CV = block_CV[mine] if plan.over else rows_of_logits(hidden_NH, _size(rows), vocab, wide)
                _head_outputs(hidden_NH[rows], weight_VH, outputs_CV, exact=is_kl)
                if is_kl:
                    there = slice(rows.start - first_kl, rows.stop - first_kl)
                    reference_CV = rows_of_logits(hidden_NH, _size(rows), vocab, wide)
                    _head_outputs(reference_NH[there], reference_VH, reference_CV, exact=True)
                    loss_N[rows] = rows_of.forward_kl(
                        outputs_CV, reference_CV, coefficients_N[rows], gradient_CV[mine], **options.logits._asdict()
                    )
                    del reference_CV
                else:
                    loss_N[rows] = rows_of.cross_entropy(
                        outputs_CV, targets_N[rows], coefficients_N[rows], gradient_CV[mine],
                        None if smoothing_N is None else smoothing_N[rows], **options.logits._asdict(),
                    )  # fmt: skip
                del outputs_CV
            clear_behind(block_CV, hidden_NH.dtype)
            rows = slice(block.start, block.stop)
            if needs_hidden:
                torch.mm(gradient_CV, weight_VH, out=grad_hidden[rows])
            if needs_weight:
                _add_product(grad_weight, gradient_CV, hidden_NH[rows], first=block.start == 0)
            del block_CV, gradient_CV  # before the next block's are made
        # 0 * inf is NaN: rows that a bound has switched off may hold any loss without poisoning the sum.
        active_N = coefficients_N != 0
        loss = torch.where(active_N, loss_N * coefficients_N, 0.0).sum()
        poison = torch.where(torch.isfinite(loss), 1.0, float("nan")).to(wide)
        ctx.save_for_backward(
            grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight_VH.dtype), poison
        )
        ctx.scale_, ctx.spent = rows_of.scale_, False
        ctx.mark_non_differentiable(loss_N)
        return loss, loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss, _grad_rows):
        if ctx.spent:
            raise RuntimeError("Trying to backward through the loss a second time: its gradients were handed out")
        ctx.spent = True  # what is stored is scaled in place
        grad_hidden, grad_weight, poison = ctx.saved_tensors
        scale = grad_loss * poison
        scaled = [None if g is None else ctx.scale_(g, scale) for g in (grad_hidden, grad_weight)]
        return (*scaled, None, None, None, None, None, None)


def _size(rows: slice) -> int:
    return rows.stop - rows.start


def _add_product(total_VH: torch.Tensor, gradient_CV: torch.Tensor, hidden_CH: torch.Tensor, first: bool) -> None:
    """Add gradient^T hidden to the weight's gradient; ``first``: there is nothing yet.

    A CPU rounds each bf16 product on the way to the fp32 sum: once a block, so its blocks are large.
    """
    transposed, beta = gradient_CV.t(), 0 if first else 1
    if total_VH.dtype == hidden_CH.dtype:
        torch.addmm(total_VH, transposed, hidden_CH, beta=beta, out=total_VH)
    elif hidden_CH.device.type == "cuda":
        torch.addmm(total_VH, transposed, hidden_CH, out_dtype=total_VH.dtype, beta=beta, out=total_VH)
    elif first:
        total_VH.copy_(torch.mm(transposed, hidden_CH))
    else:
        total_VH += torch.mm(transposed, hidden_CH)
