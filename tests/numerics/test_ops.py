"""The loss against a plain float64 computation that builds all logits."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from unlearn_ds import ops
from unlearn_ds.types import PackedBatch, ReferenceRows

HIDDEN = 24


class Case(NamedTuple):
    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    batch: PackedBatch
    reference: ReferenceRows | None


class Result(NamedTuple):
    loss: torch.Tensor
    loss_N: torch.Tensor
    grad_hidden: torch.Tensor | None
    grad_weight: torch.Tensor | None


def loss_batch(coefficients, targets, num_kl_rows=0, lengths=None, bounds=None) -> PackedBatch:
    """A batch that holds what the loss reads; the stream itself is of no interest here."""
    coefficients_N = torch.as_tensor(coefficients, dtype=torch.float32)
    lengths = [len(coefficients_N)] if lengths is None else lengths
    none = torch.empty(0, dtype=torch.long)
    return PackedBatch(
        input_ids_T=none,
        position_ids_T=none,
        cu_seqlens=none.int(),
        max_seqlen=0,
        loss_index_N=torch.arange(len(coefficients_N)),
        targets_N=torch.as_tensor(targets, dtype=torch.long),
        coefficients_N=coefficients_N,
        sequence_N=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long)),
        bounds_S=torch.tensor([float("inf")] * len(lengths) if bounds is None else bounds),
        sequence_lengths_S=torch.tensor(lengths, dtype=torch.float32),
        num_kl_rows=num_kl_rows,
    )


def make_case(num_ce: int, num_kl: int, vocab: int, dtype=torch.float32, seed=0, lengths=None, bounds=None) -> Case:
    draw = torch.Generator().manual_seed(seed)
    num_rows = num_ce + num_kl

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=draw) * scale).to(dtype)

    coefficients = torch.randn(num_rows, generator=draw)
    coefficients[num_ce:].abs_()
    targets = torch.randint(vocab, (num_rows,), generator=draw)
    reference = None
    hidden, weight = normal(num_rows, HIDDEN), normal(vocab, HIDDEN, scale=0.4)
    if num_kl:
        reference = ReferenceRows(normal(num_kl, HIDDEN), normal(vocab, HIDDEN, scale=0.4))
    return Case(hidden, weight, loss_batch(coefficients, targets, num_kl, lengths, bounds), reference)


def plain_logits(hidden, weight, softcap, logit_scale):
    logits = hidden @ weight.t() * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def truth(case: Case, softcap=None, logit_scale=1.0, dtype=torch.float64, outer=1.0) -> Result:
    """Plain autograd: full logits in ``dtype``, log_softmax in at least fp32, gather, the textbook KL."""
    hidden = case.hidden_NH.detach().to(dtype).requires_grad_()
    weight = case.weight_VH.detach().to(dtype).requires_grad_()
    batch = case.batch
    num_ce = batch.num_response_tokens - batch.num_kl_rows
    wide = torch.promote_types(dtype, torch.float32)
    logp = torch.log_softmax(plain_logits(hidden, weight, softcap, logit_scale).to(wide), dim=1)
    loss_N = -logp[:num_ce].gather(1, batch.targets_N[:num_ce, None]).squeeze(1)
    if case.reference is not None:
        there = plain_logits(*(x.to(dtype) for x in case.reference), softcap, logit_scale)
        logq = torch.log_softmax(there.to(wide), dim=1)
        loss_N = torch.cat([loss_N, (logq.exp() * (logq - logp[num_ce:])).sum(1)])
    loss = (loss_N * batch.coefficients_N.to(wide)).sum()
    (loss * outer).backward()
    return Result(loss.detach(), loss_N.detach(), hidden.grad, weight.grad)


def ours(case: Case, train_hidden=True, train_weight=True, outer=1.0, **options) -> Result:
    hidden = case.hidden_NH.clone().requires_grad_(train_hidden)
    weight = case.weight_VH.clone().requires_grad_(train_weight)
    output = ops.masked_loss(hidden, weight, case.batch, case.reference, **options)
    (output.loss * outer).backward()
    return Result(output.loss.detach(), output.loss_N, hidden.grad, weight.grad)


def assert_close(actual: Result, expected: Result, tolerance=2e-6) -> None:
    """Each value to ``tolerance`` of the largest entry of its tensor."""
    for name, a, e in zip(Result._fields, actual, expected, strict=True):
        assert a.shape == e.shape, name
        if e.numel():
            error = (a.double() - e.double()).abs().max().item()
            assert error <= tolerance * max(e.abs().max().item(), 1e-3), f"{name}: off by {error}"


ROWS = {"ce": (13, 0), "kl": (0, 9), "mixed": (13, 9), "one_ce": (1, 0), "one_kl": (0, 1)}


@pytest.mark.parametrize("vocab", [2, 123, 4099])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_loss_and_gradients_equal_float64(rows, vocab):
    case = make_case(*rows, vocab)
    assert_close(ours(case), truth(case))


@pytest.mark.parametrize("rows", [(13, 0), (13, 9)], ids=["ce", "mixed"])
@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"logit_scale": 0.25}, {"softcap": 2.0, "logit_scale": 1.7}])
def test_softcap_and_logit_scale_equal_float64(rows, options):
    case = make_case(*rows, 123)
    assert_close(ours(case, **options), truth(case, **options))


def test_coefficients_of_both_signs_and_zero_are_applied_as_written():
    case = make_case(6, 0, 123)
    case.batch.coefficients_N[:] = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    result = ours(case)
    assert_close(result, truth(case))
    assert not result.grad_hidden[2].any()


def test_ascent_is_the_exact_negative_of_descent():
    case = make_case(7, 0, 123)
    up = case._replace(batch=loss_batch(-case.batch.coefficients_N, case.batch.targets_N))
    descent, ascent = ours(case), ours(up)
    assert torch.equal(ascent.loss, -descent.loss)
    assert torch.equal(ascent.grad_weight, -descent.grad_weight)
    assert torch.equal(ascent.loss_N, descent.loss_N)  # what is reported keeps its sign


@pytest.mark.parametrize("outer", [-0.5, 3.0])
def test_outer_gradient_scales_both_gradients(outer):
    case = make_case(13, 9, 123)
    assert_close(ours(case, outer=outer), truth(case, outer=outer))


def test_no_rows_give_zero_loss_and_zero_gradients():
    case = make_case(0, 0, 123, lengths=[])
    result = ours(case)
    assert result.loss == 0 and result.loss_N.shape == (0,)
    assert result.grad_hidden.shape == (0, HIDDEN)
    assert result.grad_weight.shape == case.weight_VH.shape and not result.grad_weight.any()


def test_no_rows_with_a_bound_give_zero_loss():
    assert ours(make_case(0, 0, 123, lengths=[0], bounds=[5.0])).loss == 0


@pytest.mark.parametrize(
    "workspace_bytes", [1, 8 * 123 * 4 * 2, 20 * 123 * 4], ids=["smallest", "two_chunks", "ragged"]
)
@pytest.mark.parametrize("rows", [(37, 0), (0, 37), (21, 30)], ids=["ce", "kl", "mixed"])
def test_chunking_changes_nothing(rows, workspace_bytes):
    case = make_case(*rows, 123)
    assert_close(ours(case, workspace_bytes=workspace_bytes), ours(case), tolerance=1e-6)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *(x.numel() for x in made)])
        return out


@pytest.mark.parametrize("rows", [(400, 0), (0, 400), (200, 200)], ids=["ce", "kl", "mixed"])
def test_logits_of_all_rows_never_exist(rows):
    """Defect D24: the published code holds several copies of [all positions, vocabulary]."""
    case = make_case(*rows, vocab=4099)
    with Largest() as largest:
        ours(case, workspace_bytes=50 * 4099 * 4)
    assert largest.numel <= max(50 * 4099, 4099 * HIDDEN)


def test_chunking_with_softcap_equals_float64():
    case = make_case(21, 30, 123)
    assert_close(ours(case, softcap=2.0, workspace_bytes=1), truth(case, softcap=2.0))


def test_frozen_weight_gets_no_gradient_and_leaves_the_other_alone():
    case = make_case(13, 9, 123)
    result = ours(case, train_weight=False)
    assert result.grad_weight is None
    assert torch.equal(result.grad_hidden, ours(case).grad_hidden)


def test_frozen_hidden_gets_no_gradient_and_leaves_the_other_alone():
    case = make_case(13, 9, 123)
    result = ours(case, train_hidden=False)
    assert result.grad_hidden is None
    assert torch.equal(result.grad_weight, ours(case).grad_weight)


def test_row_losses_carry_no_gradient():
    case = make_case(4, 0, 123)
    output = ops.masked_loss(case.hidden_NH.requires_grad_(), case.weight_VH, case.batch, None)
    assert output.loss.requires_grad and not output.loss_N.requires_grad


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.7}], ids=["plain", "capped"])
@pytest.mark.parametrize("rows", [(5, 0), (0, 4), (5, 4)], ids=["ce", "kl", "mixed"])
def test_gradcheck_in_float64(rows, options):
    case = make_case(*rows, 11, dtype=torch.float64)
    arguments = [case.hidden_NH.requires_grad_(), case.weight_VH.requires_grad_()]

    def loss(hidden, weight):
        return ops.masked_loss(hidden, weight, case.batch, case.reference, **options).loss

    assert torch.autograd.gradcheck(loss, arguments)


def test_a_reference_without_kl_rows_is_refused_and_the_other_way_round():
    with_kl, without = make_case(2, 2, 17), make_case(4, 0, 17)
    with pytest.raises(ValueError, match="KL rows need a reference"):
        ops.masked_loss(with_kl.hidden_NH, with_kl.weight_VH, with_kl.batch, None)
    with pytest.raises(ValueError, match="KL rows need a reference"):
        ops.masked_loss(without.hidden_NH, without.weight_VH, without.batch, with_kl.reference)


# Reductions


def test_sequence_coefficients_give_the_mean_of_token_means():
    lengths = [1, 5, 3]
    case = make_case(9, 0, 123, lengths=lengths)
    per_token = torch.tensor([1 / (len(lengths) * n) for n in lengths for _ in range(n)])
    case.batch.coefficients_N[:] = per_token
    result = ours(case)
    means = [part.mean() for part in truth(case).loss_N.split(lengths)]
    torch.testing.assert_close(result.loss.double(), torch.stack(means).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        ops.sequence_means(result.loss_N, case.batch).double(), torch.stack(means), rtol=1e-6, atol=0
    )


def test_token_coefficients_give_the_mean_over_all_tokens():
    case = make_case(9, 0, 123, lengths=[1, 5, 3])
    case.batch.coefficients_N[:] = 1 / 9
    torch.testing.assert_close(ours(case).loss.double(), truth(case).loss_N.mean(), rtol=1e-6, atol=0)


# KL near zero and at the edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 0.5}, {"workspace_bytes": 1}])
def test_identical_models_give_exactly_zero_kl_and_gradient(dtype, options):
    case = make_case(0, 19, 1031, dtype=dtype)
    case = case._replace(reference=ReferenceRows(case.hidden_NH.clone(), case.weight_VH.clone()))
    result = ours(case, **options)
    assert result.loss == 0 and not result.loss_N.any()
    assert not result.grad_hidden.any() and not result.grad_weight.any()


def textbook_kl(logits, reference):
    logp, logq = (torch.log_softmax(x.double(), dim=1) for x in (logits, reference))
    return (logq.exp() * (logq - logp)).sum(1), logp.exp() - logq.exp()


def test_small_kl_keeps_its_digits_in_fp32():
    draw = torch.Generator().manual_seed(1)
    reference = torch.randn(6, 32003, generator=draw) * 2
    logits = reference + torch.randn(6, 32003, generator=draw) * 1e-4
    loss, gradient = ops._kl_chunk(logits, reference)
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
    loss, gradient = ops._kl_chunk(logits, reference)
    expected, expected_gradient = textbook_kl(logits, reference)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-7)


def test_kl_is_never_negative():
    draw = torch.Generator().manual_seed(4)
    reference = torch.randn(64, 997, generator=draw) * 5
    for distance in (1e-8, 1e-6, 1e-4, 1e-2, 1.0):
        logits = reference + torch.randn(64, 997, generator=draw) * distance
        assert (ops._kl_chunk(logits, reference)[0] >= 0).all(), distance


def test_padded_vocabulary_of_minus_infinity_takes_no_part_in_kl():
    draw = torch.Generator().manual_seed(5)
    logits, reference = torch.randn(4, 50, generator=draw), torch.randn(4, 50, generator=draw)
    padding = torch.full((4, 14), float("-inf"))
    loss, gradient = ops._kl_chunk(torch.cat([logits, padding], 1), torch.cat([reference, padding], 1))
    bare_loss, bare_gradient = ops._kl_chunk(logits, reference)
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
    loss, gradient = ops._kl_chunk(logits, reference)
    torch.testing.assert_close(loss, torch.tensor([1.25]).log(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, torch.tensor([[-0.05, -0.05, -0.05, -0.05, 0.2]]))


# bf16


@pytest.mark.parametrize("workspace_bytes", [512 * 2**20, 1], ids=["one_block", "many_blocks"])
@pytest.mark.parametrize("rows", [(61, 0), (0, 40), (61, 40)], ids=["ce", "kl", "mixed"])
def test_bf16_error_is_at_most_twice_that_of_torch(rows, workspace_bytes):
    case = make_case(*rows, 1031, dtype=torch.bfloat16)
    exact = truth(case)
    torch_result = truth(case, dtype=torch.bfloat16)
    result = ours(case, workspace_bytes=workspace_bytes)
    assert result.grad_hidden.dtype == result.grad_weight.dtype == torch.bfloat16
    assert result.loss.dtype == result.loss_N.dtype == torch.float32
    for name, a, t, e in zip(Result._fields, result, torch_result, exact, strict=True):
        error, allowed = (a.double() - e).abs().max(), (t.double() - e).abs().max()
        assert error <= 2 * allowed + 1e-3 * e.abs().max(), f"{name}: {error} against {allowed} of torch"


# The forget bound


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


def test_a_broken_hidden_state_is_not_hidden_by_a_bound():
    case = make_case(8, 0, 123, lengths=[4, 4], bounds=[6.0, 6.0])
    case.hidden_NH[0, 0] = float("nan")
    assert ours(case).grad_weight.isnan().any()


# Scoring, and what backward refuses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_bytes", [512 * 2**20, 1])
def test_token_nll_equals_cross_entropy_of_torch(dtype, workspace_bytes):
    case = make_case(29, 0, 4099, dtype=dtype)
    nll = ops.token_nll(case.hidden_NH, case.weight_VH, case.batch.targets_N, workspace_bytes=workspace_bytes)
    logits = (case.hidden_NH @ case.weight_VH.t()).float()
    assert nll.dtype == torch.float32 and not nll.requires_grad
    torch.testing.assert_close(nll, F.cross_entropy(logits, case.batch.targets_N, reduction="none"), rtol=2e-6, atol=0)


def test_token_nll_of_no_rows_is_empty():
    weight = torch.randn(17, HIDDEN)
    assert ops.token_nll(torch.empty(0, HIDDEN), weight, torch.empty(0, dtype=torch.long)).shape == (0,)


def test_token_nll_equals_the_row_losses_of_training():
    case = make_case(9, 0, 123)
    nll = ops.token_nll(case.hidden_NH, case.weight_VH, case.batch.targets_N, softcap=3.0, logit_scale=0.5)
    torch.testing.assert_close(nll, ours(case, softcap=3.0, logit_scale=0.5).loss_N)


def test_a_second_backward_raises():
    case = make_case(4, 0, 123)
    loss = ops.masked_loss(case.hidden_NH.requires_grad_(), case.weight_VH, case.batch, None).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_gradient_of_the_gradient_raises():
    case = make_case(4, 0, 123)
    hidden, outer = case.hidden_NH.requires_grad_(), torch.ones((), requires_grad=True)
    loss = ops.masked_loss(hidden, case.weight_VH, case.batch, None).loss * outer
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
