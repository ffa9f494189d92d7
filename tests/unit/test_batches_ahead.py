"""Batches of the next step are made beside the present one, and are what the loader gives, in order."""

from __future__ import annotations

import types

import pytest
import torch

from unlearn_ds import loop
from unlearn_ds.config import RunConfig, UsageError, replace

STEPS = 5


def make_run(reference=None, loader=None):
    run = object.__new__(loop.Run)
    run.config = replace(RunConfig(), **{"optim.max_steps": STEPS})
    run.loader = loader or types.SimpleNamespace(micro_batches=lambda step: [f"batch {step}"])
    run.reference = reference
    run._pool, run._ahead = loop.ThreadPoolExecutor(1), {}
    return run


@pytest.mark.parametrize("first", [1, 3], ids=["whole", "resumed"])
def test_steps_get_their_own_batches_in_order(first):
    run = make_run()
    assert [run.batches(step) for step in range(first, STEPS + 1)] == [[f"batch {n - 1}"] for n in range(first, 6)]


def test_nothing_is_made_beyond_the_last_step():
    asked = []
    run = make_run(loader=types.SimpleNamespace(micro_batches=lambda step: asked.append(step) or []))
    for step in range(1, STEPS + 1):
        run.batches(step)
    run._pool.shutdown()
    assert asked == list(range(STEPS))


def test_the_reference_reads_what_the_next_step_needs_before_it_is_asked_for():
    read = []
    run = make_run(types.SimpleNamespace(fetch=read.append))
    run.batches(1)
    run._pool.shutdown()
    assert read == ["batch 0", "batch 1"]


def test_what_goes_wrong_beside_a_step_is_told_at_the_next():
    def micro_batches(step):
        if step == 1:
            raise UsageError("the reference cache lacks row x")
        return []

    run = make_run(loader=types.SimpleNamespace(micro_batches=micro_batches))
    run.batches(1)
    with pytest.raises(UsageError, match="lacks row x"):
        run.batches(2)


def test_pinned_batches_keep_everything(monkeypatch):
    from unlearn_ds.data.packing import Placed, pack
    from unlearn_ds.types import EncodedRow, Term

    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    rows = [EncodedRow((1, 2), (3,)), EncodedRow((1, 2), (4, 5))]
    batch = pack([Placed(row, 0, 1.0) for row in rows], [Term("a", "a", "ce", 1.0, 3.0)], share_prompts=True)
    pinned = batch.pinned()
    assert torch.equal(pinned.shared.stream_U, batch.shared.stream_U)
    assert pinned.shared.stream_U is not batch.shared.stream_U
    assert torch.equal(pinned.bounded_index, batch.bounded_index) and pinned.max_seqlen == batch.max_seqlen
