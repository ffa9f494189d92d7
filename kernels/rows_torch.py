"""Losses, gradients and statistics of rows of logits in plain torch: every device, fp32 and float64.

A row goes through its passes while it lies in the cache. The same functions in ``rows_triton.py`` are one kernel each.
"""

from __future__ import annotations

import torch

SERIES_LIMIT = 2.0**-5
"""Below it exp(d) - 1 - d is summed as a series: the direct form loses all digits while the two models are close."""

CACHE_BYTES = 2**20
"""fp32 logits that go through all passes at a time."""


class TorchRows:
    """Rows of logits in torch; see ``losses`` for the contract that every row kernel keeps."""

    in_place = False
    """Whether ``losses`` can write a gradient of a narrower type over the outputs it reads."""

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
        """Loss of each row, [C]; its gradient with respect to ``outputs_CV``, times its coefficient, is written.

        Args:
            outputs_CV: products of hidden states and LM head, fp32 or float64; of no use afterwards.
            targets_C: token of each cross-entropy row; not read for KL rows.
            coefficients_C: signed weight of each row.
            gradient_CV: where the gradient goes; ``outputs_CV`` itself is allowed.
            reference_KV: outputs of the frozen model for the last K rows, whose loss is KL(reference || policy); of no
                use afterwards. The loss of the C - K rows before them is cross-entropy.
            smoothing_C: label smoothing of each cross-entropy row, over the columns whose logits are finite.
            scale, softcap: logits are ``softcap * tanh(scale * outputs / softcap)``, or ``scale * outputs``.
        """
        num_rows, vocab = outputs_CV.shape
        first_kl = num_rows - (0 if reference_KV is None else reference_KV.shape[0])
        loss_C = torch.empty(num_rows, dtype=outputs_CV.dtype, device=outputs_CV.device)
        for rows in _in_cache(0, first_kl, vocab, outputs_CV.device):
            logits_CV = _logits_(outputs_CV[rows], scale, softcap)
            smoothing = None if smoothing_C is None else smoothing_C[rows]
            loss_C[rows], change_CV = cross_entropy(logits_CV, targets_C[rows], smoothing)
            _chain_(change_CV, logits_CV, scale, softcap)
            torch.mul(change_CV, coefficients_C[rows, None], out=gradient_CV[rows])
        for rows in _in_cache(first_kl, num_rows, vocab, outputs_CV.device):
            logits_CV = _logits_(outputs_CV[rows], scale, softcap)
            there = slice(rows.start - first_kl, rows.stop - first_kl)
            loss_C[rows], change_CV = forward_kl(logits_CV, _logits_(reference_KV[there], scale, softcap))
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
        for rows in _in_cache(0, *outputs_CV.shape, outputs_CV.device):
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
        """Multiply ``tensor`` by a scalar in place; nothing is read where that changes nothing."""
        if factor.device.type == "cpu" and factor == 1:
            return tensor
        return tensor.mul_(factor.to(tensor.dtype))


def cross_entropy(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, smoothing_C: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [C] and its gradient [C, V], softmax minus the (smoothed) one-hot target."""
    logp_CV = torch.log_softmax(logits_CV, dim=1)
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


def _in_cache(start: int, stop: int, vocab: int, device: torch.device) -> list[slice]:
    # On a GPU a launch costs more than the cache saves.
    rows = max(1, CACHE_BYTES // (4 * vocab)) if device.type == "cpu" else max(1, 2**28 // (4 * vocab))
    return [slice(a, min(a + rows, stop)) for a in range(start, stop, rows)]


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
