from __future__ import annotations

import copy
import json

import pytest

from unlearn_ds import ds_json
from unlearn_ds.config import OptimConfig, UsageError

OPTIM = OptimConfig(batch_size=3, gradient_accumulation_steps=5, gradient_clipping=0.7)
SHIPPED = ds_json.names()


def nested(dotted: str, value) -> dict:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def test_configurations_ship_with_the_package():
    assert {"zero0", "zero1", "zero2", "zero3", "zero3_fp32"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_loads_and_says_its_stage(name):
    values = ds_json.load(name)
    digits = [c for c in name.split("_")[0] if c.isdigit()]
    assert not digits or ds_json.stage(values) == int(digits[0])
    assert ds_json.is_bf16(values) == (not name.endswith("fp32"))


def test_a_configuration_is_found_by_path(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert ds_json.stage(ds_json.load(str(path))) == 1


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="no DeepSpeed configuration 'zero33'. Did you mean.*'zero3'"):
        ds_json.load("zero33")


def test_an_unknown_path_is_refused_with_the_names():
    with pytest.raises(UsageError, match=r"no DeepSpeed configuration 'nowhere/x\.json'.*zero3"):
        ds_json.load("nowhere/x.json")


@pytest.mark.parametrize(("content", "said"), [("{", "not valid JSON"), ("[1]", "must hold a JSON object")])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content, said):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=f"mine.json.*{said}"):
        ds_json.load(str(path))


@pytest.mark.parametrize("key", ds_json.OWNED)
def test_a_key_that_our_flags_set_is_refused_and_the_flag_named(key):
    with pytest.raises(UsageError, match=f"mine.json: '{key}' is set by {ds_json.OWNED[key].split()[0]}"):
        ds_json.check({key: 1, "zero_optimization": {"stage": 1}}, "mine.json")


@pytest.mark.parametrize("key", ds_json.REMOVED)
def test_a_key_that_deepspeed_removed_is_refused_with_the_release(key):
    with pytest.raises(UsageError, match=f"mine.json: DeepSpeed {ds_json.REMOVED[key]} removed '{key}'"):
        ds_json.check(nested(key, {"enabled": True}), "mine.json")


@pytest.mark.parametrize("key", ["zero_optimization.reduce_bucket_size", "bf16.enabled", "prescale_gradients"])
def test_auto_is_refused_wherever_it_stands(key):
    with pytest.raises(UsageError, match=f"'{key}' is \"auto\""):
        ds_json.check(nested(key, "auto"), "mine.json")


def test_fp16_is_refused_and_bf16_named():
    with pytest.raises(UsageError, match="fp16 overflows.*use bf16"):
        ds_json.check({"fp16": {"enabled": True}}, "mine.json")
    ds_json.check({"fp16": {"enabled": False}}, "mine.json")


@pytest.mark.parametrize("stage", [4, -1, "3", 1.5, None, [3]])
def test_a_stage_that_does_not_exist_is_refused(stage):
    with pytest.raises(UsageError, match="'zero_optimization.stage' must be 0, 1, 2 or 3"):
        ds_json.check({"zero_optimization": {"stage": stage}}, "mine.json")


@pytest.mark.parametrize("section", ["zero_optimization", "bf16", "fp16"])
@pytest.mark.parametrize("value", [True, None, 3], ids=str)
def test_a_section_that_is_no_object_is_refused_and_named(section, value):
    with pytest.raises(UsageError, match=f"mine.json.*{section}"):
        ds_json.check({section: value}, "mine.json")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameters_on_the_cpu_need_stage_3(stage):
    values = {"zero_optimization": {"stage": stage, "offload_param": {"device": "cpu"}}}
    with pytest.raises(UsageError, match=f"needs stage 3; this file has {stage}"):
        ds_json.check(values, "mine.json")
    values["zero_optimization"]["stage"] = 3
    ds_json.check(values, "mine.json")


