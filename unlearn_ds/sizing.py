"""The machine and the model of a run as plans see them: known without loading a weight, and without a hub."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch

from unlearn_ds import dist, ds_json, embedded, lora, workspace
from unlearn_ds import model as models
from unlearn_ds.config import EMBEDDED_MODEL, RunConfig, UsageError
from unlearn_ds.cost import shapes
from unlearn_ds.cost.memory import USABLE, Plan, memory_plan
from unlearn_ds.cost.setup import Setup
from unlearn_ds.cost.shapes import Shape
from unlearn_ds.machine import host_bytes
from unlearn_ds.registry import OBJECTIVES, resolve

GIB = 2**30


class Machine(NamedTuple):
    """Ranks of a run and what each may fill. device_bytes: of one GPU; None where none is known, as on a CPU.
    host_bytes: of one node; None: unknown."""

    nodes: int
    ranks_per_node: int
    device_bytes: int | None
    host_bytes: int | None

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def usable_bytes(self) -> int | None:
        return int(self.device_bytes * USABLE) if self.device_bytes else None


def machine(config: RunConfig) -> Machine:
    """Nodes and GPUs as flags give them, else as the launcher has started them, else this one device."""
    cluster = config.cluster
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    local = int(os.environ.get("LOCAL_SIZE", local))
    ranks = cluster.gpus_per_node or min(local, world) if world > 1 or cluster.gpus_per_node else 1
    nodes = cluster.nodes or max(1, world // ranks)
    memory = int(cluster.gpu_memory * GIB) or None
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory
    host = int(cluster.host_memory * GIB) or None
    if host is None and not cluster.gpu_memory:
        host = host_bytes()
    return Machine(nodes, ranks, memory, host)


def check_machine(config: RunConfig) -> None:
    """Raise ``UsageError`` where flags promise another number of ranks than a launcher has started."""
    world, cluster = int(os.environ.get("WORLD_SIZE", "1")), config.cluster
    promised = machine(config).world_size
    if (cluster.nodes or cluster.gpus_per_node) and promised != world:
        raise UsageError(
            f"--nodes and --gpus_per_node make {promised} ranks, and the launcher has started {world}: leave them out "
            "of a run, or add --dry_run to plan for another cluster."
        )


def shape_of(config: RunConfig) -> tuple[Shape, int]:
    """Shape of the model and parameters of its adapters. Shapes of preset models are known where none is on this disk;
    any other model's configuration is read from the hub."""
    known = shapes.public(config.model.path)
    if known is not None:
        adapter = known.adapter(config.lora.rank, config.lora.targets) if config.lora.rank else 0
        return known, adapter
    if config.model.path == EMBEDDED_MODEL:
        embedded.find_gguf()
    architecture = models.load_config(embedded.locate(config.model.path), config.model.revision)
    return models.shape(architecture), lora.size(architecture, config.lora)


def setup_of(config: RunConfig, shape: Shape, num_adapter: int, ranks: Machine) -> Setup:
    """What plans need to know of a run, for micro-batches as long as rows are allowed to be."""
    values = ds_json.for_machine(ds_json.load(config.engine.ds_config), ranks.ranks_per_node)
    zero: dict[str, Any] = ds_json.for_policy(values, config.optim, shape.hidden_size).get("zero_optimization", {})
    optim, terms = config.optim, resolve("objective", config.objective.name, OBJECTIVES)(config.objective)
    per_term = {"forget": optim.batch_size, "retain": optim.retain_batch_size}
    per_term["mismatch"] = optim.batch_size * config.objective.num_mismatch
    has_kl = any(term.loss == "kl" for term in terms)
    on_gpu = ranks.device_bytes is not None or dist.device_type() != "cpu"
    return Setup(
        stage=ds_json.stage(values), world_size=ranks.world_size, ranks_per_node=ranks.ranks_per_node,
        bytes_per_weight=2 if ds_json.is_bf16(values) else 4, reference=config.engine.reference if has_kl else None,
        num_tokens=sum(per_term[term.rows] for term in terms) * config.data.max_length,
        num_kl_tokens=optim.retain_batch_size * config.data.max_length if has_kl else 0,
        accumulation=optim.gradient_accumulation_steps, checkpointing=config.model.activation_checkpointing,
        workspace_bytes=workspace.num_bytes(
            config.engine.loss_workspace_mib, "cuda" if on_gpu else "cpu", ds_json.is_bf16(values)
        ),
        hpz=min(zero.get("zero_hpz_partition_size", 1), ranks.world_size),
        offload_param=ds_json.offloads(values, "offload_param"),
        offload_optimizer=ds_json.offloads(values, "offload_optimizer"), num_adapter=num_adapter,
        reduce_bucket=zero.get("reduce_bucket_size", 500_000_000), gather_bucket=zero.get("allgather_bucket_size", 0),
        prefetch=zero.get("stage3_prefetch_bucket_size", 0),
        persistence=zero.get("stage3_param_persistence_threshold", 0),
        max_live=zero.get("stage3_max_live_parameters", 10**9), max_reuse=zero.get("stage3_max_reuse_distance", 10**9),
        sub_group=zero.get("sub_group_size", 10**9),
        communication_bytes=4 if values.get("communication_data_type") == "fp32" else 0, on_gpu=on_gpu,
    )  # fmt: skip


def plan_of(config: RunConfig, ranks: Machine) -> Plan:
    """The memory plan of one rank."""
    shape, num_adapter = shape_of(config)
    return memory_plan(shape, setup_of(config, shape, num_adapter, ranks))


def fits(plan: Plan, ranks: Machine) -> bool:
    """True where a plan fits every memory that is known; pinned memory may take 9 tenths of a host's."""
    device = ranks.usable_bytes is None or plan.peak("device") <= ranks.usable_bytes
    host = ranks.host_bytes is None or on_host(plan, ranks) <= 0.9 * ranks.host_bytes
    return device and host


def on_host(plan: Plan, ranks: Machine) -> int:
    """Bytes of a node's host memory that its ranks take; on a CPU what is called the device lies there too."""
    on_cpu = ranks.device_bytes is None and dist.device_type() == "cpu"
    return ranks.ranks_per_node * (plan.peak("host") + (plan.peak("device") if on_cpu else 0))
