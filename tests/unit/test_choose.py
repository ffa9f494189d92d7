"""Knobs that follow from the memory plan, for each preset on clusters of 80 GB GPUs, and what is said of them."""

from __future__ import annotations

import pytest

from unlearn_ds import choose, plan, sizing
from unlearn_ds.arguments import follows_plan, given, parse
from unlearn_ds.checks import check
from unlearn_ds.config import UsageError
from unlearn_ds.presets import EMBEDDED_PRESET, PRESETS
from unlearn_ds.sizing import GIB, Machine

NODES = (1, 4, 16)
LARGE = [name for name in PRESETS["harmful"] if name != EMBEDDED_PRESET]


def chosen(**flags):
    """Configuration, choices by knob, and machine of a run with these flags."""
    config = parse(flags)
    check(config)
    ranks = sizing.machine(config)
    config, choices = choose.choose(config, given(flags), ranks)
    return config, {choice.knob: choice for choice in choices}, ranks


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("preset", LARGE)
def test_every_preset_fits_eighty_gigabytes_and_keeps_its_global_batch(preset, nodes):
    flags = {"preset": preset, "nodes": nodes, "gpus_per_node": 8, "gpu_memory": 80}
    config, choices, ranks = chosen(**flags)
    assert ranks == Machine(nodes, 8, 80 * GIB, None)
    assert sizing.fits(sizing.plan_of(config, ranks), ranks)
    assert set(choices) == set(choose.FLAGS) and all(choice.reason for choice in choices.values())
    assert choose.global_batch(config, ranks) == nodes * 8 * parse(flags).optim.batch_size
    assert not choose.remedies(config, ranks)


@pytest.mark.parametrize("preset", ["llama2-70b", "llama3-70b"])
def test_all_parameters_of_a_large_model_need_a_second_copy_only_where_it_fits(preset):
    names = []
    for nodes in NODES:
        flags = {"preset": preset, "lora_rank": 0, "nodes": nodes, "gpus_per_node": 8, "gpu_memory": 80}
        config, choices, _ = chosen(**flags)
        names.append(config.engine.ds_config)
        assert config.model.activation_checkpointing
    assert names == ["zero3_offload", names[1], "zero3_hpz"] and names[1] in ("zero3", "zero3_hpz")
    assert "would take" in choices["model.activation_checkpointing"].reason


def test_llama_7b_trains_all_parameters_on_one_gpu_by_offload():
    flags = {"preset": "llama2-7b-full", "nodes": 1, "gpus_per_node": 1, "gpu_memory": 80}
    config, choices, ranks = chosen(**flags)
    found = sizing.plan_of(config, ranks)
    assert config.engine.ds_config == "zero2_offload" and sizing.fits(found, ranks)
    assert found.peak("host") > 12 * 6.7e9
    assert "would take" in choices["engine.ds_config"].reason


def test_hpz_is_left_where_its_copy_makes_it_send_more():
    """Llama-3-70B on 32 GPUs: one row at a time, twice, against two at once without it."""
    flags = {"preset": "llama3-70b-full", "nodes": 4, "gpus_per_node": 8, "gpu_memory": 80}
    config, _, ranks = chosen(**flags)
    forced, _, _ = chosen(**flags, ds_config="zero3_hpz")
    assert config.engine.ds_config == "zero3" and sizing.fits(sizing.plan_of(forced, ranks), ranks)
    assert forced.optim.gradient_accumulation_steps > config.optim.gradient_accumulation_steps


def test_a_dry_run_of_what_does_not_fit_ends_as_a_mistake(capsys):
    flags = {"preset": "llama3-70b-full", "gpus_per_node": 8, "nodes": 1, "gpu_memory": 80, "host_memory": 1024}
    assert plan.dry_run(chosen(**flags)[0]) == 2 and "DOES NOT FIT" in capsys.readouterr().out
    assert plan.dry_run(chosen(**{**flags, "nodes": 4})[0]) == 0
    said = capsys.readouterr().out
    assert (
        "forget rows: 64 a step, 64,000 in the 1,000 steps of the run" in said and "batch of 2 is one device's" in said
    )


def test_a_host_that_is_too_small_rules_offload_out():
    flags = {"preset": "llama2-7b-full", "nodes": 1, "gpus_per_node": 1, "gpu_memory": 80, "host_memory": 64}
    config, choices, ranks = chosen(**flags)
    assert not sizing.fits(sizing.plan_of(config, ranks), ranks)
    assert choices["engine.ds_config"].reason == "nothing fits; this needs the least of a device"