def test_an_empty_configuration_is_plain_fp32_without_sharding():
    ds_json.check({}, "mine.json")
    assert ds_json.stage({}) == 0 and not ds_json.is_bf16({})


# What DeepSpeed is handed


@pytest.mark.parametrize("name", SHIPPED)
def test_the_policy_gets_our_batch_and_clipping_and_the_json_stays_as_it_was(name):
    values = ds_json.load(name)
    before = copy.deepcopy(values)
    merged = ds_json.for_policy(values, OPTIM, hidden_size=64)
    assert values == before
    assert merged["train_micro_batch_size_per_gpu"] == 3
    assert merged["gradient_accumulation_steps"] == 5
    assert merged["gradient_clipping"] == 0.7
    assert "optimizer" not in merged and "scheduler" not in merged
    assert merged["zero_allow_untested_optimizer"] is True and merged["zero_force_ds_cpu_optimizer"] is False
    assert "auto" not in json.dumps(merged)
    for key, value in before.items():
        if key != "zero_optimization":
            assert merged[key] == value


def test_stage_3_buckets_follow_the_width_of_the_model():
    zero = ds_json.for_policy(ds_json.load("zero3"), OPTIM, hidden_size=4096)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 4096 * 4096
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 4096 * 4096)
    assert zero["stage3_param_persistence_threshold"] == 40960
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    narrow = ds_json.for_policy(ds_json.load("zero3"), OPTIM, hidden_size=64)["zero_optimization"]
    assert narrow["reduce_bucket_size"] == 500_000
    assert all(isinstance(v, int) for k, v in zero.items() if k.endswith("size"))


def test_a_bucket_size_in_the_json_wins():
    values = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 7, "stage3_param_persistence_threshold": 8}}
    zero = ds_json.for_policy(values, OPTIM, hidden_size=4096)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 7 and zero["stage3_param_persistence_threshold"] == 8


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2"])
def test_lower_stages_get_no_stage_3_keys(name):
    zero = ds_json.for_policy(ds_json.load(name), OPTIM, hidden_size=64).get("zero_optimization", {})
    assert not [key for key in zero if key.startswith("stage3")]


@pytest.mark.parametrize("mode", ["offload", "nvme", "resident"])
@pytest.mark.parametrize("name", ["zero0", "zero3", "zero3_fp32"])
def test_the_reference_is_sharded_without_optimizer_in_the_policys_precision(name, mode):
    values = ds_json.load(name)
    merged = ds_json.for_reference(values, mode, hidden_size=64, nvme_path="disk", largest=1000)
    zero = merged["zero_optimization"]
    assert zero["stage"] == 3 and zero["stage3_prefetch_bucket_size"] == 0
    assert ds_json.is_bf16(merged) == ds_json.is_bf16(values)
    assert not {"optimizer", "scheduler", "gradient_clipping"} & merged.keys()
    assert "offload_optimizer" not in zero
    if mode == "offload":
        assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    elif mode == "nvme":
        offload = zero["offload_param"]
        assert (offload["device"], offload["nvme_path"], offload["buffer_size"]) == ("nvme", "disk", 1000)
        assert merged["aio"]["block_size"] == 2**20
    else:
        assert "offload_param" not in zero
    ds_json.check({k: v for k, v in merged.items() if k not in ds_json.OWNED}, "reference")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"zero_optimisation": {"stage": 3}}, "unknown key 'zero_optimisation'.*'zero_optimization'"),
        ({"bf61": {"enabled": True}}, "unknown key 'bf61'.*'bf16'"),
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, "'zero_optimization.overlap_com'.*'overlap_comm'"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}}, "offload_param.devise'.*'device'"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "not finite through"),
    ],
)  # fmt: skip
def test_a_misspelt_or_harmful_key_is_refused(values, expected):
    with pytest.raises(UsageError, match=expected):
        ds_json.check(values, "mine.json")


