"""The bound on the ascent of a sequence, and losses that are not finite."""

from __future__ import annotations

import pytest
import torch
from loss_cases import Case, assert_close, make_case, ours, truth

from unlearn_ds import ops

pytestmark = pytest.mark.usefixtures("kernel")


def bounded_case(bounds) -> tuple[Case, list[slice]]:
    """Three cross-entropy sequences of 4 rows with mean losses near 0, in the middle, and high; then one of KL."""
    case = make_case(12, 4, 123, lengths=[4, 4, 4, 4], bounds=bounds)
    case.batch.coefficients_N[:12] = -0.25
    targets = (case.hidden_NH @ case.weight_VH.t()).sort(dim=1).indices
    case.batch.targets_N[:4], case.batch.targets_N[8:12] = targets[:4, -1], targets[8:12, 0]
    return case, [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 16)]


INF = float("inf")


def test_sequences_above_their_bound_get_no_gradient_and_the_others_the_same_as_before():
    free_case, rows = bounded_case([INF] * 4)
    means = ops.sequence_means(ours(free_case).loss_N, free_case.batch)
    assert means[0] < means[1] < means[2]
    bound = float(means[1] + means[2]) / 2
    case, _ = bounded_case([bound, bound, bound, INF])
    free, result = ours(free_case), ours(case)
    assert not result.grad_hidden[rows[2]].any()
    for kept in (rows[0], rows[1], rows[3]):
        assert torch.equal(result.grad_hidden[kept], free.grad_hidden[kept])
    masked, _ = bounded_case([INF] * 4)
    masked.batch.coefficients_N[rows[2]] = 0
    assert_close(result, truth(masked))
    assert torch.equal(result.loss_N, free.loss_N)  # a stopped sequence is still reported


def test_the_bound_looks_at_the_mean_of_a_sequence_not_at_its_tokens():
    case, rows = bounded_case([INF] * 4)
    losses = ours(case).loss_N[rows[1]]
    assert losses.max() > losses.mean() * 1.05
    bound = float(losses.mean() * 1.01)
    bounded, _ = bounded_case([INF, bound, INF, INF])
    assert torch.equal(ours(bounded).grad_hidden, ours(case).grad_hidden)


def test_a_bound_on_one_sequence_does_not_touch_unbounded_ones():
    case, rows = bounded_case([0.0, INF, INF, INF])
    free, _ = bounded_case([INF] * 4)
    result = ours(case)
    assert not result.grad_hidden[rows[0]].any()
    assert torch.equal(result.grad_hidden[4:], ours(free).grad_hidden[4:])


def impossible_target(bounds) -> Case:
    """Two sequences; the target of the first has probability 0, so its loss is infinite."""
    case = make_case(8, 0, 123, lengths=[4, 4], bounds=bounds)
    case.hidden_NH[:, -1] = 100.0
    case.weight_VH[7] = 0.0
    case.weight_VH[7, -1] = -3e38
    case.batch.targets_N[:4], case.batch.targets_N[4:] = 7, 8
    return case


def test_an_infinite_loss_poisons_every_gradient():
    result = ours(impossible_target([INF, INF]))
    assert not torch.isfinite(result.loss)
    assert result.grad_hidden.isnan().all() and result.grad_weight.isnan().all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_hidden_state_poisons_every_gradient(broken):
    case = make_case(5, 4, 123)
    case.hidden_NH[3, 0] = broken
    result = ours(case)
    assert not torch.isfinite(result.loss)
    assert result.grad_hidden.isnan().all() and result.grad_weight.isnan().all()


def test_an_infinite_loss_above_its_bound_stops_quietly():
    result = ours(impossible_target([6.0, INF]))
    assert torch.isfinite(result.loss)
    assert not result.grad_hidden[:4].any() and torch.isfinite(result.grad_hidden).all()
    assert torch.isfinite(result.grad_weight).all()


def test_a_target_outside_the_vocabulary_is_not_hidden_by_a_bound(kernel):
    case = make_case(8, 0, 123, lengths=[4, 4], bounds=[6.0, 6.0])
    case.batch.targets_N[1] = 123
    if kernel == "torch":
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            ours(case)
    else:
        result = ours(case)
        assert result.loss.isnan() and result.grad_hidden.isnan().all() and result.grad_weight.isnan().all()


def test_a_broken_hidden_state_is_not_hidden_by_a_bound():
    case = make_case(8, 0, 123, lengths=[4, 4], bounds=[6.0, 6.0])
    case.hidden_NH[0, 0] = float("nan")
    assert ours(case).grad_weight.isnan().any()
