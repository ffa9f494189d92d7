"""Losses, gradients and statistics of rows of logits, a Triton kernel each: NVIDIA GPUs, or Triton's interpreter.

A program holds a row and reads it twice: the first sweep gives log-sum-exps, the second loss and gradient, so that a KL
is summed in the form that is exact near zero at no extra traffic (its mathematics: ``rows_torch.forward_kl``). The
gradient is written over the row that is being read, in the type of the hidden states: fp32 logits, bf16 gradient, one
buffer. Values are widened as they are loaded: Triton's interpreter gets bf16 arithmetic wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK, NUM_WARPS = 8192, 16
"""Columns of a row in flight. 32768 with 32 warps spills registers; see tests/numerics/test_compiled.py."""
SCALE_BLOCK = 4096


@triton.jit
def _logits(pointer, columns, inside, scale, softcap, CAPPED: tl.constexpr):
    """fp32 logits of a block of columns; -inf outside the vocabulary."""
    x = tl.load(pointer + columns, mask=inside, other=0.0).to(tl.float32) * scale
    if CAPPED:
        # tanh without libdevice, which the interpreter lacks; exp overflows to inf, which gives 1.
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))
    return tl.where(inside, x, float("-inf"))


@triton.jit
def _online(x, maximum, total):
    """Take a block into a running (maximum, sum of exponentials below it).

    A maximum starts at -3e38, not at -inf: a block of columns without any mass would give inf - inf.
    """
    higher = tl.maximum(maximum, tl.max(x, 0))
    return higher, total * tl.exp(maximum - higher) + tl.sum(tl.exp(x - higher), 0)


@triton.jit
def _slope(x, scale, softcap, CAPPED: tl.constexpr):
    """Derivative of the logits with respect to the outputs of the head."""
    return scale * (1.0 - (x / softcap) * (x / softcap)) if CAPPED else scale


@triton.jit
def _target(x_row, target, vocab, scale, softcap, CAPPED: tl.constexpr):
    """Logit of the target; NaN, which poisons the whole loss, for one outside the vocabulary."""
    x = tl.load(x_row + target, mask=(target >= 0) & (target < vocab), other=float("nan")).to(tl.float32) * scale
    return softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0)) if CAPPED else x


@triton.jit
def _store(g_row, columns, inside, change):
    # Where the gradient lies over the outputs, all of a block is read before any of it is written.
    tl.debug_barrier()
    tl.store(g_row + columns, change.to(g_row.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy_kernel(
    outputs, output_stride, gradient, gradient_stride, targets, coefficients, smoothing, losses, vocab, scale, softcap,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row, g_row = outputs + row * output_stride, gradient + row * gradient_stride
    coefficient = tl.load(coefficients + row).to(tl.float32)
    target = tl.load(targets + row)
    x_target = _target(x_row, target, vocab, scale, softcap, CAPPED)
    maximum, total, finite_sum, num_finite = -3.0e38, 0.0, 0.0, 0.0
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = _logits(x_row, columns, columns < vocab, scale, softcap, CAPPED)
        maximum, total = _online(x, maximum, total)
        if SMOOTHED:
            is_finite = x > float("-inf")
            finite_sum += tl.sum(tl.where(is_finite, x, 0.0), 0)
            num_finite += tl.sum(is_finite.to(tl.float32), 0)
    log_total = tl.log(total)
    loss = (maximum - x_target) + log_total
    mass, spread = 1.0, 0.0
    if SMOOTHED:
        share = tl.load(smoothing + row).to(tl.float32)
        mass, spread = 1.0 - share, share / num_finite
        loss = mass * loss + share * ((maximum - finite_sum / num_finite) + log_total)
    tl.store(losses + row, loss)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab
        x = _logits(x_row, columns, inside, scale, softcap, CAPPED)
        change = tl.exp(x - maximum - log_total) - tl.where(columns == target, mass, 0.0)
        if SMOOTHED:
            change -= tl.where(x > float("-inf"), spread, 0.0)
        _store(g_row, columns, inside, change * coefficient * _slope(x, scale, softcap, CAPPED))


@triton.jit
def forward_kl_kernel(
    outputs, output_stride, reference, reference_stride, gradient, gradient_stride, coefficients, losses, vocab, scale,
    softcap, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row, r_row = outputs + row * output_stride, reference + row * reference_stride
    g_row = gradient + row * gradient_stride
    coefficient = tl.load(coefficients + row).to(tl.float32)
    p_max, p_sum, q_max, q_sum = -3.0e38, 0.0, -3.0e38, 0.0
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab
        p_max, p_sum = _online(_logits(x_row, columns, inside, scale, softcap, CAPPED), p_max, p_sum)
        q_max, q_sum = _online(_logits(r_row, columns, inside, scale, softcap, CAPPED), q_max, q_sum)
    p_log, q_log = tl.log(p_sum), tl.log(q_sum)
    # Maxima and logarithms are kept apart until their differences: both cancel exactly for identical models.
    shift = (p_max - q_max) + (p_log - q_log)
    loss = 0.0
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab
        x = _logits(x_row, columns, inside, scale, softcap, CAPPED)
        r = _logits(r_row, columns, inside, scale, softcap, CAPPED)
        p, q = tl.exp(x - p_max - p_log), tl.exp(r - q_max - q_log)
        # Without mass in the reference d means nothing; the policy's mass counts.
        d = tl.where(q > 0.0, (x - r) - shift, 0.0)
        small = tl.minimum(tl.maximum(d, -0.03125), 0.03125)  # SERIES_LIMIT of rows_torch
        series = small * small * (0.5 + small * (1.0 / 6 + small * (1.0 / 24 + small * (1.0 / 120))))
        is_small = (tl.abs(d) < 0.03125) & (q > 0.0)
        change = tl.where(is_small, q * (small + series), p - q)
        loss += tl.sum(tl.where(is_small, q * series, change - q * d), 0)
        _store(g_row, columns, inside, change * coefficient * _slope(x, scale, softcap, CAPPED))
    tl.store(losses + row, loss)


@triton.jit
def statistics_kernel(
    outputs, output_stride, targets, logps, entropies, tops, vocab, scale, softcap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row = outputs + row * output_stride
    x_target = _target(x_row, tl.load(targets + row), vocab, scale, softcap, CAPPED)
    maximum, total, weighted = -3.0e38, 0.0, 0.0
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = _logits(x_row, columns, columns < vocab, scale, softcap, CAPPED)
        higher = tl.maximum(maximum, tl.max(x, 0))
        shrink = tl.exp(maximum - higher)
        mass = tl.exp(x - higher)
        # Of x - maximum, not of x: their mean cancels against the logarithm with no large number in between.
        below = tl.where(mass > 0.0, x - higher, 0.0)
        weighted = shrink * (weighted + (maximum - higher) * total) + tl.sum(mass * below, 0)
        total = total * shrink + tl.sum(mass, 0)
        maximum = higher
    tl.store(logps + row, (x_target - maximum) - tl.log(total))
    tl.store(entropies + row, tl.log(total) - weighted / total)
    tl.store(tops + row, (x_target >= maximum).to(tl.int8))


@triton.jit
def scale_kernel(tensor, factor, numel, BLOCK: tl.constexpr):
    """Multiply by a scalar on the device; nothing is read or written where it is 1, and the host never looks."""
    value = tl.load(factor).to(tl.float32)
    if value == 1.0:
        return
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(tensor + index, mask=index < numel, other=0.0).to(tl.float32)
    tl.store(tensor + index, (x * value).to(tensor.dtype.element_ty), mask=index < numel)


class TritonRows:
    """The contract of ``rows_torch.TorchRows``, fp32 outputs only."""

    in_place = True

    @staticmethod
    def cross_entropy(
        outputs_CV: torch.Tensor,
        targets_C: torch.Tensor,
        coefficients_C: torch.Tensor,
        gradient_CV: torch.Tensor,
        smoothing_C: torch.Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Loss of each row, [C]; see ``rows_torch.TorchRows``. A target outside the vocabulary gives NaN."""
        loss_C = torch.empty_like(coefficients_C)
        cross_entropy_kernel[loss_C.shape](
            outputs_CV, outputs_CV.stride(0), gradient_CV, gradient_CV.stride(0), targets_C, coefficients_C,
            coefficients_C if smoothing_C is None else smoothing_C, loss_C,
            SMOOTHED=smoothing_C is not None, **_form(outputs_CV, scale, softcap),
        )  # fmt: skip
        return loss_C

    @staticmethod
    def forward_kl(
        outputs_CV: torch.Tensor,
        reference_CV: torch.Tensor,
        coefficients_C: torch.Tensor,
        gradient_CV: torch.Tensor,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """KL(reference || policy) of each row, [C]; see ``rows_torch.TorchRows.forward_kl``."""
        loss_C = torch.empty_like(coefficients_C)
        forward_kl_kernel[loss_C.shape](
            outputs_CV, outputs_CV.stride(0), reference_CV, reference_CV.stride(0), gradient_CV, gradient_CV.stride(0),
            coefficients_C, loss_C, **_form(outputs_CV, scale, softcap),
        )  # fmt: skip
        return loss_C

    @staticmethod
    def statistics(
        outputs_CV: torch.Tensor, targets_C: torch.Tensor, *, scale: float = 1.0, softcap: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(log-probability, entropy, whether no token is likelier) of each row; see ``rows_torch.TorchRows``."""
        logp_C, entropy_C = outputs_CV.new_empty(2, len(targets_C))
        top_C = torch.empty_like(targets_C, dtype=torch.int8)
        statistics_kernel[logp_C.shape](
            outputs_CV, outputs_CV.stride(0), targets_C, logp_C, entropy_C, top_C, **_form(outputs_CV, scale, softcap)
        )
        return logp_C, entropy_C, top_C.bool()

    @staticmethod
    def scale_(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Multiply a contiguous ``tensor`` in place by a scalar on the device; see ``rows_torch.TorchRows``."""
        if tensor.numel():
            grid = (triton.cdiv(tensor.numel(), SCALE_BLOCK),)
            scale_kernel[grid](tensor, factor, tensor.numel(), BLOCK=SCALE_BLOCK)
        return tensor


def _form(outputs_CV: torch.Tensor, scale: float, softcap: float | None) -> dict[str, Any]:
    """What every kernel of rows is told: size of the vocabulary, map to logits, and how it is cut."""
    vocab = outputs_CV.shape[1]
    return {
        "vocab": vocab, "scale": scale, "softcap": 1.0 if softcap is None else softcap, "CAPPED": softcap is not None,
        "BLOCK": min(BLOCK, triton.next_power_of_2(vocab)), "num_warps": NUM_WARPS,
    }  # fmt: skip
