"""Losses, gradients and statistics of rows of logits, a Triton kernel each: NVIDIA GPUs, or Triton's interpreter.

A program holds a row. ``losses`` reads it twice: the first sweep gives the log-sum-exps of policy and reference, the
second loss and gradient, so that a KL is summed in the form that is exact near zero at no extra traffic (its
mathematics: ``rows_torch.forward_kl``). The gradient is written over the row that is being read, in the type of the
hidden states: fp32 logits, bf16 gradient, one buffer. Values are widened as they are loaded: Triton's
interpreter gets bf16 arithmetic wrong.
"""

from __future__ import annotations

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
    """Take a block into a running (maximum, sum of exponentials below it)."""
    higher = tl.maximum(maximum, tl.max(x, 0))
    return higher, total * tl.exp(maximum - higher) + tl.sum(tl.exp(x - higher), 0)


@triton.jit
def _slope(x, scale, softcap, CAPPED: tl.constexpr):
    """Derivative of the logits with respect to the outputs of the head."""
    return scale * (1.0 - (x / softcap) * (x / softcap)) if CAPPED else scale


@triton.jit
def losses_kernel(
    outputs, output_stride, reference, reference_stride, gradient, gradient_stride,
    targets, coefficients, smoothing, losses,
    vocab, first_kl, scale, softcap,
    HAS_KL: tl.constexpr, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row = outputs + row * output_stride
    g_row = gradient + row * gradient_stride
    coefficient = tl.load(coefficients + row).to(tl.float32)
    is_kl = row >= first_kl if HAS_KL else False
    lowest = -3.0e38  # not -inf: a block of columns without any mass must not give inf - inf
    if is_kl:
        r_row = reference + (row - first_kl) * reference_stride
        p_max, p_sum, q_max, q_sum = lowest, 0.0, lowest, 0.0
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
            p = tl.exp(x - p_max - p_log)
            q = tl.exp(r - q_max - q_log)
            # Without mass in the reference d means nothing; the policy's mass counts.
            d = tl.where(q > 0.0, (x - r) - shift, 0.0)
            small = tl.minimum(tl.maximum(d, -0.03125), 0.03125)
            series = small * small * (0.5 + small * (1.0 / 6 + small * (1.0 / 24 + small * (1.0 / 120))))
            is_small = (tl.abs(d) < 0.03125) & (q > 0.0)
            change = tl.where(is_small, q * (small + series), p - q)
            loss += tl.sum(tl.where(is_small, q * series, change - q * d), 0)
            change = change * coefficient * _slope(x, scale, softcap, CAPPED)
            # Where the gradient lies over the outputs, all of a block is read before any of it is written.
            tl.debug_barrier()
            tl.store(g_row + columns, tl.where(inside, change, 0.0).to(gradient.dtype.element_ty), mask=inside)
        tl.store(losses + row, loss)
    else:
        target = tl.load(targets + row)
        x_target = tl.load(x_row + target).to(tl.float32) * scale
        if CAPPED:
            x_target = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x_target / softcap) + 1.0))
        p_max, p_sum, finite_sum, num_finite = lowest, 0.0, 0.0, 0.0
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = _logits(x_row, columns, columns < vocab, scale, softcap, CAPPED)
            p_max, p_sum = _online(x, p_max, p_sum)
            if SMOOTHED:
                is_finite = x > float("-inf")
                finite_sum += tl.sum(tl.where(is_finite, x, 0.0), 0)
                num_finite += tl.sum(is_finite.to(tl.float32), 0)
        p_log = tl.log(p_sum)
        loss = (p_max - x_target) + p_log
        mass, spread = 1.0, 0.0
        if SMOOTHED:
            share = tl.load(smoothing + row).to(tl.float32)
            mass, spread = 1.0 - share, share / num_finite
            loss = mass * loss + share * ((p_max - finite_sum / num_finite) + p_log)
        tl.store(losses + row, loss)
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocab
            x = _logits(x_row, columns, inside, scale, softcap, CAPPED)
            change = tl.exp(x - p_max - p_log) - tl.where(columns == target, mass, 0.0)
            if SMOOTHED:
                change -= tl.where(x > float("-inf"), spread, 0.0)
            change = change * coefficient * _slope(x, scale, softcap, CAPPED)
            tl.debug_barrier()
            tl.store(g_row + columns, tl.where(inside, change, 0.0).to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def statistics_kernel(
    outputs, output_stride, targets, logps, entropies, tops, vocab, scale, softcap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row = outputs + row * output_stride
    x_target = tl.load(x_row + tl.load(targets + row)).to(tl.float32) * scale
    if CAPPED:
        x_target = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x_target / softcap) + 1.0))
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
    def losses(
        outputs_CV: torch.Tensor,
        targets_C: torch.Tensor,
        coefficients_C: torch.Tensor,
        gradient_CV: torch.Tensor,
        *,
        reference_KV: torch.Tensor | None = None,
        smoothing_C: torch.Tensor | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Loss of each row, [C]; see ``rows_torch.TorchRows.losses``."""
        num_rows, vocab = outputs_CV.shape
        loss_C = torch.empty(num_rows, dtype=torch.float32, device=outputs_CV.device)
        if num_rows == 0:
            return loss_C
        has_kl = reference_KV is not None
        reference = reference_KV if has_kl else outputs_CV
        losses_kernel[(num_rows,)](
            outputs_CV, outputs_CV.stride(0), reference, reference.stride(0), gradient_CV, gradient_CV.stride(0),
            targets_C, coefficients_C, coefficients_C if smoothing_C is None else smoothing_C, loss_C,
            vocab, num_rows - (reference.shape[0] if has_kl else 0), scale, 1.0 if softcap is None else softcap,
            HAS_KL=has_kl, CAPPED=softcap is not None, SMOOTHED=smoothing_C is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocab)), num_warps=NUM_WARPS,
        )  # fmt: skip
        return loss_C

    @staticmethod
    def statistics(
        outputs_CV: torch.Tensor, targets_C: torch.Tensor, *, scale: float = 1.0, softcap: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(log-probability, entropy, whether no token is likelier) of each row; see ``rows_torch.TorchRows``."""
        num_rows, vocab = outputs_CV.shape
        logp_C, entropy_C = outputs_CV.new_empty(2, num_rows)
        top_C = torch.empty(num_rows, dtype=torch.int8, device=outputs_CV.device)
        if num_rows:
            statistics_kernel[(num_rows,)](
                outputs_CV, outputs_CV.stride(0), targets_C, logp_C, entropy_C, top_C, vocab, scale,
                1.0 if softcap is None else softcap, CAPPED=softcap is not None,
                BLOCK=min(BLOCK, triton.next_power_of_2(vocab)), num_warps=NUM_WARPS,
            )  # fmt: skip
        return logp_C, entropy_C, top_C.bool()

    @staticmethod
    def scale_(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Multiply a contiguous ``tensor`` by a scalar on the device, in place."""
        if tensor.numel():
            grid = (triton.cdiv(tensor.numel(), SCALE_BLOCK),)
            scale_kernel[grid](tensor, factor, tensor.numel(), BLOCK=SCALE_BLOCK)
        return tensor
