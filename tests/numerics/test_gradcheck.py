"""The torch row kernel in float64, where finite differences are a truth of their own."""

from __future__ import annotations

import pytest
import torch
from loss_cases import loss_options, make_case, ours

from unlearn_ds import ops
from unlearn_ds.types import ReferenceRows


@pytest.mark.parametrize("smoothing", [None, 0.3])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.7}], ids=["plain", "capped"])
@pytest.mark.parametrize("rows", [(5, 0), (0, 4), (5, 4)], ids=["ce", "kl", "mixed"])
def test_gradcheck_in_float64(rows, options, smoothing):
    case = make_case(*rows, 11, dtype=torch.float64)
    case.batch.smoothing_N = None if smoothing is None else torch.full((sum(rows),), smoothing)
    arguments = [case.hidden_NH.requires_grad_(), case.weight_VH.requires_grad_()]

    def loss(hidden, weight):
        return ops.masked_loss(hidden, weight, case.batch, case.reference, loss_options(**options)).loss

    assert torch.autograd.gradcheck(loss, arguments)


def test_identical_models_give_exactly_zero_kl_and_gradient_in_float64():
    case = make_case(0, 19, 1031, dtype=torch.float64)
    result = ours(case._replace(reference=ReferenceRows(case.hidden_NH.clone(), case.weight_VH.clone())))
    assert result.loss == 0 and not result.loss_N.any()
    assert not result.grad_hidden.any() and not result.grad_weight.any()
