"""Log-probabilities, entropies and top-1 agreement without gradients, against a plain float64 computation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from loss_cases import HIDDEN, loss_options, make_case, ours, plain_logits

from unlearn_ds import ops

pytestmark = pytest.mark.usefixtures("kernel")


@pytest.mark.parametrize("vocab", [2, 123, 4099])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 0.5}], ids=["plain", "capped"])
@pytest.mark.parametrize("scale", [0.01, 1.0], ids=["flat", "usual"])
def test_statistics_equal_float64(vocab, options, scale):
    case = make_case(29, 0, vocab)
    hidden = case.hidden_NH * scale
    found = ops.token_statistics(hidden, case.weight_VH, case.batch.targets_N, loss_options(**options))
    cap, factor = options.get("softcap"), options.get("logit_scale", 1.0)
    logits = plain_logits(hidden.double(), case.weight_VH.double(), cap, factor)
    logp = torch.log_softmax(logits, 1)
    expected = logp.gather(1, case.batch.targets_N[:, None]).squeeze(1)
    torch.testing.assert_close(found.logp_N.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found.entropy_N.double(), torch.special.entr(logp.exp()).sum(1), rtol=1e-4, atol=5e-6)
    assert torch.equal(found.is_top_N, logits.argmax(1) == case.batch.targets_N)
    assert not found.logp_N.requires_grad


def test_a_certain_token_has_no_entropy_and_is_the_top():
    hidden, weight = torch.eye(3, HIDDEN) * 1e4, torch.eye(7, HIDDEN)
    found = ops.token_statistics(hidden, weight, torch.tensor([0, 1, 5]), loss_options())
    assert found.is_top_N.tolist() == [True, True, False]
    assert found.logp_N.tolist() == [0, 0, -1e4] and found.entropy_N.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_bytes", [512 * 2**20, 1])
def test_log_probabilities_equal_cross_entropy_of_torch(dtype, workspace_bytes):
    case = make_case(29, 0, 4099, dtype=dtype)
    options = loss_options(workspace_bytes=workspace_bytes)
    logp = ops.token_statistics(case.hidden_NH, case.weight_VH, case.batch.targets_N, options).logp_N
    logits = (case.hidden_NH @ case.weight_VH.t()).float()
    assert logp.dtype == torch.float32
    torch.testing.assert_close(
        -logp, F.cross_entropy(logits, case.batch.targets_N, reduction="none"), rtol=2e-6, atol=0
    )


def test_statistics_of_no_rows_are_empty():
    weight, none = torch.randn(17, HIDDEN), torch.empty(0, dtype=torch.long)
    found = ops.token_statistics(torch.empty(0, HIDDEN), weight, none, loss_options())
    assert [x.shape for x in found] == [(0,)] * 3


def test_log_probabilities_equal_the_row_losses_of_training():
    case = make_case(9, 0, 123)
    options = {"softcap": 3.0, "logit_scale": 0.5}
    logp = ops.token_statistics(case.hidden_NH, case.weight_VH, case.batch.targets_N, loss_options(**options)).logp_N
    torch.testing.assert_close(-logp, ours(case, **options).loss_N)
