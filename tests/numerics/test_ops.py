"""The loss against a plain float64 computation that builds all logits."""

from __future__ import annotations

import loss_cases
import pytest
import torch
import torch.nn.functional as F
from loss_cases import HIDDEN, Result, assert_close, loss_batch, loss_options, make_case, ours, truth
from torch.utils._python_dispatch import TorchDispatchMode

from unlearn_ds import ops
from unlearn_ds.kernels import rows_torch
from unlearn_ds.registry import KERNELS, resolve

pytestmark = pytest.mark.usefixtures("kernel")
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


def test_a_vocabulary_of_several_blocks_equals_float64():
    case = make_case(3, 3, 20011, seed=1)  # a Triton program takes 8192 columns at a time
    assert_close(ours(case), truth(case))


@pytest.mark.parametrize("scale", [100.0, 3000.0])
def test_confident_and_huge_logits_equal_float64(scale):
    case = make_case(12, 8, 131)
    case.hidden_NH[:6] = case.weight_VH[case.batch.targets_N[:6]]  # the target's own row of the head
    case = case._replace(hidden_NH=case.hidden_NH * scale)
    case.reference.hidden_NH.mul_(scale)
    result, expected = ours(case), truth(case)
    assert all(torch.isfinite(x).all() for x in result)
    # Logits of 1e4 are themselves off by 1e-3 in fp32, and so are the probabilities of two that compete.
    assert_close(result, expected, tolerance=1e-6 * scale)


