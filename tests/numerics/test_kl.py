"""The KL where its textbook form loses its digits: near zero, and where one model has no mass."""

from __future__ import annotations

import pytest
import torch
from loss_cases import assert_close, kl_of_logits, make_case, ours, textbook_kl, truth

from unlearn_ds.types import ReferenceRows

pytestmark = pytest.mark.usefixtures("kernel")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 0.5}, {"workspace_bytes": 1}])
def test_identical_models_give_exactly_zero_kl_and_gradient(dtype, options):
    case = make_case(0, 19, 1031, dtype=dtype)
    case = case._replace(reference=ReferenceRows(case.hidden_NH.clone(), case.weight_VH.clone()))
    result = ours(case, **options)
    assert result.loss == 0 and not result.loss_N.any()
    assert not result.grad_hidden.any() and not result.grad_weight.any()


def test_small_kl_keeps_its_digits_in_fp32():
    draw = torch.Generator().manual_seed(1)
    reference = torch.randn(6, 32003, generator=draw) * 2
    logits = reference + torch.randn(6, 32003, generator=draw) * 1e-4
    loss, gradient = kl_of_logits(logits, reference)
    expected, expected_gradient = textbook_kl(logits, reference)
    assert (expected < 1e-7).all() and (expected > 0).all()
    assert ((loss.double() - expected) / expected).abs().max() < 1e-3
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-2


def test_small_kl_from_perturbed_hidden_states_keeps_its_digits():
    # fp32 logits of size about 2 are themselves off by 1e-7 or so: with 1e-3 between the models that stays below 1e-3.
    case = make_case(0, 6, 4099)
    noise = torch.randn(case.hidden_NH.shape, generator=torch.Generator().manual_seed(2)) * 1e-3
    case = case._replace(reference=ReferenceRows(case.hidden_NH + noise, case.weight_VH.clone()))
    result, expected = ours(case), truth(case)
    assert ((result.loss_N - expected.loss_N) / expected.loss_N).abs().max() < 1e-3


@pytest.mark.parametrize("distance", [1e-3, 2**-5 * 0.99, 2**-5 * 1.01, 0.1, 3.0, 30.0])
def test_series_and_direct_form_agree_with_float64_at_every_distance(distance):
    draw = torch.Generator().manual_seed(3)
    reference = torch.randn(4, 997, generator=draw)
    logits = reference + distance * torch.randn(4, 997, generator=draw).sign()
    loss, gradient = kl_of_logits(logits, reference)
    expected, expected_gradient = textbook_kl(logits, reference)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-7)


def test_kl_is_never_negative():
    draw = torch.Generator().manual_seed(4)
    reference = torch.randn(64, 997, generator=draw) * 5
    for distance in (1e-8, 1e-6, 1e-4, 1e-2, 1.0):
        logits = reference + torch.randn(64, 997, generator=draw) * distance
        assert (kl_of_logits(logits, reference)[0] >= 0).all(), distance


def test_padded_vocabulary_of_minus_infinity_takes_no_part_in_kl():
    draw = torch.Generator().manual_seed(5)
    logits, reference = torch.randn(4, 50, generator=draw), torch.randn(4, 50, generator=draw)
    padding = torch.full((4, 14), float("-inf"))
    loss, gradient = kl_of_logits(torch.cat([logits, padding], 1), torch.cat([reference, padding], 1))
    bare_loss, bare_gradient = kl_of_logits(logits, reference)
    torch.testing.assert_close(loss, bare_loss)
    torch.testing.assert_close(gradient[:, :50], bare_gradient)
    assert not gradient[:, 50:].any()


def test_padded_vocabulary_of_hugely_negative_logits_takes_no_part_in_the_loss():
    case = make_case(5, 4, 123)
    # A constant last hidden unit and a head row that only reads it: logits of -1e6 whatever the rest says.
    for hidden in (case.hidden_NH, case.reference.hidden_NH):
        hidden[:, -1] = 1.0
    for weight in (case.weight_VH, case.reference.weight_VH):
        weight[100:] = 0.0
        weight[100:, -1] = -1e6
    case.batch.targets_N.remainder_(100)
    result, expected = ours(case), truth(case)
    assert_close(result, expected)
    assert not result.grad_weight[100:].any()


@pytest.mark.parametrize("nowhere", [-200.0, float("-inf")])
def test_kl_pulls_policy_mass_from_where_the_reference_has_none(nowhere):
    reference = torch.zeros(1, 5)
    reference[0, 4] = nowhere  # exp(-200) is 0 in fp32
    logits = torch.zeros(1, 5)
    loss, gradient = kl_of_logits(logits, reference)
    torch.testing.assert_close(loss, torch.tensor([1.25]).log(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, torch.tensor([[-0.05, -0.05, -0.05, -0.05, 0.2]]))
