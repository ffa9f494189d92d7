"""Losses and gradients of LoRA depend neither on ranks, nor on the ZeRO stage, nor on where the reference lives."""

from __future__ import annotations

import functools

import pytest
from harness import ds_config, metrics, run, write_data

LOSSES = ("loss", "loss_forget", "loss_mismatch", "loss_retain", "grad_norm")
STEPS = 10

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def losses(tmp_path_factory, tiny_model_dir):
    """losses(ranks, stage, *flags) -> losses and gradient norm of ten steps with adapters; each runs once."""
    folder = tmp_path_factory.mktemp("lora")
    forget, retain = write_data(folder)

    @functools.cache
    def of(ranks, stage, *flags, bf16=False):
        out = folder / f"run-{abs(hash((ranks, stage, flags, bf16)))}"
        done = run(
            folder / "cache", "--model", tiny_model_dir, "--forget_data", forget, "--retain_data", retain,
            "--output_dir", out, "--ds_config", ds_config(folder, stage, bf16), "--max_steps", STEPS,
            "--batch_size", 4, "--num_mismatch", 2, "--learning_rate", 1e-2, "--lora_rank", 4, "--eval.enabled",
            "false", "--log.tensorboard", "false", "--log.progress", "false", "--checkpoint.export", "false", *flags,
            ranks=ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        assert f"reference   {flags[flags.index('--reference') + 1] if '--reference' in flags else 'adapter'}" in (
            done.stdout
        )
        lines = metrics(out)
        assert len(lines) == STEPS and not any(line["skipped"] for line in lines)
        return [[line[name] for name in LOSSES] for line in lines]

    return of


def rows(expected, absolute=0.0):
    return [pytest.approx(values, rel=1e-4, abs=absolute) for values in expected]


@pytest.mark.parametrize("bf16", [False, True])
def test_the_kl_to_the_model_without_adapters_is_exactly_zero_before_the_first_update(losses, bf16):
    lines = losses(1, 3, bf16=True) if bf16 else losses(1, 3)
    assert lines[0][LOSSES.index("loss_retain")] == 0.0
    assert lines[-1][LOSSES.index("loss_retain")] > 0.01


@pytest.mark.parametrize("reference", ["offload", "resident", "cached"])
def test_a_second_model_gives_the_same_losses_as_the_model_without_adapters(losses, reference):
    assert losses(1, 3, "--reference", reference) == rows(losses(1, 3), absolute=1e-6)


def test_two_ranks_equal_one_rank_with_twice_the_accumulation(losses):
    assert losses(2, 3) == rows(losses(1, 3, "--gradient_accumulation_steps", 2), absolute=1e-6)


@pytest.mark.parametrize("stage", [0, 2])
def test_every_zero_stage_gives_the_same_losses(losses, stage):
    assert losses(1, stage) == rows(losses(1, 3), absolute=1e-6)


def test_activation_checkpointing_gives_the_same_losses(losses):
    assert losses(1, 3, "--activation_checkpointing") == rows(losses(1, 3), absolute=1e-6)


def test_a_rank_that_holds_partitioned_adapters_gives_the_same_losses(losses):
    """Adapters above ten times the hidden size are divided among the ranks, smaller ones stay whole.

    Against accumulation at stage 0 in fp32, where DeepSpeed divides gradients by the micro-batches behind our back.
    """
    flags = ("--lora_rank", 64, "--lora_alpha", 8)
    assert losses(2, 3, *flags) == rows(losses(1, 0, *flags, "--gradient_accumulation_steps", 2), absolute=1e-6)
