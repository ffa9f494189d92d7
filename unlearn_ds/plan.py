"""``--dry_run``: what a run would do and whether it fits, without loading any weights."""

from __future__ import annotations

import json

from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from unlearn_ds import choose, dist, ds_json, log, sizing
from unlearn_ds.config import RunConfig, to_dict
from unlearn_ds.cost import memory
from unlearn_ds.cost.communication import Volume, communication
from unlearn_ds.cost.memory import Plan, memory_plan
from unlearn_ds.cost.setup import Setup
from unlearn_ds.cost.shapes import Shape
from unlearn_ds.exit_codes import FINISHED, USAGE
from unlearn_ds.presets import PRESETS
from unlearn_ds.sizing import GIB, Machine

WHEN = {
    "always": "", "step": "in a step", "loss": "in the loss", "backward": "in backward", "update": "in an update",
    "checkpoint": "saving", "evaluation": "evaluating",
}  # fmt: skip


def dry_run(config: RunConfig) -> int:
    """Print the resolved configuration, the DeepSpeed configuration, the memory plan of a rank and its traffic.

    Returns an exit code: that of bad usage where the run does not fit."""
    disable_progress_bar()
    ranks = sizing.machine(config)
    values = ds_json.for_machine(ds_json.load(config.engine.ds_config), ranks.ranks_per_node, config.engine.nvme_path)
    shape, num_adapter = sizing.shape_of(config)
    setup = sizing.setup_of(config, shape, num_adapter, ranks)
    log.say(json.dumps(to_dict(config), indent=1))
    log.say(f"DeepSpeed configuration of the policy ({config.engine.ds_config}):")
    log.say(json.dumps(ds_json.for_policy(values, config.optim, shape.hidden_size), indent=1))
    plan = memory_plan(shape, setup)
    trained = f", {num_adapter / 1e6:,.1f}M of them in adapters trained" if num_adapter else ""
    log.say(
        f"memory plan of one rank of {ranks.nodes} x {ranks.ranks_per_node}, {(shape.total + num_adapter) / 1e6:,.1f}M "
        f"parameters{trained}, up to {setup.num_tokens:,} tokens a micro-batch:"
    )
    say_plan(plan, ranks.usable_bytes)
    say_totals(plan, ranks)
    say_batch(config, ranks)
    say_communication(communication(shape, setup), ranks)
    say_remedies(choose.remedies(config, ranks))
    say_reference_modes(config, shape, setup)
    return FINISHED if sizing.fits(plan, ranks) else USAGE


def say_batch(config: RunConfig, ranks: Machine) -> None:
    """Rows of a step and of the run; more devices take more, and cost more."""
    rows, optim = choose.global_batch(config, ranks), config.optim
    log.say(f"forget rows: {rows:,} a step, {rows * optim.max_steps:,} in the {optim.max_steps:,} steps of the run")
    published = PRESETS[config.scenario].get(config.preset or "", {}).get("optim.batch_size", rows)
    if rows > published and not optim.global_batch_size:
        log.say(
            f"the preset's batch of {published} is one device's: --global_batch_size or fewer --max_steps cost less"
        )


def say_plan(plan: Plan, usable: int | None = None) -> None:
    """The plan as a table of GiB, narrow enough for 80 columns. usable: bytes of a device that may be filled."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    for name, align in (("what", "left"), ("device", "right"), ("host", "right"), ("disk", "right"), ("when", "left")):
        table.add_column(name, justify=align, no_wrap=True)
    for line in plan.lines:
        cells = [f"{line.num_bytes / GIB:.2f}" if line.where == where else "" for where in ("device", "host", "disk")]
        when = WHEN[line.when]
        if line.when == "evaluation" and usable is not None and line.where == "device" and line.num_bytes > usable:
            when = "not made"
        table.add_row(line.what, *cells, when)
    peaks = [f"{plan.peak(where) / GIB:.2f}" for where in ("device", "host", "disk")]
    table.add_row("at the fullest moment of a step", *peaks, "")
    if log.is_main():
        log.console().print(table)


def say_totals(plan: Plan, ranks: Machine) -> None:
    """Each memory that is known against what the plan needs of it."""
    known = [("a GPU", plan.peak("device"), ranks.device_bytes, memory.USABLE)]
    known.append(("a node's host memory", sizing.on_host(plan, ranks), ranks.host_bytes, 0.9))
    for name, needed, there, share in known:
        if there is None and name == "a GPU" and dist.device_type() == "cpu":
            continue  # the device is the host
        if there is None:
            flag = "--gpu_memory" if name == "a GPU" else "--host_memory"
            log.say(f"{name}: {needed / GIB:,.1f} GiB needed; {flag} GiB says how much there is")
            continue
        verdict = "fits" if needed <= share * there else "DOES NOT FIT"
        if verdict != "fits" and ranks.device_bytes is None:
            verdict += " without GPUs; --gpu_memory GiB plans for some"
        log.say(f"{name}: {needed / GIB:,.1f} of {there / GIB:,.1f} GiB, of which {share:.0%} may be filled: {verdict}")


def say_communication(volumes: tuple[Volume, ...], ranks: Machine) -> None:
    """Traffic of a step; nothing for one rank."""
    if volumes:
        log.say(f"traffic of a step, whole tensors of which a rank moves {1 - 1 / ranks.world_size:.0%}:")
    for volume in volumes:
        size = f"{volume.num_bytes / GIB:9.2f} GiB in {volume.calls:,} calls"
        log.say(f"  {volume.what:<36} {volume.operation:<15}{size}{' within a node' * (volume.group == 'node')}")


def say_remedies(found: list[choose.Remedy]) -> None:
    """What would make a plan fit, with what it would then need."""
    if found:
        log.say("what would help, the least costly first (GiB of a device, and of host memory a rank, after it):")
    for remedy in found:
        enough = "  fits" if remedy.fits else "  not enough"
        log.say(f"  {remedy.flags:<44}{remedy.plan.peak() / GIB:9.1f}{remedy.plan.peak('host') / GIB:9.1f}{enough}")


def say_reference_modes(config: RunConfig, shape: Shape, setup: Setup) -> None:
    """What each home of the reference would hold on a device, and when it is the right one."""
    if setup.reference is None:
        return
    modes = memory.reference_modes(shape, setup)
    log.say(f"reference of the KL, GiB of one device (this run: {config.engine.reference}):")
    log.say(f"  {'':<10}{'device':>8}{'host':>8}{'disk':>8}  right for")
    for name, mode in modes.items():
        device, host, disk = (f"{count / 2**30:.2f}" for count in (mode.device, mode.host, mode.disk))
        if mode.disk_per_token:
            disk = f"{mode.disk_per_token / 2**10:.0f}K/tok"
        log.say(f"  {name:<10}{device:>8}{host:>8}{disk:>8}  {mode.right_when}")
