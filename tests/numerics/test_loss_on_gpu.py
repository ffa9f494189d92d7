"""The loss on a GPU with each row kernel: errors no larger than torch's own, and a host that never waits."""

from __future__ import annotations

import os

import pytest
import torch
from loss_cases import Case, Result, make_case, ours, truth

from unlearn_ds.types import ReferenceRows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles kernels: run with -m gpu"),
    pytest.mark.usefixtures("kernel"),
]
MIB = 2**20


def on_gpu(case: Case) -> Case:
    reference = case.reference and ReferenceRows(*(x.cuda() for x in case.reference))
    return Case(case.hidden_NH.cuda(), case.weight_VH.cuda(), case.batch.to(torch.device("cuda")), reference)


@pytest.mark.parametrize("workspace_bytes", [512 * MIB, 1], ids=["one_block", "many_blocks"])
@pytest.mark.parametrize("vocab", [123, 4099, 32000])
@pytest.mark.parametrize("rows", [(256, 0), (0, 200), (256, 128)], ids=["ce", "kl", "mixed"])
def test_bf16_error_is_at_most_that_of_torch(rows, vocab, workspace_bytes):
    case = on_gpu(make_case(*rows, vocab, dtype=torch.bfloat16))
    exact, theirs = truth(case), truth(case, dtype=torch.bfloat16)
    result = ours(case, workspace_bytes=workspace_bytes)
    for name, a, t, e in zip(Result._fields, result, theirs, exact, strict=True):
        error, allowed = (a.double() - e).norm(), (t.double() - e).norm()
        assert error <= allowed + 1e-3 * e.norm(), f"{name}: {error / e.norm():.1e} against {allowed / e.norm():.1e}"


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 0.5}], ids=["plain", "capped"])
def test_identical_models_give_exactly_zero(options):
    case = on_gpu(make_case(0, 300, 32000, dtype=torch.bfloat16))
    case = case._replace(reference=ReferenceRows(case.hidden_NH.clone(), case.weight_VH.clone()))
    result = ours(case, **options)
    assert result.loss == 0 and not result.grad_hidden.any() and not result.grad_weight.any()


def test_the_host_never_waits_for_the_device():
    case = on_gpu(make_case(64, 32, 32000, dtype=torch.bfloat16, lengths=[64, 32], bounds=[50.0, float("inf")]))
    outer = torch.tensor(-0.5, device="cuda")
    expected = ours(case, outer=outer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            outer.item()  # the mode is in force
        result = ours(case, outer=outer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for actual, before in zip(result, expected, strict=True):
        torch.testing.assert_close(actual, before)
