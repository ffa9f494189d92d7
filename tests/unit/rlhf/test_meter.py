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
from unlearn_ds.rlhf.preferences import Preferences, padded
from unlearn_ds.rlhf.recipe import Recipe
from unlearn_ds.rlhf.setting import Setting

PRODUCTS = ("aten.mm", "aten.addmm")
"""With weights; products of activations, in attention, are batched."""


def torchs(counter: FlopCounterMode) -> float:
    return sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if str(op).startswith(PRODUCTS))


@pytest.fixture
def trained_by(tmp_path, random_llama_dir):
    """(stage's function and its arguments) -> FLOPs of two steps by the meter and by torch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(random_llama_dir)
    end_id = tokenizer.eos_token_id
    prompts = [[5, 6, 7, 8 + n] for n in range(8)]
    rows = {
        "demonstrations": [{"input_ids": [*p, *a, end_id], "labels": [-100] * 4 + [*a, end_id]}
                           for p, a in zip(prompts, (range(9, 12 + n) for n in range(8)), strict=True)],
        "pairs": [{"chosen_ids": [*p, 20, 21, end_id], "rejected_ids": [*p, 30, end_id]} for p in prompts],
        "prompts": [{"input_ids": p} for p in prompts],
    }  # fmt: skip
    tokenizer = padded(tokenizer, end_id, Preferences(**rows))

    def run(stage, *paths, rows_of, recipe=None, **how):
        recipe = recipe or Recipe(batch=4)
        setting = Setting(tokenizer, end_id, tmp_path, response_length=6, seed=0, synchronize=lambda: None,
                          progress=False, **{"is_bf16": False, **how})  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            done = stage(*map(str, paths), rows[rows_of], recipe, setting, 2)
        assert len(done.steps) == 2 and done.samples == recipe.samples_a_step
        assert all(step.seconds > 0 for step in done.steps)
        return sum(step.flops for step in done.steps), torchs(counter), done.model

    return run


@pytest.mark.slow
def test_flops_of_every_stage_are_those_of_torchs_counter(trained_by, random_llama_dir):
    plain = {}
    for checkpointing in (False, True):
        found = trained_by(stages.sft, random_llama_dir, rows_of="demonstrations", checkpointing=checkpointing)
        sft = found[2]
        reward = trained_by(stages.reward_model, sft, rows_of="pairs", checkpointing=checkpointing)
        ppo = trained_by(stages.ppo, sft, reward[2], rows_of="prompts", checkpointing=checkpointing)
        for name, (ours, theirs, _) in {"sft": found, "reward model": reward, "ppo": ppo}.items():
            assert ours == pytest.approx(theirs, rel=0.02), name
            # Layers that are run again are work too.
            assert not checkpointing or ours > 1.1 * plain[name], name
            plain.setdefault(name, ours)
    halves = Recipe(batch=2, accumulation=2)
    ours, theirs, _ = trained_by(stages.ppo, sft, reward[2], rows_of="prompts", recipe=halves)
    assert ours == pytest.approx(theirs, rel=0.02) and ours == pytest.approx(plain["ppo"], rel=0.02)


@pytest.mark.slow
def test_every_stage_multiplies_in_the_precision_of_the_run(trained_by, random_llama_dir, monkeypatch):
    seen, count = set(), Meter._count

    def note(self, module, inputs, out):
        seen.add(out.dtype)
        count(self, module, inputs, out)

    monkeypatch.setattr(Meter, "_count", note)
    _, _, sft = trained_by(stages.sft, random_llama_dir, rows_of="demonstrations", is_bf16=True)
    _, _, reward = trained_by(stages.reward_model, sft, rows_of="pairs", is_bf16=True)
    assert seen == {torch.bfloat16}
    trained_by(stages.ppo, sft, reward, rows_of="prompts", is_bf16=True)
    assert seen == {torch.bfloat16}


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
