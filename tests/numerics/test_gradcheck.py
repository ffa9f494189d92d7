"""The torch row kernel in float64, where finite differences are a truth of their own.

Not by ``torch.autograd.gradcheck``, which goes backward through one graph twice: the loss hands its gradients out once.
"""

from __future__ import annotations

import pytest
import torch
from loss_cases import loss_options, make_case, ours

from unlearn_ds import ops
from unlearn_ds.types import ReferenceRows

STEP = 1e-6


@pytest.mark.parametrize("smoothing", [None, 0.3])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.7}], ids=["plain", "capped"])
@pytest.mark.parametrize("rows", [(5, 0), (0, 4), (5, 4)], ids=["ce", "kl", "mixed"])
def test_gradients_equal_central_differences_in_float64(rows, options, smoothing):
    case = make_case(*rows, 11, dtype=torch.float64)
    case.batch.smoothing_N = None if smoothing is None else torch.full((sum(rows),), smoothing)
    result = ours(case, **options)

    def loss(**moved):
        inputs = {"hidden_NH": case.hidden_NH, "weight_VH": case.weight_VH, **moved}
        return ops.masked_loss(*inputs.values(), case.batch, case.reference, loss_options(**options)).loss

    draw = torch.Generator().manual_seed(0)
    for name, gradient in (("hidden_NH", result.grad_hidden), ("weight_VH", result.grad_weight)):
        for _ in range(20):
            direction = torch.randn(gradient.shape, generator=draw, dtype=torch.float64)
            value = getattr(case, name)
            ahead, behind = (loss(**{name: value + sign * STEP * direction}) for sign in (1, -1))
            expected = (ahead - behind) / (2 * STEP)
            torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-6, atol=1e-7)


def test_identical_models_give_exactly_zero_kl_and_gradient_in_float64():
    case = make_case(0, 19, 1031, dtype=torch.float64)
    result = ours(case._replace(reference=ReferenceRows(case.hidden_NH.clone(), case.weight_VH.clone())))
    assert result.loss == 0 and not result.loss_N.any()
    assert not result.grad_hidden.any() and not result.grad_weight.any()
