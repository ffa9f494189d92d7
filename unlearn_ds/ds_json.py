"""DeepSpeed JSON: read, check against what DeepSpeed has removed and what is ours to set, merge with our knobs.

The JSON holds ZeRO stage, precision, offload and communication. Batch sizes, accumulation, clipping, optimizer and
schedule are flags of this project. Needs neither torch nor deepspeed, so that a mistake is told within a second.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unlearn_ds.config import OptimConfig, UsageError
from unlearn_ds.registry import did_you_mean

FOLDER = Path(__file__).parent / "ds_configs"

RANKS_PER_NODE = "ranks_per_node"
"""Value of ``zero_hpz_partition_size`` that stands for the ranks of a node, as the launcher starts them."""
LEAST_BUCKET = 500_000
"""Elements of a reduction; below it calls cost more than bytes."""

OWNED = {
    "train_batch_size": "--batch_size", "train_micro_batch_size_per_gpu": "--batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps", "gradient_clipping": "--gradient_clipping",
    "optimizer": "--learning_rate and --optim.*", "scheduler": "--schedule", "steps_per_print": "--log.progress",
    "zero_allow_untested_optimizer": "this program (true)", "zero_force_ds_cpu_optimizer": "this program (false)",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "this program (true)",
    "activation_checkpointing": "--activation_checkpointing",
}  # fmt: skip
"""Keys that flags of this project set, and the flags."""

REMOVED = {
    "nebula": "0.19.7", "compression_training": "0.19.7", "amp": "0.19.7", "quantize_training": "0.19.7",
    "sparse_gradients": "0.19.7", "eigenvalue": "0.19.7", "sparse_attention": "0.19.7", "elasticity": "0.19.8",
    "graph_harvesting": "0.19.7", "curriculum_learning": "0.19.7", "progressive_layer_drop": "0.19.7",
    "zero_optimization.mics_shard_size": "0.19.7", "zero_optimization.mics_hierarchical_params_gather": "0.19.7",
    "zero_optimization.zeropp_loco_param": "0.19.7",
}  # fmt: skip
"""Keys that DeepSpeed no longer knows, and a release without them."""


KNOWN: Mapping[str, tuple[str, ...]] = {
    "": (
        "zero_optimization", "bf16", "fp16", "communication_data_type", "prescale_gradients",
        "gradient_predivide_factor", "data_types", "aio", "comms_logger", "wall_clock_breakdown", "memory_breakdown",
        "flops_profiler", "dump_state", "checkpoint", "disable_python_gc",
    ),
    "bf16": ("enabled", "check_grad_overflow", "immediate_grad_update", "bf16_master_weights_and_grads",
             "bf16_optimizer_states"),
    "zero_optimization": (
        "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
        "allgather_partitions", "allgather_bucket_size", "overlap_comm", "load_from_fp32_weights", "offload_param",
        "offload_optimizer", "sub_group_size", "round_robin_gradients", "ignore_unused_parameters",
        "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients", "memory_efficient_linear", "leaf_module", "zenflow", "parameter_alignment",
        "log_trace_cache_warnings", "enable_sanity_checks", "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
        "stage3_max_reuse_distance", "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
    ),
    "zero_optimization.offload_param": (
        "device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory",
    ),
    "zero_optimization.offload_optimizer": (
        "device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init", "ratio",
        "cpuadam_cores_perc", "super_offload",
    ),
}  # fmt: skip
"""Keys that DeepSpeed reads and a run of this project may set, by section. It ignores others without a word."""


def names() -> list[str]:
    """Configurations that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name: str) -> dict[str, Any]:
    """Read a configuration by name or path and check it; ``UsageError`` says what to change."""
    path = Path(name).expanduser() if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        hint = (
            did_you_mean(name, names())
            if not name.endswith(".json")
            else "Give a path or a name: " + ", ".join(names())
        )
        raise UsageError(f"--ds_config: no DeepSpeed configuration '{name}'. {hint}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"--ds_config: {path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"--ds_config: {path} must hold a JSON object.")
    check(values, str(path))
    return values


def check(values: Mapping[str, Any], path: str) -> None:
    """Raise ``UsageError`` for a key that is unknown, removed, ours, "auto", or in conflict with another."""
    _check_keys(values, path)
    for section in ("fp16", "bf16", "zero_optimization"):
        if not isinstance(values.get(section, {}), dict):
            raise UsageError(f"{path}: '{section}' must be an object; got {values[section]!r}.")
    if enabled(values, "fp16"):
        raise UsageError(
            f"{path}: fp16 overflows as the ascent grows the logits; use bf16, or no precision key for fp32."
        )
    if values.get("bf16", {}).get("check_grad_overflow") is False:
        raise UsageError(f"{path}: 'bf16.check_grad_overflow' false lets steps that are not finite through; remove it.")
    zero = values.get("zero_optimization", {})
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UsageError(f"{path}: 'zero_optimization.stage' must be 0, 1, 2 or 3; got {zero!r}.")
    if "offload_param" in zero and zero.get("stage") != 3:
        raise UsageError(
            f"{path}: 'zero_optimization.offload_param' needs stage 3; this file has {zero.get('stage', 0)}."
        )
    _check_scale(zero, path)


def _check_scale(zero: Mapping[str, Any], path: str) -> None:
    """Raise ``UsageError`` for offload and hpZ that the stage cannot honour."""
    if "offload_optimizer" in zero and zero.get("stage", 0) == 0:
        raise UsageError(f"{path}: 'zero_optimization.offload_optimizer' needs stage 1, 2 or 3; this file has 0.")
    if zero.get("offload_optimizer", {}).get("device") == "nvme" and zero.get("stage") != 3:
        raise UsageError(f"{path}: an optimizer on disk needs stage 3; this file has {zero.get('stage', 0)}.")
    size = zero.get("zero_hpz_partition_size", 1)
    if not (size == RANKS_PER_NODE or (type(size) is int and size >= 1)):
        raise UsageError(
            f"{path}: 'zero_optimization.zero_hpz_partition_size' takes \"{RANKS_PER_NODE}\" or a number; got {size!r}."
        )
    if size != 1 and zero.get("stage") != 3:
        raise UsageError(f"{path}: 'zero_optimization.zero_hpz_partition_size' needs stage 3.")


def _check_keys(values: Mapping[str, Any], path: str) -> None:
    for dotted, value in _walk(values):
        if dotted in OWNED:
            raise UsageError(f"{path}: '{dotted}' is set by {OWNED[dotted]}; remove it from the JSON.")
        if dotted in REMOVED:
            raise UsageError(f"{path}: DeepSpeed {REMOVED[dotted]} removed '{dotted}'; remove it from the JSON.")
        section, _, key = dotted.rpartition(".")
        if section in KNOWN and key not in KNOWN[section]:
            raise UsageError(f"{path}: unknown key '{dotted}'. {did_you_mean(key, KNOWN[section])}")
        if value == "auto":
            raise UsageError(
                f"{path}: '{dotted}' is \"auto\", which only the Hugging Face Trainer fills in; write a value."
            )


def _walk(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")


def enabled(values: Mapping[str, Any], section: str) -> bool:
    return bool(values.get(section, {}).get("enabled", False))


def stage(values: Mapping[str, Any]) -> int:
    return values.get("zero_optimization", {}).get("stage", 0)


def is_bf16(values: Mapping[str, Any]) -> bool:
    return enabled(values, "bf16")


def offloads(values: Mapping[str, Any], section: str) -> str:
    """Where ``offload_param`` or ``offload_optimizer`` keeps its states: "none", "cpu" or "nvme"."""
    return values.get("zero_optimization", {}).get(section, {}).get("device", "none")


def uses_disk(values: Mapping[str, Any]) -> bool:
    """True when weights or optimizer states lie on a disk, so that a folder has to be named."""
    return "nvme" in (offloads(values, "offload_param"), offloads(values, "offload_optimizer"))


def for_machine(values: Mapping[str, Any], ranks_per_node: int, nvme_path: str | None = None) -> dict[str, Any]:
    """The configuration with what only the machine knows filled in: how many ranks hpZ divides its second copy of the
    weights over, and the folder of what lies on disk."""
    filled = copy.deepcopy(dict(values))
    zero = filled.get("zero_optimization", {})
    if zero.get("zero_hpz_partition_size") == RANKS_PER_NODE:
        zero["zero_hpz_partition_size"] = ranks_per_node
    for section in ("offload_param", "offload_optimizer"):
        if offloads(values, section) == "nvme":
            zero[section]["nvme_path"] = nvme_path
    return filled


def for_policy(values: Mapping[str, Any], optim: OptimConfig, hidden_size: int) -> dict[str, Any]:
    """The full configuration of the trained model: the JSON, our knobs, and sizes that follow its width."""
    merged = copy.deepcopy(dict(values))
    merged["train_micro_batch_size_per_gpu"] = optim.batch_size
    merged["gradient_accumulation_steps"] = optim.gradient_accumulation_steps
    merged["gradient_clipping"] = optim.gradient_clipping
    merged["steps_per_print"] = 2**31 - 1
    if is_bf16(values):
        merged["bf16"]["check_grad_overflow"] = True
    # Our optimizer is torch's AdamW, wrapped: DeepSpeed only accepts that when told so, also with offload.
    merged["zero_allow_untested_optimizer"] = True
    merged["zero_force_ds_cpu_optimizer"] = False
    zero = merged.get("zero_optimization", {})
    _size_buckets(zero, hidden_size)
    if stage(values) == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return merged


def _size_buckets(zero: dict[str, Any], hidden_size: int) -> None:
    """Sizes that the JSON leaves out, in elements, from the width of the model.

    One hidden x hidden matrix is the unit of ZeRO-3 that overlaps well; norms and other small tensors stay whole.
    Below stage 3 the unit is a layer of about 12 such matrices; DeepSpeed's own 5e8 would take a GiB a buffer, and is
    the limit here.
    """
    square = hidden_size * hidden_size
    if zero.get("stage") == 3:
        zero.setdefault("reduce_bucket_size", max(square, LEAST_BUCKET))
        zero.setdefault("stage3_prefetch_bucket_size", int(0.9 * square))
        zero.setdefault("stage3_param_persistence_threshold", 10 * hidden_size)
    elif zero.get("stage"):
        layer = min(max(12 * square, LEAST_BUCKET), 500_000_000)
        zero.setdefault("reduce_bucket_size", layer)
        zero.setdefault("allgather_bucket_size", layer)


def for_reference(
    values: Mapping[str, Any], mode: str, hidden_size: int, nvme_path: str | None = None, largest: int = 0
) -> dict[str, Any]:
    """The configuration of the frozen reference: ``ds_configs/reference/MODE.json`` in the policy's precision.

    mode: "resident", "offload" (host memory) or "nvme": in the folder ``nvme_path``, read through buffers for
    ``largest`` elements, the largest partition of a weight on one rank. Its trace changes whenever policy and reference
    alternate, so prefetching, which those files switch off, would fetch for nothing. A partition below a block of
    ``aio`` stays in host memory.
    """
    merged = json.loads((FOLDER / "reference" / f"{mode}.json").read_text(encoding="utf-8"))
    merged |= {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 2**31 - 1}
    zero = merged["zero_optimization"]
    zero["stage3_param_persistence_threshold"] = 10 * hidden_size
    if mode == "nvme":
        zero["offload_param"] |= {"nvme_path": nvme_path, "buffer_size": largest}
    if is_bf16(values):
        merged["bf16"] = {"enabled": True}
    return merged
