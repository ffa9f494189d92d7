"""The compiled Triton kernels on a GPU: memory, large indices, and the gradient that overwrites what it comes from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import loss_cases
import pytest
import torch
from loss_cases import Case, loss_batch, loss_options, make_case, ours

from unlearn_ds import ops
from unlearn_ds.registry import KERNELS, resolve
from unlearn_ds.types import ReferenceRows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles kernels: run with -m gpu"),
]
MIB = 2**20
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setattr(loss_cases, "KERNEL", "triton")


def on_gpu(case: Case) -> Case:
    reference = case.reference and ReferenceRows(*(x.cuda() for x in case.reference))
    return Case(case.hidden_NH.cuda(), case.weight_VH.cuda(), case.batch.to(DEVICE), reference)


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


def test_a_row_beyond_32_bit_indices_is_right():
    rows, vocab, width = 17_000, 131_072, 8
    hidden = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(vocab, (rows,), device=DEVICE)
    batch = loss_batch(torch.full((rows,), 1 / rows), targets.cpu()).to(DEVICE)
    result = ours(Case(hidden, weight, batch, None), workspace_bytes=12 * 2**30)
    last = hidden[-1:].float().requires_grad_()
    loss = torch.nn.functional.cross_entropy(last @ weight.float().t(), targets[-1:])
    (loss / rows).backward()
    torch.testing.assert_close(result.loss_N[-1], loss.detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(result.grad_hidden[-1].float(), last.grad[0], rtol=3e-2, atol=1e-2 / rows)


@pytest.mark.parametrize("vocab", [20_011, 128_256])
def test_a_gradient_over_its_own_row_equals_one_beside_it_bit_for_bit(vocab):
    """A thread that writes before another has read would show here, in one of many rows and repetitions."""
    kernel = resolve("kernel", "triton", KERNELS)
    draw = torch.Generator(DEVICE).manual_seed(0)
    outputs, reference = (torch.randn(264, vocab, generator=draw, device=DEVICE) * 3 for _ in range(2))
    targets = torch.randint(vocab, (264,), generator=draw, device=DEVICE)
    ones = torch.ones(264, device=DEVICE)
    for _ in range(20):
        for call in (
            lambda x, g: kernel.cross_entropy(x, targets, ones, g),
            lambda x, g: kernel.forward_kl(x, reference, ones, g),
        ):
            beside = torch.empty(264, vocab, dtype=torch.bfloat16, device=DEVICE)
            loss_beside = call(outputs.clone(), beside)
            over = outputs.clone()
            gradient = over.view(torch.bfloat16)[:, :vocab]
            assert torch.equal(call(over, gradient), loss_beside)
            assert torch.equal(gradient, beside)


def test_a_target_outside_the_vocabulary_poisons_the_loss():
    case = on_gpu(make_case(4, 0, 4099, dtype=torch.bfloat16))
    case.batch.targets_N[2] = -100
    assert torch.isnan(ours(case).loss)


@pytest.mark.parametrize("tool", ["racecheck", "memcheck"])
def test_the_sanitizer_finds_nothing(tool):
    """racecheck watches shared memory (the reductions), memcheck addresses beyond an allocation."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    script = Path(__file__).parents[1] / "sanitized.py"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
