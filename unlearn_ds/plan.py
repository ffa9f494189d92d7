"""``--dry_run``: what a run would do and whether it fits, without loading any weights."""

from __future__ import annotations

import json
import os

from transformers.utils.logging import disable_progress_bar

from unlearn_ds import dist, ds_json, embedded, log, lora, workspace
from unlearn_ds import model as models
from unlearn_ds.config import EMBEDDED_MODEL, RunConfig, to_dict
from unlearn_ds.cost import flops, memory
from unlearn_ds.registry import OBJECTIVES, resolve


def dry_run(config: RunConfig) -> None:
    """Print the resolved configuration, the DeepSpeed configuration and the memory plan of one device."""
    disable_progress_bar()
    values = ds_json.load(config.engine.ds_config)
    if config.model.path == EMBEDDED_MODEL:
        embedded.find_gguf()
    architecture = models.load_config(embedded.locate(config.model.path), config.model.revision)
    size = models.size(architecture)
    log.say(json.dumps(to_dict(config), indent=1))
    log.say(f"DeepSpeed configuration of the policy ({config.engine.ds_config}):")
    log.say(json.dumps(ds_json.for_policy(values, config.optim, size.hidden_size), indent=1))
    plan = memory_plan(config, values, size, lora.size(architecture, config.lora))
    log.say(f"memory plan of one device of {world_size()}, {size.total / 1e6:,.1f}M parameters:")
    for name, count in plan.items():
        log.say(f"  {name:<50} {count / 2**30:9.2f} GiB")
    on_device = sum(count for name, count in plan.items() if not any(w in name for w in ("host", "disk", "while")))
    log.say(f"  {'on the device together while training':<50} {on_device / 2**30:9.2f} GiB")
    say_reference_modes(config, values, size, lora.size(architecture, config.lora))


def say_reference_modes(config: RunConfig, values: dict, size: flops.ModelSize, num_adapter: int) -> None:
    """What each home of the reference would hold on a device, and when it is the right one."""
    if not any(term.loss == "kl" for term in resolve("objective", config.objective.name, OBJECTIVES)(config.objective)):
        return
    modes = memory.reference_modes(
        size, bytes_per_weight=2 if ds_json.is_bf16(values) else 4, world_size=world_size(), num_adapter=num_adapter
    )
    log.say(f"reference of the KL, GiB of one device (this run: {config.engine.reference}):")
    log.say(f"  {'':<10}{'device':>8}{'host':>8}{'disk':>8}  right for")
    for name, mode in modes.items():
        device, host, disk = (f"{count / 2**30:.2f}" for count in (mode.device, mode.host, mode.disk))
        if mode.disk_per_token:
            disk = f"{mode.disk_per_token / 2**10:.0f}K/tok"
        log.say(f"  {name:<10}{device:>8}{host:>8}{disk:>8}  {mode.right_when}")


def memory_plan(config: RunConfig, values: dict, size: flops.ModelSize, num_adapter: int = 0) -> dict[str, int]:
    """The memory plan of a configuration, for micro-batches as long as rows are allowed to be.

    num_adapter: parameters of its LoRA adapters."""
    optim, terms = config.optim, resolve("objective", config.objective.name, OBJECTIVES)(config.objective)
    per_term = {"forget": optim.batch_size, "retain": optim.retain_batch_size}
    per_term["mismatch"] = optim.batch_size * config.objective.num_mismatch
    rows = sum(per_term[term.rows] for term in terms)
    return memory.memory_plan(
        size, stage=ds_json.stage(values), world_size=world_size(),
        bytes_per_weight=2 if ds_json.is_bf16(values) else 4,
        reference=config.engine.reference if any(term.loss == "kl" for term in terms) else None,
        num_tokens=rows * config.data.max_length, checkpointing=config.model.activation_checkpointing,
        workspace_bytes=workspace.num_bytes(
            config.engine.loss_workspace_mib, dist.device_type(), ds_json.is_bf16(values)
        ),
        offload_param=offloads(values, "offload_param"), offload_optimizer=offloads(values, "offload_optimizer"),
        num_adapter=num_adapter,
    )  # fmt: skip


def offloads(values: dict, section: str) -> bool:
    """True when the DeepSpeed configuration keeps these states outside the device."""
    return values.get("zero_optimization", {}).get(section, {}).get("device", "none") != "none"


def world_size() -> int:
    """Ranks that the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