def test_what_the_user_sets_stays():
    flags = {
        "preset": "llama2-7b-full", "nodes": 1, "gpus_per_node": 8, "gpu_memory": 80, "ds_config": "zero3_offload",
        "activation_checkpointing": "true", "batch_size": 1, "reference": "offload",
    }  # fmt: skip
    config, choices, _ = chosen(**flags)
    assert (config.engine.ds_config, config.engine.reference) == ("zero3_offload", "offload")
    assert config.model.activation_checkpointing and config.optim.batch_size == 1
    assert set(choices) == {"optim.gradient_accumulation_steps"}


def test_a_global_batch_is_cut_into_micro_batches_that_fit():
    flags = {
        "preset": "llama2-7b-full", "nodes": 1, "gpus_per_node": 8, "gpu_memory": 80, "global_batch_size": 512,
        "ds_config": "zero3", "activation_checkpointing": "true",
    }  # fmt: skip
    config, _, ranks = chosen(**flags)
    optim = config.optim
    assert optim.batch_size * optim.gradient_accumulation_steps * 8 == 512 and optim.gradient_accumulation_steps > 1
    assert optim.retain_batch_size == optim.batch_size
    larger = parse(
        {**flags, "batch_size": 2 * optim.batch_size, "gradient_accumulation_steps": 1, "reference": "offload"}
    )
    assert not sizing.fits(sizing.plan_of(larger, ranks), ranks)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"global_batch_size": 12}, "cannot be shared by 8 devices"),
        ({"global_batch_size": 32, "batch_size": 3}, "leave one of them out"),
        ({"global_batch_size": 32, "batch_size": 2, "gradient_accumulation_steps": 3}, "leave one of them out"),
    ],
)
def test_a_global_batch_that_does_not_divide_is_refused(flags, said):
    with pytest.raises(UsageError, match=said):
        chosen(preset="llama2-7b", nodes=1, gpus_per_node=8, gpu_memory=80, **flags)


def test_what_does_not_fit_is_told_with_flags_that_help_and_their_plans(capsys):
    flags = {
        "preset": "llama2-13b", "lora_rank": 0, "nodes": 1, "gpus_per_node": 4, "gpu_memory": 40, "ds_config": "zero2",
        "activation_checkpointing": "false", "reference": "resident",
    }  # fmt: skip
    config = parse(flags)
    ranks = sizing.machine(config)
    found = choose.remedies(config, ranks)
    before = sizing.plan_of(config, ranks).peak()
    assert not sizing.fits(sizing.plan_of(config, ranks), ranks)
    assert len(found) > 4 and found[0].flags == "--activation_checkpointing true"
    assert any(remedy.plan.peak() < before for remedy in found)
    assert sizing.fits(found[-1].plan, ranks) and len(found[-1].flags.split(" --")) > 1
    plan.say_remedies(found)
    assert all(remedy.flags in capsys.readouterr().out for remedy in found[:1])


def test_a_dry_run_prints_a_table_of_every_use(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    flags = {"preset": "llama2-70b", "lora_rank": 0, "nodes": 4, "gpus_per_node": 8, "gpu_memory": 80}
    plan.dry_run(chosen(**flags)[0])
    said = capsys.readouterr().out
    for word in (
        "weights", "gradients", "optimizer", "reference", "activations", "loss workspace", "bucket: reduce",
        "live gathered weights", "CUDA context and NCCL", "a checkpoint", "reduce_scatter", "a node's host memory",
    ):  # fmt: skip
        assert word in said, word
    table = said.split("memory plan")[1].split("a GPU:")[0].splitlines()
    assert len(table) > 10 and max(map(len, table[1:])) <= 80 and not any("…" in line for line in table)


def test_without_a_gpu_nothing_is_chosen_and_that_is_said(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = parse({"preset": "llama2-7b"})
    assert choose.resolved(config, set(), sizing.machine(config)) == config
    assert "--gpu_memory" in capsys.readouterr().out
    assert not follows_plan(parse({})) and follows_plan(parse({"nodes": 2}))


def test_flags_that_promise_other_ranks_than_were_started_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    sizing.check_machine(parse({"nodes": 2, "gpus_per_node": 4}))
    with pytest.raises(UsageError, match="make 16 ranks, and the launcher has started 8"):
        sizing.check_machine(parse({"nodes": 4, "gpus_per_node": 4}))
