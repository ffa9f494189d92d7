"""The Triton path on a GPU: errors no larger than torch's own, memory within the workspace, no race, no waiting."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_cases import Case, Result, loss_batch, loss_options, make_case, ours, truth

from unlearn_ds import ops
from unlearn_ds.types import ReferenceRows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
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


def test_identical_models_give_exactly_zero():
    case = on_gpu(make_case(0, 300, 32000, dtype=torch.bfloat16))
    case = case._replace(reference=ReferenceRows(case.hidden_NH.clone(), case.weight_VH.clone()))
    result = ours(case)
    assert result.loss == 0 and not result.grad_hidden.any() and not result.grad_weight.any()


@pytest.mark.parametrize("rows", [(2048, 0), (1024, 1024)], ids=["ce", "mixed"])
def test_peak_memory_stays_within_the_workspace_and_the_gradients(rows):
    vocab, workspace = 32000, 128 * MIB
    case = on_gpu(make_case(*rows, vocab, dtype=torch.bfloat16))
    hidden, weight = case.hidden_NH.requires_grad_(), case.weight_VH.requires_grad_()

    def call():
        ops.masked_loss(
            hidden, weight, case.batch, case.reference, loss_options(workspace_bytes=workspace)
        ).loss.backward()

    call()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    beyond = torch.cuda.max_memory_allocated() - before
    # fp32 sum of the head's gradient over blocks, its bf16 copy, and both hidden gradients.
    assert beyond <= workspace + weight.numel() * 6 + 3 * hidden.nbytes + 2 * MIB


def test_the_host_never_waits_for_the_device():
    case = on_gpu(make_case(64, 32, 32000, dtype=torch.bfloat16, lengths=[64, 32], bounds=[50.0, float("inf")]))
    ours(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(case, outer=torch.tensor(-0.5, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_elements_than_32_bits_can_count():
    rows, vocab, width = 17_000, 131_072, 8
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocab, (rows,), device="cuda")
    batch = loss_batch(torch.full((rows,), 1 / rows), targets.cpu()).to(torch.device("cuda"))
    case = Case(hidden, weight, batch, None)
    result = ours(case, workspace_bytes=12 * 2**30)
    last = torch.nn.functional.cross_entropy((hidden[-1:].float() @ weight.float().t()), targets[-1:])
    torch.testing.assert_close(result.loss_N[-1], last, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tool", ["racecheck", "memcheck"])
def test_the_sanitizer_finds_nothing(tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    script = Path(__file__).parents[1] / "sanitized.py"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
