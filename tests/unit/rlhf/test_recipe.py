"""Flags of RLHF's recipe."""

from __future__ import annotations

import pytest

from unlearn_ds.config import UsageError
from unlearn_ds.rlhf import recipe


def test_flags_set_what_they_name_and_the_batch_is_the_runs():
    found = recipe.parse({"rlhf.ppo_epochs": "4", "rlhf.kl_coefficient": "0.1"}, batch=3)
    assert found == recipe.Recipe(batch=3, ppo_epochs=4, kl_coefficient=0.1)
    assert recipe.parse({"rlhf.batch": "2"}, batch=3).batch == 2


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"rlhf.ppo_epoch": "1"}, "did you mean --rlhf.ppo_epochs"),
        ({"rlhf.ppo_epochs": "1.5"}, "--rlhf.ppo_epochs takes a whole number above 0; got '1.5'"),
        ({"rlhf.sft_learning_rate": "fast"}, "--rlhf.sft_learning_rate takes a number above 0; got 'fast'"),
        ({"rlhf.sft_learning_rate": "-1"}, "takes a number above 0"),
    ],
)
def test_a_mistake_is_told(flags, told):
    with pytest.raises(UsageError, match=told):
        recipe.parse(flags, batch=1)


def test_a_step_takes_micro_batches_of_all_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert recipe.parse({}, batch=2, accumulation=4).samples_a_step == 24
