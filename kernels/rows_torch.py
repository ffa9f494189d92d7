"""Losses, gradients and statistics of rows of logits in plain torch: every device, fp32 and float64.

A row goes through its passes while it lies in the cache. In ``rows_triton.py`` each of these is one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

SERIES_LIMIT = 2.0**-5
"""Below it exp(d) - 1 - d is summed as a series: the direct form loses all digits while the two models are close."""

MOST = 80.0
"""Largest log p - log p_ref whose exponential fp32 holds."""

CACHE_BYTES = 2**20
"""fp32 logits that go through all passes at a time on a CPU."""
SLICE_BYTES = 2**26
"""The same on a GPU, where a launch costs more than its cache saves; a KL has ten times as much beside it."""


class TorchRows:
    """Rows of logits in torch; the contract that every row kernel keeps.

    Logits are ``softcap * tanh(scale * outputs / softcap)``, or ``scale * outputs`` without a cap, of the LM head's
    outputs in fp32 (here also float64). Outputs are of no use after a call.
    """

    in_place = False
    """Whether a gradient of a narrower type may be written over the outputs it comes from."""

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
        """Loss of each row, [C]; its gradient with respect to the outputs, times its coefficient, goes to
        ``gradient_CV``, which may be ``outputs_CV`` itself.

        smoothing_C: label smoothing of each row, over the columns whose logits are finite.
        """
        loss_C = torch.empty_like(coefficients_C, dtype=outputs_CV.dtype)
        for rows, scratch in _in_cache(outputs_CV, 1):
            logits_CV = _logits_(outputs_CV[rows], scale, softcap)
            smoothing = None if smoothing_C is None else smoothing_C[rows]
            loss_C[rows], change_CV = cross_entropy(logits_CV, targets_C[rows], smoothing, scratch[0])
            _chain_(change_CV, logits_CV, scale, softcap)
            torch.mul(change_CV, coefficients_C[rows, None], out=gradient_CV[rows])
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
        """KL(reference || policy) of each row, [C], from the outputs of both; the gradient as in ``cross_entropy``."""
        loss_C = torch.empty_like(coefficients_C, dtype=outputs_CV.dtype)
        for rows, scratch in _in_cache(outputs_CV, 6 if outputs_CV.device.type == "cpu" else 0):
            logits_CV = _logits_(outputs_CV[rows], scale, softcap)
            reference = _logits_(reference_CV[rows], scale, softcap)
            found = _forward_kl_in(scratch, logits_CV, reference) or forward_kl(logits_CV, reference)
            loss_C[rows], change_CV = found
            _chain_(change_CV, logits_CV, scale, softcap)
            torch.mul(change_CV, coefficients_C[rows, None], out=gradient_CV[rows])
        return loss_C

    @staticmethod
    def statistics(
        outputs_CV: torch.Tensor, targets_C: torch.Tensor, *, scale: float = 1.0, softcap: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(log-probability of the target, entropy of the distribution, whether no token is likelier), each [C].

        ``outputs_CV`` is of no use afterwards.
        """
        parts = []
        for rows, _ in _in_cache(outputs_CV, 0):
            logits_CV = _logits_(outputs_CV[rows], scale, softcap)
            target_C = logits_CV.gather(1, targets_C[rows, None]).squeeze(1)
            is_top_C = target_C >= logits_CV.amax(1)
            logp_CV = torch.log_softmax(logits_CV, dim=1)
            logp_C = logp_CV.gather(1, targets_C[rows, None]).squeeze(1)
            # Where there is no mass 0 * -inf would be NaN.
            parts.append((logp_C, -(logp_CV.exp() * logp_CV.clamp(min=-1e4)).sum(1), is_top_C))
        if not parts:
            empty = outputs_CV.new_empty(0)
            return empty, empty, empty.bool()
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    @staticmethod
    def scale_(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Multiply ``tensor`` in place by an fp32 scalar, which is not rounded to the tensor's type."""
        if factor.device.type == "cpu":
            return tensor if factor == 1 else tensor.mul_(float(factor))
        for part in tensor.split(4096):
            part.copy_(part * factor.expand(part.shape[-1]))
        return tensor


def cross_entropy(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, smoothing_C: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Loss [C] and its gradient [C, V] (``out``), softmax minus the (smoothed) one-hot target."""
    logp_CV = torch.log_softmax(logits_CV, dim=1, out=out)
    loss_C = -logp_CV.gather(1, targets_C[:, None]).squeeze(1)
    mass_C1 = torch.ones_like(loss_C)[:, None]
    if smoothing_C is None:
        gradient_CV = logp_CV.exp_()
    else:
        smoothing_C = smoothing_C.to(loss_C.dtype)
        finite_CV = torch.isfinite(logp_CV)
        num_finite_C = finite_CV.sum(1).to(loss_C.dtype)
        mean_C = torch.where(finite_CV, logp_CV, 0.0).sum(1) / num_finite_C
        loss_C = (1 - smoothing_C) * loss_C - smoothing_C * mean_C
        gradient_CV = logp_CV.exp_().sub_(finite_CV * (smoothing_C / num_finite_C)[:, None])
        mass_C1 = (1 - smoothing_C)[:, None]
    gradient_CV.scatter_add_(1, targets_C[:, None], -mass_C1)
    return loss_C, gradient_CV


def forward_kl(logits_CV: torch.Tensor, reference_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(reference || policy) [C] and its gradient [C, V], exact near zero.

    With d = log p - log p_ref the KL is the sum of p_ref * (exp(d) - 1 - d): every term is at least 0 and second order
    in d, where the textbook form subtracts first-order terms and loses all digits of a small KL.
    """
    logp_CV, logq_CV = torch.log_softmax(logits_CV, dim=1), torch.log_softmax(reference_CV, dim=1)
    q_CV = logq_CV.exp()
    # Without mass in the reference d means nothing (-inf minus -inf in a padded vocabulary); the policy's mass counts.
    d_CV = torch.where(q_CV > 0, logp_CV - logq_CV, 0.0)
    small_CV = d_CV.clamp(-SERIES_LIMIT, SERIES_LIMIT)
    series_CV = (small_CV * (1 / 120)).add_(1 / 24).mul_(small_CV).add_(1 / 6).mul_(small_CV).add_(0.5)
    series_CV.mul_(small_CV).mul_(small_CV)
    is_small_CV = (d_CV.abs() < SERIES_LIMIT) & (q_CV > 0)
    difference_CV = torch.where(is_small_CV, q_CV * (small_CV + series_CV), logp_CV.exp_() - q_CV)
    loss_C = torch.where(is_small_CV, q_CV * series_CV, difference_CV - q_CV * d_CV).sum(dim=1)
    return loss_C, difference_CV


def _forward_kl_in(
    scratch: torch.Tensor, logits_CV: torch.Tensor, reference_CV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``forward_kl`` without masks, which are slow on a CPU, and in memory that is there. None where it cannot be.

    p - p_ref is p_ref * expm1(d). With t = d cut to the range of the series, exp(d) - 1 - d is the series at t plus the
    difference of the direct form between d and t, which is exactly 0 where nothing was cut.
    """
    if logits_CV.device.type != "cpu":
        return None  # the look at the extremes would wait for the device
    d, q, e, t, s, u = scratch
    torch.log_softmax(logits_CV, dim=1, out=d)
    torch.log_softmax(reference_CV, dim=1, out=q)
    lowest, highest = torch.sub(d, q, out=d).aminmax()
    if not (lowest > -1e4 and highest < MOST):
        return None  # no mass in one of the models, or NaN
    torch.expm1(d, out=e)
    torch.clamp(d, -SERIES_LIMIT, SERIES_LIMIT, out=t)
    torch.mul(t, 1 / 120, out=s).add_(1 / 24).mul_(t).add_(1 / 6).mul_(t).add_(0.5).mul_(t).mul_(t)
    if max(-lowest, highest) > SERIES_LIMIT:
        s.add_(torch.sub(e, d, out=u).sub_(torch.expm1(t, out=d)).add_(t))
    return s.mul_(q.exp_()).sum(dim=1), e.mul_(q)


def _in_cache(outputs_CV: torch.Tensor, num_scratch: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows that fit the cache, with so many buffers of their size: fresh memory would cost more than what it is for."""
    num_rows, vocab = outputs_CV.shape
    size = max(1, (CACHE_BYTES if outputs_CV.device.type == "cpu" else SLICE_BYTES) // (4 * vocab))
    buffers = outputs_CV.new_empty(num_scratch, min(size, num_rows), vocab)
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        yield rows, buffers[:, : rows.stop - start]


def _logits_(outputs_CV: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    if scale != 1.0:
        outputs_CV.mul_(scale)
    return outputs_CV if softcap is None else outputs_CV.div_(softcap).tanh_().mul_(softcap)


def _chain_(gradient_CV: torch.Tensor, logits_CV: torch.Tensor, scale: float, softcap: float | None) -> None:
    """Carry a gradient with respect to the logits back to the outputs, in place."""
    if softcap is not None:
        gradient_CV.mul_(1 - (logits_CV / softcap) ** 2)
    if scale != 1.0:
        gradient_CV.mul_(scale)