def test_the_keys_that_we_know_are_keys_of_the_installed_deepspeed():
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        "bf16": DeepSpeedBF16Config, "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    }  # fmt: skip
    assert set(models) == set(ds_json.KNOWN) - {""}
    for section, model in models.items():
        there = {name for key, field in model.model_fields.items() for name in (key, field.alias)}
        assert set(ds_json.KNOWN[section]) <= there


def test_steps_that_are_not_finite_are_looked_for_in_bf16_whatever_the_json_says():
    values = {"bf16": {"enabled": True}}
    assert ds_json.for_policy(values, OptimConfig(), 64)["bf16"]["check_grad_overflow"] is True


# Configurations at scale


@pytest.mark.parametrize("name", SHIPPED)
def test_the_installed_deepspeed_takes_every_shipped_configuration(name, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    values = ds_json.for_machine(ds_json.load(name), ranks_per_node=8, nvme_path=str(tmp_path))
    loaded = DeepSpeedConfig(ds_json.for_policy(values, OPTIM, hidden_size=4096))
    zero = loaded.zero_config
    assert loaded.zero_optimization_stage == ds_json.stage(values)
    assert zero.zero_hpz_partition_size == (8 if name == "zero3_hpz" else 1)
    for section, offload in (("offload_param", zero.offload_param), ("offload_optimizer", zero.offload_optimizer)):
        assert ("none" if offload is None else offload.device) == ds_json.offloads(values, section)
        assert offload is None or offload.pin_memory is (name != "zero3_offload_unpinned")
        assert ds_json.offloads(values, section) != "nvme" or str(offload.nvme_path) == str(tmp_path)


@pytest.mark.parametrize("mode", ["resident", "offload", "nvme"])
def test_the_installed_deepspeed_takes_the_configurations_of_the_reference(mode, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    merged = ds_json.for_reference(ds_json.load("zero2"), mode, 4096, str(tmp_path), largest=1000)
    assert DeepSpeedConfig(merged).zero_config.prefetch_bucket_size == 0


def test_what_the_machine_knows_is_filled_in_and_the_file_stays_as_it_was():
    values = ds_json.load("zero3_hpz")
    filled = ds_json.for_machine(values, ranks_per_node=4)
    assert filled["zero_optimization"]["zero_hpz_partition_size"] == 4
    assert values["zero_optimization"]["zero_hpz_partition_size"] == ds_json.RANKS_PER_NODE
    own = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    assert ds_json.for_machine(own, ranks_per_node=4) == own
    assert ds_json.uses_disk(ds_json.load("zero3_nvme")) and not ds_json.uses_disk(ds_json.load("zero3_offload"))


def test_quantised_traffic_is_off_in_every_shipped_configuration():
    for name in SHIPPED:
        zero = ds_json.load(name).get("zero_optimization", {})
        assert not zero.get("zero_quantized_weights") and not zero.get("zero_quantized_gradients")


@pytest.mark.parametrize(("hidden_size", "expected"), [(64, 500_000), (4096, 12 * 4096**2), (8192, 500_000_000)])
def test_buckets_below_stage_3_hold_a_layer_within_limits(hidden_size, expected):
    zero = ds_json.for_policy(ds_json.load("zero2"), OPTIM, hidden_size)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == expected


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "needs stage 1, 2 or 3; this file has 0"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, "an optimizer on disk needs stage 3"),
        ({"stage": 3, "zero_hpz_partition_size": "many"}, "takes \"ranks_per_node\" or a number; got 'many'"),
        ({"stage": 3, "zero_hpz_partition_size": 0}, 'takes "ranks_per_node" or a number; got 0'),
        ({"stage": 2, "zero_hpz_partition_size": 8}, "zero_hpz_partition_size' needs stage 3"),
    ],
)
def test_what_a_stage_cannot_honour_is_refused(zero, said):
    with pytest.raises(UsageError, match=said):
        ds_json.check({"zero_optimization": zero}, "mine.json")
