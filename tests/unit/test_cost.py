"""FLOPs and memory worked out by hand."""

import pytest

from unlearn_ds.cost import devices, flops, memory

SIZE = flops.ModelSize(body=6_000, head=1_000, total=8_000, num_layers=2, hidden_size=10, vocab_size=100)
PLAN = {
    "stage": 3, "world_size": 4, "bytes_per_weight": 2, "reference": "offload", "num_tokens": 100,
    "checkpointing": False, "workspace_bytes": 5_000,
}  # fmt: skip


SHAPE = flops.Shape(
    forward=6_000, plain=6_000, backward=12_000, recomputed=5_000, head=1_000, head_trained=True, attention={None: 20}
)
WORK = flops.Work(10, 3, {None: 40}, {None: 50}, num_bounded=2, reference=flops.Work(4, 1, {None: 10}, {None: 12}))


def test_the_body_meets_every_token_and_the_head_response_tokens_only():
    found = flops.count(SHAPE, WORK, checkpointing=False, reference=None)
    assert found.model == 6 * (6_000 * 10 + 1_000 * 3) + 3 * 4 * 20 * 40
    assert found[1:] == (0, 0, 3 * 4 * 20 * 10, 2 * 1_000 * 2)


def test_recomputation_and_the_reference_are_kept_apart_from_the_model():
    without = flops.count(SHAPE, WORK, checkpointing=False, reference=None)
    found = flops.count(SHAPE, WORK, checkpointing=True, reference="offload")
    assert found.model == without.model
    assert found.recomputation == 2 * 5_000 * 10 + 4 * 20 * 50
    assert found.reference == 2 * 6_000 * 4 + 2 * 1_000 * 1 + 4 * 20 * 12
    assert found.hardware == sum(found) == without.hardware + found.recomputation + found.reference
    assert flops.count(SHAPE, WORK, checkpointing=True, reference="cached").reference == 2 * 1_000 * 1


def test_the_longest_known_name_decides_and_an_unknown_device_has_no_peak():
    assert devices.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert devices.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert devices.peak_flops("NVIDIA GB200") == 2500e12
    assert devices.peak_flops("cpu") is None


@pytest.mark.parametrize(("stage", "shares"), [(0, (1, 1, 1)), (1, (1, 1, 4)), (2, (1, 4, 4)), (3, (4, 4, 4))])
def test_each_stage_divides_one_more_state(stage, shares):
    plan = memory.memory_plan(SIZE, **{**PLAN, "stage": stage})
    states = (plan["weights"], plan["gradients"], plan["optimizer, fp32 master and two moments"])
    assert states == (16_000 // shares[0], 16_000 // shares[1], 96_000 // shares[2])


def test_fp32_has_no_master_copy():
    plan = memory.memory_plan(SIZE, **{**PLAN, "bytes_per_weight": 4})
    assert plan["optimizer, fp32 master and two moments"] == 16_000


def test_checkpointing_keeps_one_seventeenth_of_the_activations():
    kept = [memory.memory_plan(SIZE, **{**PLAN, "checkpointing": on})["activations"] for on in (False, True)]
    assert kept == [34 * 100 * 10 * 2, 2 * 100 * 10 * 2]


def test_what_is_offloaded_is_named_as_host_memory():
    plan = memory.memory_plan(SIZE, **PLAN, offload_param=True, offload_optimizer=True)
    assert {name for name in plan if "host" in name} == {
        "weights (host memory)", "optimizer, fp32 master and two moments (host memory)", "reference (host memory)",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "keys"),
    [
        ("offload", {"reference (host memory)", "LM head of the reference"}),
        ("resident", {"reference", "LM head of the reference"}),
        ("nvme", {"reference (disk)", "LM head of the reference"}),
        ("cached", {"LM head of the reference"}),
        (None, set()),
    ],
)
def test_each_reference_has_its_place(mode, keys):
    assert {name for name in memory.memory_plan(SIZE, **{**PLAN, "reference": mode}) if "reference" in name} == keys


@pytest.mark.parametrize(
    ("mode", "keys"),
    [("adapter", set()), ("cached", set()), ("nvme", {"reference (disk)"}), ("offload", {"reference (host memory)"})],
)
def test_with_lora_no_reference_needs_a_head_of_its_own_and_the_adapter_needs_nothing(mode, keys):
    plan = memory.memory_plan(SIZE, **{**PLAN, "reference": mode}, num_adapter=200)
    assert {name for name in plan if "reference" in name} == keys


def test_with_lora_only_adapters_have_gradients_and_optimizer_states():
    plan = memory.memory_plan(SIZE, **{**PLAN, "stage": 0}, num_adapter=200)
    assert plan["weights"] == (8_000 + 200) * 2
    assert plan["gradients"] == 200 * 2
    assert plan["optimizer, fp32 master and two moments"] == 200 * 12
    assert plan["loss workspace"] == 5_000
    assert plan["whole copy, while evaluating"] == 16_000


def test_frozen_weights_cost_no_gradient_of_their_own():
    shape = SHAPE._replace(forward=6_200, backward=6_200 + 200, head_trained=False, attention={None: 0})
    counted = flops.count(shape, WORK, checkpointing=False, reference="adapter")
    assert counted.model == 4 * (6_000 * 10 + 1_000 * 3) + 6 * 200 * 10
    assert counted.reference == 2 * 6_000 * 4 + 2 * 1_000 * 1


def test_reference_modes_hold_the_model_in_one_place_or_none():
    modes = memory.reference_modes(SIZE, bytes_per_weight=2, world_size=4)
    share, head = 8_000 * 2 // 4, 1_000 * 2
    held = {name: (mode.device, mode.host, mode.disk, mode.disk_per_token) for name, mode in modes.items()}
    assert held == {
        "cached": (head, 0, 0, 10 * 2), "resident": (share + head, 0, 0, 0), "offload": (head, share, 0, 0),
        "nvme": (head, 0, share, 0),
    }  # fmt: skip


def test_with_lora_the_adapter_mode_holds_nothing_and_no_mode_a_head():
    modes = memory.reference_modes(SIZE, bytes_per_weight=2, world_size=1, num_adapter=200)
    assert next(iter(modes)) == "adapter" and modes["adapter"][:4] == (0, 0, 0, 0)
    assert modes["cached"].device == modes["offload"].device == 0 and modes["resident"].device == 16_000