@pytest.mark.parametrize("rows", [(13, 0), (13, 9)], ids=["ce", "mixed"])
@pytest.mark.parametrize("workspace_bytes", [512 * 2**20, 1], ids=["one_block", "many_blocks"])
def test_label_smoothing_of_some_rows_equals_float64(rows, workspace_bytes):
    case = make_case(*rows, 123)
    case.batch.smoothing_N = torch.zeros(sum(rows)).index_fill_(0, torch.arange(4, 11), 0.2)
    result = ours(case, workspace_bytes=workspace_bytes)
    assert_close(result, truth(case))
    logits = (case.hidden_NH @ case.weight_VH.t())[4:11]
    theirs = F.cross_entropy(logits, case.batch.targets_N[4:11], reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(result.loss_N[4:11], theirs)


def test_label_smoothing_leaves_out_a_padded_vocabulary():
    case = make_case(4, 0, 131)
    case.hidden_NH[:, -1] = 1.0
    case.weight_VH[123:] = 0.0
    case.weight_VH[123:, -1] = float("-inf")
    case.batch.targets_N.remainder_(123)
    case.batch.smoothing_N = torch.full((4,), 0.2)
    bare = case._replace(weight_VH=case.weight_VH[:123].clone())
    padded, expected = ours(case, train_hidden=False), ours(bare, train_hidden=False)
    torch.testing.assert_close(padded.loss_N, expected.loss_N)
    torch.testing.assert_close(padded.grad_weight[:123], expected.grad_weight)
    assert not padded.grad_weight[123:].any()


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

    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        self.num_bytes = max([self.num_bytes, *(x.nbytes for x in made)])
        return out


@pytest.mark.parametrize("rows", [(80, 0), (0, 80), (40, 40)], ids=["ce", "kl", "mixed"])
def test_logits_of_all_rows_never_exist(rows, monkeypatch):
    """Defect D24: the published code holds several copies of [all positions, vocabulary]."""
    monkeypatch.setattr(rows_torch, "CACHE_BYTES", 4 * 4096)  # its buffers do not grow with the rows
    case = make_case(*rows, vocab=4096)
    with Largest() as largest:
        ours(case, workspace_bytes=30 * 4096 * 4)
    assert largest.num_bytes <= 4 * 30 * 4096


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
    output = ops.masked_loss(case.hidden_NH.requires_grad_(), case.weight_VH, case.batch, None, loss_options())
    assert output.loss.requires_grad and not output.loss_N.requires_grad


def test_a_reference_without_kl_rows_is_refused_and_the_other_way_round():
    with_kl, without = make_case(2, 2, 17), make_case(4, 0, 17)
    with pytest.raises(ValueError, match="KL rows need as many of the reference"):
        ops.masked_loss(with_kl.hidden_NH, with_kl.weight_VH, with_kl.batch, None)
    with pytest.raises(ValueError, match="KL rows need as many of the reference"):
        ops.masked_loss(without.hidden_NH, without.weight_VH, without.batch, with_kl.reference)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_reference_of_another_number_of_rows_is_refused(num_rows):
    case = make_case(2, 2, 17)
    reference = case.reference._replace(hidden_NH=torch.randn(num_rows, case.hidden_NH.shape[1]))
    with pytest.raises(ValueError, match=f"2 KL rows need as many of the reference; there are {num_rows}"):
        ops.masked_loss(case.hidden_NH, case.weight_VH, case.batch, reference)


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


# bf16


@pytest.mark.parametrize("workspace_bytes", [512 * 2**20, 1], ids=["one_block", "many_blocks"])
@pytest.mark.parametrize("rows", [(61, 0), (0, 40), (61, 40)], ids=["ce", "kl", "mixed"])
def test_bf16_error_is_at_most_that_of_torch(kernel, rows, workspace_bytes):
    case = make_case(*rows, 1031, dtype=torch.bfloat16)
    exact = truth(case)
    torch_result = truth(case, dtype=torch.bfloat16)
    result = ours(case, workspace_bytes=workspace_bytes)
    assert result.grad_hidden.dtype == result.grad_weight.dtype == torch.bfloat16
    assert result.loss.dtype == result.loss_N.dtype == torch.float32
    for name, a, t, e in zip(Result._fields, result, torch_result, exact, strict=True):
        error, allowed = (a.double() - e).abs().max(), (t.double() - e).abs().max()
        factor = 2 if kernel == "triton" else 1  # its interpreter cuts bf16 off where a GPU rounds
        assert error <= factor * allowed + 1e-3 * e.abs().max(), f"{name}: {error} against {allowed} of torch"


@pytest.mark.parametrize("rows", [(61, 0), (0, 40), (61, 40)], ids=["ce", "kl", "mixed"])
def test_what_lies_behind_a_row_in_memory_does_not_reach_gradients(rows, monkeypatch):
    """oneDNN's tiles (AMX) multiply it by 0; here it is NaN."""
    case = make_case(*rows, 1031, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        result = ours(case)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(result.grad_hidden).all() and torch.isfinite(result.grad_weight).all()


# What backward refuses


@pytest.mark.parametrize("outer", [0.3, -1 / 3])
def test_an_outer_factor_is_not_rounded_to_the_type_of_the_gradients(outer):
    scale_ = resolve("kernel", loss_cases.KERNEL, KERNELS).scale_
    ones = torch.ones(64, 64, dtype=torch.bfloat16)
    numbers = torch.linspace(1, 2, 64 * 64).view(64, 64).bfloat16()
    exact = numbers.double() * torch.tensor(outer).double()
    actual = scale_(numbers.clone(), torch.tensor(outer)).double()
    assert ((actual - exact).abs() <= 2**-7 * exact.abs()).all()  # one unit: the interpreter cuts instead of rounding
    assert scale_(ones, torch.tensor(1.0)) is ones and (ones == 1).all()
    rounded = numbers.double() * torch.tensor(outer).bfloat16().double()
    assert (actual - exact).norm() < (actual - rounded).norm()


def test_a_target_outside_the_vocabulary_is_no_silent_number():
    case = make_case(4, 0, 123)
    case.batch.targets_N[2] = -100
    if loss_cases.KERNEL == "triton":  # a kernel cannot raise without the host waiting for it
        result = ours(case)
        assert torch.isnan(result.loss) and torch.isnan(result.grad_weight).all()
    else:
        with pytest.raises(RuntimeError, match="out of bounds"):
            ours(case)


def test_a_backward_through_a_kept_graph_raises_too():
    case = make_case(4, 0, 123)
    loss = ops.masked_loss(case.hidden_NH.requires_grad_(), case.weight_VH, case.batch, None, loss_options()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_second_backward_raises():
    case = make_case(4, 0, 123)
    loss = ops.masked_loss(case.hidden_NH.requires_grad_(), case.weight_VH, case.batch, None, loss_options()).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_gradient_of_the_gradient_raises():
    case = make_case(4, 0, 123)
    hidden, outer = case.hidden_NH.requires_grad_(), torch.ones((), requires_grad=True)
    loss = ops.masked_loss(hidden, case.weight_VH, case.batch, None, loss_options()).loss * outer
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
