"""FLOPs that the meter sees against torch's own counter, in each of TRL's trainers."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import CONFIGS
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from unlearn_ds.rlhf import stages
from unlearn_ds.rlhf.meter import Meter
from unlearn_ds.rlhf.preferences import padded
from unlearn_ds.rlhf.recipe import Recipe

PRODUCTS = ("aten.mm", "aten.addmm")
"""With weights; products of activations, in attention, are batched."""


def torchs(counter: FlopCounterMode) -> float:
    return sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if str(op).startswith(PRODUCTS))


@pytest.fixture
def trained_by(tmp_path, random_llama_dir):
    """(stage's function and its arguments) -> FLOPs of two steps by the meter and by torch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(random_llama_dir)
    end_id = tokenizer.eos_token_id
    tokenizer = padded(tokenizer, end_id)
    prompts = [[5, 6, 7, 8 + n] for n in range(8)]
    rows = {
        "demonstrations": [{"input_ids": [*p, *a, end_id], "labels": [-100] * 4 + [*a, end_id]}
                           for p, a in zip(prompts, (range(9, 12 + n) for n in range(8)), strict=True)],
        "pairs": [{"chosen_ids": [*p, 20, 21, end_id], "rejected_ids": [*p, 30, end_id]} for p in prompts],
        "prompts": [{"input_ids": p} for p in prompts],
    }  # fmt: skip

    def run(stage, *paths, rows_of, checkpointing=False):
        setting = stages.Setting(tokenizer, end_id, tmp_path, False, 6, 0, lambda: None, checkpointing, False)
        with FlopCounterMode(display=False) as counter:
            done = stage(*map(str, paths), rows[rows_of], Recipe(batch=4), setting, 2)
        assert len(done.steps) == 2 and done.samples == 4 and all(step.seconds > 0 for step in done.steps)
        return sum(step.flops for step in done.steps), torchs(counter), done.model

    return run


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_every_stage_are_those_of_torchs_counter(trained_by, random_llama_dir, checkpointing):
    ours, theirs, sft = trained_by(
        stages.sft, random_llama_dir, rows_of="demonstrations", checkpointing=checkpointing
    )  # fmt: skip
    assert ours == pytest.approx(theirs, rel=0.02)
    ours, theirs, reward = trained_by(stages.reward_model, sft, rows_of="pairs", checkpointing=checkpointing)
    assert ours == pytest.approx(theirs, rel=0.02)
    ours, theirs, _ = trained_by(stages.ppo, sft, reward, rows_of="prompts", checkpointing=checkpointing)
    assert ours == pytest.approx(theirs, rel=0.02)


def forward(model, meter, grad=True):
    """FLOPs of one pass over [2, 5] tokens by the meter and by torch."""
    with meter.watch(model), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
        logits = model(input_ids=torch.ones(2, 5, dtype=torch.long)).logits
        if grad:
            logits.sum().backward()
        meter.on_step_end()
    return meter.steps[0].flops, torchs(counter)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama_tied_with_biases", "gemma", "gpt_neox"])
@pytest.mark.parametrize("grad", [False, True])
def test_architectures_count_as_torch_counts(name, grad):
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="sdpa")
    ours, theirs = forward(model, Meter("", 1, lambda: None, lambda step: None, False), grad)
    assert ours == pytest.approx(theirs, rel=0.02)


def test_what_is_done_after_a_step_costs_nothing():
    model = torch.nn.Linear(4, 4)
    meter = Meter("", 2, lambda: None, lambda step: model(torch.ones(100, 4)), False)
    with meter.watch(model):
        for _ in range(2):
            model(torch.ones(1, 4))
            meter.on_step_end()
    # Its input is data, which has no gradient: forward, and the weight's gradient.
    assert [step.flops for step in meter.steps] == [2 * 2 * 16, 2 * 2 * 16]
