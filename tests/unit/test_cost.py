"""FLOPs and memory worked out by hand."""

import json

import pytest

from unlearn_ds import ds_json
from unlearn_ds.cost import devices, flops, memory
from unlearn_ds.cost.setup import Setup
from unlearn_ds.cost.shapes import Shape

SHAPE = Shape(
    hidden_size=10, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=5, intermediate_size=30, vocab_size=100,
    gated=True, tied=False, outer=(1_000, 10, 1_000), layer=(10, 100, 50, 50, 100, 10, 300, 300, 300),
)  # fmt: skip
TOTAL = 2 * 1_220 + 2_010
SETUP = Setup(
    stage=3, world_size=4, ranks_per_node=2, bytes_per_weight=2, reference="offload", num_tokens=100, num_kl_tokens=50,
    accumulation=1, checkpointing=False, workspace_bytes=5_000, reduce_bucket=500, prefetch=0, on_gpu=False,
)  # fmt: skip


def planned(**changes):
    return memory.memory_plan(SHAPE, SETUP._replace(**changes))


def places(plan, what):
    """Where the uses lie whose names begin with ``what``."""
    return {line.where for line in plan.lines if line.what.startswith(what)}


PRODUCTS = flops.Products(
    forward=6_000, plain=6_000, backward=12_000, recomputed=5_000, head=1_000, head_trained=True, attention={None: 20}
)
WORK = flops.Work(10, 3, {None: 40}, {None: 50}, num_bounded=2, reference=flops.Work(4, 1, {None: 10}, {None: 12}))


def test_the_body_meets_every_token_and_the_head_response_tokens_only():
    found = flops.count(PRODUCTS, WORK, checkpointing=False, reference=None)
    assert found.model == 6 * (6_000 * 10 + 1_000 * 3) + 3 * 4 * 20 * 40
    assert found[1:] == (0, 0, 3 * 4 * 20 * 10, 2 * 1_000 * 2)


def test_recomputation_and_the_reference_are_kept_apart_from_the_model():
    without = flops.count(PRODUCTS, WORK, checkpointing=False, reference=None)
    found = flops.count(PRODUCTS, WORK, checkpointing=True, reference="offload")
    assert found.model == without.model
    assert found.recomputation == 2 * 5_000 * 10 + 4 * 20 * 50
    assert found.reference == 2 * 6_000 * 4 + 2 * 1_000 * 1 + 4 * 20 * 12
    assert found.hardware == sum(found) == without.hardware + found.recomputation + found.reference
    assert flops.count(PRODUCTS, WORK, checkpointing=True, reference="cached").reference == 2 * 1_000 * 1


def test_the_longest_known_name_decides_and_an_unknown_device_has_no_peak():
    assert devices.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert devices.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert devices.peak_flops("NVIDIA GB200") == 2500e12
    assert devices.peak_flops("cpu") is None


@pytest.mark.parametrize(("stage", "shares"), [(0, (1, 1, 1)), (1, (1, 1, 4)), (2, (1, 4, 4)), (3, (4, 4, 4))])
def test_each_stage_divides_one_more_state(stage, shares):
    plan = planned(stage=stage)
    assert plan.of("weights") == 2 * TOTAL // shares[0]
    assert sum(x.num_bytes for x in plan.lines if x.what == "gradients") == 2 * TOTAL // shares[1]
    assert plan.of("optimizer") == 12 * TOTAL // shares[2]


