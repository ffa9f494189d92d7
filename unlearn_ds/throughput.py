"""A few measured steps of a configuration, without evaluation or export: what ``launchers/throughput.py`` runs."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from unlearn_ds import build, dist, ds_json, embedded, engine, log, machine, projection, run_folder, sizing
from unlearn_ds import model as models
from unlearn_ds.config import RunConfig, StopConfig, replace
from unlearn_ds.cost import devices
from unlearn_ds.cost.memory import memory_plan
from unlearn_ds.cost.rlhf import Actor, Cluster
from unlearn_ds.heartbeat import Heartbeat
from unlearn_ds.loop import Run
from unlearn_ds.profiler import Profiler, warm
from unlearn_ds.registry import SCENARIOS, resolve
from unlearn_ds.rlhf import measure as rlhf_measure
from unlearn_ds.rlhf import setting as settings
from unlearn_ds.rlhf.recipe import Recipe

DEFAULT_DEVICE = "A100-80G"
"""What RLHF is modelled on where nothing is known of the device that was measured."""


def main(
    config: RunConfig, num_steps: int, against: str, device: str, num_devices: int, with_rlhf: bool = False
) -> None:
    """Measure, project the ``max_steps`` of ``config``, print, and write JSON and plot into its output folder.

    device, num_devices: of the cluster that RLHF is modelled on; "" for the device that is measured. with_rlhf: run a
    few steps of SFT, reward model and PPO here too.
    """
    if not config.log.verbose:
        log.quiet()  # once more: DeepSpeed sets the level of its logger on import
    engine.start(config.engine)
    recipe = Recipe(config.optim.batch_size, config.optim.gradient_accumulation_steps)
    ready = settings.ready(config, recipe) if with_rlhf else None
    measured, actor = measure(config, num_steps)
    rlhf = measure_rlhf(config, ready, recipe, num_steps) if ready else None
    if dist.is_main():
        cluster = Cluster(device or devices.memory_name(measured["device"]) or DEFAULT_DEVICE, num_devices)
        found = projection.project(measured, actor, config.optim.max_steps, against, cluster)
        projection.print_projection(found)
        if rlhf is not None:
            found["rlhf_measured"] = rlhf
            projection.print_measured_rlhf(found)
        for path in projection.write(Path(config.output_dir or ""), found):
            log.say(f"written     {path}")


def measure(config: RunConfig, num_steps: int) -> tuple[dict[str, Any], Actor]:
    """Take ``num_steps`` optimizer steps as a run would, and return their figures (medians over the steps after the
    first ones) and the model's sizes."""
    free = machine.host_bytes(free=True)
    run = build_run(config, num_steps)
    with Heartbeat(config.engine.heartbeat_seconds):
        run.fit({"step": 0, "skipped_in_a_row": 0})
    host_bytes = free - machine.host_bytes(free=True)
    run.profiler.finish(run.folder)
    architecture = run.policy.model.config
    run.policy.close()
    size, text = models.size(architecture), architecture.get_text_config()
    options, heads = text.to_dict(), text.num_attention_heads
    kv_heads = options.get("num_key_value_heads") or heads
    actor = Actor(size, kv_heads * (options.get("head_dim") or text.hidden_size // heads))
    return {**figures(config, run.profiler, size.total), **memory(config, run.profiler, host_bytes)}, actor


def measure_rlhf(config: RunConfig, ready: settings.Ready, recipe: Recipe, num_steps: int) -> dict[str, Any]:
    """A few steps of each stage of RLHF on the same model, prompts, batch and devices, scaled to published samples."""
    with tempfile.TemporaryDirectory(dir=config.output_dir, ignore_cleanup_errors=True) as folder:
        # One folder for all ranks: the main one's.
        shared = Path(dist.gather_objects(folder)[0])
        setting = settings.setting(config, ready.path, ready.learned, shared, engine.synchronize)
        with Heartbeat(config.engine.heartbeat_seconds):
            found = rlhf_measure.measure(ready.path, ready.learned, num_steps, recipe, setting)
        dist.barrier()
    return found


def build_run(config: RunConfig, num_steps: int) -> Run:
    """The run of ``config`` with ``num_steps`` steps, and without evaluations, checkpoints and memorizing first."""
    short = replace(
        config, stop=StopConfig(),
        **{"optim.max_steps": num_steps, "eval.every": 0, "checkpoint.save_every": 0, "checkpoint.overwrite": True},
    )  # fmt: skip
    device = engine.start(config.engine)
    profiler = Profiler(config.log.profile, config.log.trace, engine.device_name(), engine.synchronize)
    folder = run_folder.open_run(short, engine.versions())
    values = ds_json.load(config.engine.ds_config)
    build.check_offload(config, values)
    path = embedded.locate(config.model.path)
    encoder = build.encoder(config, path)
    data = resolve("scenario", config.scenario, SCENARIOS).load(config, encoder)
    policy = build.policy(short, path, values, device)
    loader = build.loader(short, encoder, data, data.forget["train"])
    reference = build.reference(short, path, values, policy, loader)
    return Run(short, policy, loader, log.StopSignal(), build.stopping(short), reference, folder, profiler=profiler)


def memory(config: RunConfig, profiler: Profiler, host_bytes: int) -> dict[str, Any]:
    """Bytes of the fullest device; on GPUs also of this node's host memory, and both as the plan has them for
    micro-batches as long as the longest measured."""
    found = {"peak_memory_bytes": max(row["peak_memory_bytes"] for row in profiler.rows)}
    if dist.device_type() == "cpu":
        return found
    shape, num_adapter = sizing.shape_of(config)
    setup = sizing.setup_of(config, shape, num_adapter, sizing.machine(config))
    micro_batches = config.optim.gradient_accumulation_steps * dist.world_size()
    tokens = max(row["tokens"] for row in profiler.rows)
    plan = memory_plan(shape, setup._replace(num_tokens=round(tokens / micro_batches)))
    return {
        **found,
        # The allocator, which measures the peak, knows nothing of the context.
        "planned_memory_bytes": plan.peak() - plan.of("CUDA context"),
        "host_memory_bytes": host_bytes, "planned_host_bytes": plan.peak("host") * setup.ranks_per_node,
    }  # fmt: skip


def figures(config: RunConfig, profiler: Profiler, parameters: int) -> dict[str, Any]:
    """What was measured: medians, of all devices together unless the name says otherwise."""
    rows = warm(profiler.rows)
    median = {
        name: statistics.median(row[name] for row in rows)
        for name in ("step_seconds", "tokens", "tokens_per_second", "hardware_flops", "model_flops",
                     "tflops_per_device")
    }  # fmt: skip
    optim, used = config.optim, profiler.summary()["utilization"]
    samples = optim.batch_size * optim.gradient_accumulation_steps * dist.world_size()
    return {
        "model": Path(config.model.path).name, "parameters": parameters, "device": profiler.device_name,
        "ranks": dist.world_size(), "steps_taken": len(profiler.rows), "steps_counted": len(rows),
        "seconds_a_step": median["step_seconds"], "tokens_a_step": median["tokens"],
        "forget_samples_a_step": samples, "tokens_per_second": median["tokens_per_second"],
        "model_flops_a_step": median["model_flops"], "hardware_flops_a_step": median["hardware_flops"],
        "tflops_per_device": median["tflops_per_device"], **used,
    }  # fmt: skip
