"""The two ways in which the torch rows compute a KL: through the cache, and plain where that cannot be."""

from __future__ import annotations

import pytest
import torch
from loss_cases import textbook_kl

from unlearn_ds.kernels import rows_torch


@pytest.mark.parametrize("way", ["fast", "plain"])
@pytest.mark.parametrize("distance", [1e-6, 1e-5, 1e-3, 2**-5 * 1.01, 0.3, 5.0, 25.0])
def test_both_ways_keep_as_many_digits_as_the_logits_have(way, distance):
    draw = torch.Generator().manual_seed(6)
    reference = torch.randn(7, 997, generator=draw)
    logits = reference + distance * torch.randn(7, 997, generator=draw)
    if way == "fast":
        found = rows_torch._forward_kl_in(torch.empty(6, 7, 997), logits.clone(), reference.clone())
    else:
        found = rows_torch.forward_kl(logits, reference)
    for value, expected in zip(found, textbook_kl(logits, reference), strict=True):
        # fp32 log-probabilities of about 7 are themselves off by 4e-7.
        assert (value.double() - expected).norm() < max(1e-5, 5e-7 / distance) * expected.norm()
    assert (found[0] >= 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 500.0])
def test_the_fast_way_refuses_what_it_would_get_wrong(value):
    logits, reference = torch.zeros(2, 50), torch.zeros(2, 50)
    logits[0, 3] = value
    reference[1, 4] = -500.0
    assert rows_torch._forward_kl_in(torch.empty(6, 2, 50), logits, reference) is None