def test_in_fp32_there_is_a_master_copy_too_but_at_stage_0():
    """DeepSpeed clones its flat partition in every precision; at stage 0 in fp32 it calls the optimizer as it is."""
    assert planned(bytes_per_weight=4).of("optimizer") == 12 * TOTAL // 4
    assert planned(bytes_per_weight=4, stage=0).of("optimizer") == 8 * TOTAL
    assert planned(bytes_per_weight=4, stage=2).of("gradients in fp32") == 4 * (TOTAL // 4)


def test_below_stage_3_gradients_come_into_being_as_activations_go():
    when = {line.when for line in planned(stage=2).lines if line.what == "gradients"}
    later = {line.when for line in planned(stage=2, accumulation=2).lines if line.what == "gradients"}
    assert (when, later) == ({"update"}, {"always"})


def test_checkpointing_keeps_the_input_of_each_layer_and_what_one_layer_keeps():
    layer = memory.bytes_of_layer(SHAPE, 2)
    assert layer == 2 * (4 * 10 + 2 * 10) + 4 * 30 * 2 + 5 * 10 * 2
    widest = (3 * 30 + 2 * 10) * 2
    assert planned().of("activations") == 100 * (2 * layer + widest)
    assert planned(checkpointing=True).of("activations") == 100 * (2 * 10 * 2 + layer + widest)


def test_what_is_offloaded_lies_on_the_host_or_the_disk():
    plan = planned(offload_param="cpu", offload_optimizer="nvme")
    assert places(plan, "weights") == places(plan, "gradients") == {"host"}
    assert places(plan, "optimizer") == {"disk"}
    assert plan.peak("device") < planned().peak("device")


def test_hpz_and_small_weights_take_room_on_the_device():
    assert planned(hpz=2).peak() - planned().peak() == 2 * TOTAL // 2
    assert planned(persistence=60).of("small weights") == 2 * (10 + 2 * (10 + 50 + 50 + 10))
    assert planned(persistence=60, stage=2).of("small weights") == 0


def test_the_peak_is_the_fullest_part_of_a_step():
    plan = planned()
    always, step, loss, backward, update = (
        plan.sum("device", when) for when in ("always", "step", "loss", "backward", "update")
    )
    assert min(step, loss, backward, update) > 0
    assert plan.peak() == always + max(step + loss, step + backward, update)
    assert planned(workspace_bytes=10**9).peak() > 10**9
    assert planned(on_gpu=True).peak() - plan.peak() == memory.CONTEXT_BYTES + memory.NCCL_BYTES


@pytest.mark.parametrize(
    ("mode", "found"),
    [
        ("offload", {"host", "device"}), ("resident", {"device"}), ("nvme", {"disk", "host", "device"}),
        ("cached", {"device"}), (None, set()),
    ],
)  # fmt: skip
def test_each_reference_has_its_place_and_its_head_on_the_device(mode, found):
    plan = planned(reference=mode)
    assert places(plan, "reference") | places(plan, "LM head of the reference") == found


@pytest.mark.parametrize(
    ("mode", "found"), [("adapter", set()), ("cached", set()), ("nvme", {"disk", "host"}), ("offload", {"host"})]
)
def test_with_lora_no_reference_needs_a_head_of_its_own_and_the_adapter_needs_nothing(mode, found):
    plan = planned(reference=mode, num_adapter=200)
    assert places(plan, "reference") | places(plan, "LM head of the reference") == found


def test_with_lora_only_adapters_have_gradients_and_optimizer_states():
    plan = planned(stage=0, num_adapter=200)
    assert plan.of("weights") == (TOTAL + 200) * 2 and plan.of("optimizer") == 200 * 12
    assert sum(x.num_bytes for x in plan.lines if x.what == "gradients") == 200 * 2
    assert plan.of("gradient of the LM head") == 0
    assert plan.of("whole copy") == TOTAL * 2


def test_a_checkpoint_has_twelve_bytes_a_trained_parameter():
    assert planned().of("a checkpoint") == 12 * TOTAL
    assert planned(stage=2).of("a checkpoint") == 14 * TOTAL


def test_frozen_weights_cost_no_gradient_of_their_own():
    shape = PRODUCTS._replace(forward=6_200, backward=6_200 + 200, head_trained=False, attention={None: 0})
    counted = flops.count(shape, WORK, checkpointing=False, reference="adapter")
    assert counted.model == 4 * (6_000 * 10 + 1_000 * 3) + 6 * 200 * 10
    assert counted.reference == 2 * 6_000 * 4 + 2 * 1_000 * 1


def test_reference_modes_hold_the_model_in_one_place_or_none():
    modes = memory.reference_modes(SHAPE, SETUP)
    share, head, buffers = TOTAL * 2 // 4, 1_000 * 2, 5 * (1_000 // 4) * 2
    held = {name: (mode.device, mode.host, mode.disk, mode.disk_per_token) for name, mode in modes.items()}
    assert held == {
        "cached": (head, 0, 0, 10 * 2), "resident": (share + head, 0, 0, 0), "offload": (head, share, 0, 0),
        "nvme": (head, buffers, share, 0),
    }  # fmt: skip


def test_with_lora_the_adapter_mode_holds_nothing_and_no_mode_a_head():
    modes = memory.reference_modes(SHAPE, SETUP._replace(world_size=1, num_adapter=200))
    assert next(iter(modes)) == "adapter" and modes["adapter"][:4] == (0, 0, 0, 0)
    assert modes["cached"].device == modes["offload"].device == 0 and modes["resident"].device == TOTAL * 2


def test_the_plan_knows_the_buffers_of_the_file():
    zero = json.loads((ds_json.FOLDER / "reference" / "nvme.json").read_text())["zero_optimization"]
    assert zero["offload_param"]["buffer_count"] == memory.REFERENCE_BUFFERS
