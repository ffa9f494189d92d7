"""Choices that follow from the memory plan: DeepSpeed configuration, micro-batch, checkpointing, reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from unlearn_ds import log
from unlearn_ds.config import RunConfig, UsageError, replace
from unlearn_ds.cost.communication import communication, total
from unlearn_ds.cost.memory import Plan, memory_plan
from unlearn_ds.cost.shapes import Shape
from unlearn_ds.presets import FULL
from unlearn_ds.sizing import GIB, Machine, fits, setup_of, shape_of

BY_COST = ("zero2", "zero3_hpz", "zero3", "zero2_offload", "zero3_offload", "zero3_offload_params", "zero3_nvme")
"""Configurations from the fastest to the one that leaves most memory: less traffic before more, devices before hosts
before disks. hpZ spares the network half of the gathers and only helps where there are several nodes."""

FLAGS = {
    "engine.ds_config": "--ds_config", "model.activation_checkpointing": "--activation_checkpointing",
    "optim.batch_size": "--batch_size", "optim.gradient_accumulation_steps": "--gradient_accumulation_steps",
    "engine.reference": "--reference",
}  # fmt: skip
"""Knobs that are chosen, and their flags."""


class Choice(NamedTuple):
    """A knob, the value taken for it, and why."""

    knob: str
    value: Any
    reason: str


class Remedy(NamedTuple):
    """Flags that lower the plan of a configuration, the plan with them, and whether that is enough."""

    flags: str
    plan: Plan
    fits: bool


def choose(config: RunConfig, given: set[str], ranks: Machine) -> tuple[RunConfig, list[Choice]]:
    """The configuration with the knobs that ``given`` leaves open, and why each has its value.

    The first that fits is taken, from fast to slow: see ``BY_COST``; within one DeepSpeed configuration large
    micro-batches come before small ones, kept activations before checkpointing, and a resident reference before an
    offloaded one. hpZ is taken where it sends less between nodes than ZeRO-3: it does not where its second copy of the
    weights leaves room for small micro-batches only. The global batch stays what ``global_batch`` says. Where nothing
    fits, the last is returned.
    Without a device's memory only accumulation follows, from ``--global_batch_size``.
    """
    shape, num_adapter = shape_of(config)
    tried = list(_candidates(config, given, ranks))
    if not tried:
        raise UsageError("no configuration can be tried with these flags.")
    fitting = (c for c in tried if fits(_plan(c, shape, num_adapter, ranks), ranks))
    candidate = next(fitting, tried[-1])
    if candidate.engine.ds_config == "zero3_hpz":
        other = next((c for c in fitting if c.engine.ds_config == "zero3"), None)
        sent = [
            total(communication(shape, setup_of(c, shape, num_adapter, ranks)), group="world")
            for c in (candidate, other or candidate)
        ]
        candidate = other if other and sent[1] <= sent[0] else candidate
    taken = [knob for knob in FLAGS if knob not in given]
    if ranks.device_bytes is None:
        taken = [knob for knob in taken if knob.startswith("optim.")] if config.optim.global_batch_size else []
    return candidate, [
        Choice(knob, value_of(candidate, knob), _reason(candidate, knob, shape, num_adapter, ranks)) for knob in taken
    ]


def say(choices: list[Choice]) -> None:
    for choice in choices:
        value = str(choice.value).lower() if isinstance(choice.value, bool) else choice.value
        log.say(f"chosen      {FLAGS[choice.knob]} {value}: {choice.reason}")


def value_of(config: RunConfig, knob: str) -> Any:
    section, _, field = knob.partition(".")
    return vars(vars(config)[section])[field]


def global_batch(config: RunConfig, ranks: Machine) -> int:
    """Forget rows of an optimizer step: ``--global_batch_size``, else devices x micro-batch x accumulation.

    ``UsageError`` where devices cannot share the rows equally: each takes part in every step.
    """
    optim = config.optim
    rows = optim.global_batch_size or ranks.world_size * optim.batch_size * optim.gradient_accumulation_steps
    if rows % ranks.world_size:
        raise UsageError(
            f"--global_batch_size {rows} cannot be shared by {ranks.world_size} devices: take a multiple of it."
        )
    return rows


def _candidates(config: RunConfig, given: set[str], ranks: Machine) -> Iterator[RunConfig]:
    """Configurations to try in order of preference, knobs of ``given`` as they are."""
    if ranks.device_bytes is None:
        yield replace(config, **_batches(config, given, ranks)[0])
        return
    names = [name for name in BY_COST if name != "zero3_hpz" or ranks.nodes > 1]
    if config.engine.nvme_path is None:
        names.remove("zero3_nvme")
    references = ("adapter",) if config.lora.rank else ("resident", "offload")
    if config.engine.reference == "cached":
        references = ("cached",)
    free = {
        "engine.ds_config": names, "batches": _batches(config, given, ranks),
        "model.activation_checkpointing": (False, True), "engine.reference": references,
    }  # fmt: skip
    tried = [[value_of(config, knob)] if knob in given else values for knob, values in free.items()]
    for ds_config, batches, checkpointing, reference in itertools.product(*tried):
        yield replace(config, **{
            "engine.ds_config": ds_config, "model.activation_checkpointing": checkpointing,
            "engine.reference": reference, **batches,
        })  # fmt: skip


def _batches(config: RunConfig, given: set[str], ranks: Machine) -> list[dict[str, int]]:
    """Micro-batches and accumulations that make up the global batch, largest micro-batch first."""
    optim = config.optim
    share = global_batch(config, ranks) // ranks.world_size
    sizes = [size for size in range(share, 0, -1) if share % size == 0]
    if "optim.gradient_accumulation_steps" in given:
        sizes = [size for size in sizes if size * optim.gradient_accumulation_steps == share]
    if "optim.batch_size" in given or "optim.retain_batch_size" in given:
        sizes = [size for size in sizes if size == optim.batch_size]
    if not sizes:
        raise UsageError(
            f"--global_batch_size {share * ranks.world_size} is not {ranks.world_size} devices x --batch_size x "
            "--gradient_accumulation_steps: leave one of them out."
        )
    return [
        {
            "optim.batch_size": size, "optim.gradient_accumulation_steps": share // size,
            "optim.retain_batch_size": max(1, optim.retain_batch_size * size // optim.batch_size),
        }
        for size in sizes
    ]  # fmt: skip


def _reason(config: RunConfig, knob: str, shape: Shape, num_adapter: int, ranks: Machine) -> str:
    """Why a knob has its value: what the plan would be with what is preferred to it."""
    if not fits(_plan(config, shape, num_adapter, ranks), ranks):
        return "nothing fits; this needs the least of a device"
    rows = global_batch(config, ranks)
    if knob == "optim.batch_size":
        return f"rows of a micro-batch on each of {ranks.world_size} devices, {rows} in a step"
    if knob == "optim.gradient_accumulation_steps":
        return f"{rows} rows of a step / {ranks.world_size} devices / micro-batch"
    if knob == "engine.reference" and num_adapter:
        return "with LoRA the reference is the policy with its adapters off"
    better = {
        "engine.ds_config": [n for n in BY_COST if n != "zero3_hpz" or ranks.nodes > 1],
        "model.activation_checkpointing": [False, True], "engine.reference": ["resident", "offload"],
    }[knob]  # fmt: skip
    value = value_of(config, knob)
    if value not in better or better.index(value) == 0:
        made = ", cached aside, which needs a pass over the retain rows first" if knob == "engine.reference" else ""
        return f"the fastest{made}, and it fits"
    other = better[better.index(value) - 1]
    peak = _plan(replace(config, **{knob: other}), shape, num_adapter, ranks).peak() / GIB
    shown = str(other).lower()
    room = f"{(ranks.usable_bytes or 0) / GIB:.0f} GiB that may be filled"
    return (
        f"{shown} would take {peak:.1f} of {room}" if peak * GIB > (ranks.usable_bytes or 0) else f"{shown} is slower"
    )


def _plan(config: RunConfig, shape: Shape, num_adapter: int, ranks: Machine) -> Plan:
    return memory_plan(shape, setup_of(config, shape, num_adapter, ranks))


def remedies(config: RunConfig, ranks: Machine) -> list[Remedy]:
    """Single changes that lower the plan on the device, those that cost least speed first, and then the first that fit
    together. Empty when it fits."""
    shape, num_adapter = shape_of(config)
    before = _plan(config, shape, num_adapter, ranks)
    if fits(before, ranks):
        return []
    found, together, flags = [], config, []
    for flag, changes, machine in _changes(config, ranks):
        plan = _plan(replace(config, **changes), *_sizes(config, changes, shape, num_adapter), machine)
        if plan.peak() < before.peak() or plan.peak("host") < before.peak("host"):
            found.append(Remedy(flag, plan, fits(plan, machine)))
        if machine == ranks and "lora.rank" not in changes:
            trial = replace(together, **changes)
            if _plan(trial, shape, num_adapter, ranks).peak() < _plan(together, shape, num_adapter, ranks).peak():
                together, flags = trial, [f for f in flags if f.split()[0] != flag.split()[0]] + [flag]
                if fits(_plan(together, shape, num_adapter, ranks), ranks) and len(flags) > 1:
                    return [*found, Remedy(" ".join(flags), _plan(together, shape, num_adapter, ranks), True)]
    return found


def _sizes(config: RunConfig, changes: dict[str, Any], shape: Shape, num_adapter: int) -> tuple[Shape, int]:
    return shape_of(replace(config, **changes)) if "lora.rank" in changes else (shape, num_adapter)


def _changes(config: RunConfig, ranks: Machine) -> Iterator[tuple[str, dict[str, Any], Machine]]:
    """(flags, changes, machine) from the cheapest change to the most expensive."""
    optim = config.optim
    if not config.model.activation_checkpointing:
        yield "--activation_checkpointing true", {"model.activation_checkpointing": True}, ranks
    if config.engine.reference == "resident":
        yield "--reference offload", {"engine.reference": "offload"}, ranks
    if optim.batch_size > 1:
        half, steps = optim.batch_size // 2, 2 * optim.gradient_accumulation_steps
        changes = {
            "optim.batch_size": half, "optim.gradient_accumulation_steps": steps,
            "optim.retain_batch_size": max(1, optim.retain_batch_size // 2),
        }  # fmt: skip
        yield f"--batch_size {half} --gradient_accumulation_steps {steps}", changes, ranks
    yield f"--data.max_length {config.data.max_length // 2}", {"data.max_length": config.data.max_length // 2}, ranks
    now = config.engine.ds_config
    later = BY_COST[BY_COST.index(now) + 1 :] if now in BY_COST else BY_COST
    for name in later:
        if name != "zero3_nvme" and (name != "zero3_hpz" or ranks.nodes > 1):
            yield f"--ds_config {name}", {"engine.ds_config": name}, ranks
    if not config.lora.rank and not (config.preset or "").endswith(FULL):  # whose learning rate is not for adapters
        yield "--lora_rank 16", {"lora.rank": 16, "engine.reference": "adapter"}, ranks
    for nodes in (2 * ranks.nodes, 4 * ranks.nodes, 8 * ranks.nodes):
        yield f"--nodes {nodes}", {}, ranks._replace(nodes=nodes)


def resolved(config: RunConfig, given: set[str], ranks: Machine) -> RunConfig:
    """The configuration to run, each choice said; for runs that ``arguments.follows_plan``."""
    if ranks.device_bytes is None and not config.optim.global_batch_size:
        log.say("chosen      nothing: no memory of a GPU is known here; --gpu_memory GiB plans for one")
        return config
    if config.engine.ds_config == "auto":
        config = replace(config, **{"engine.ds_config": "zero3"})
    config, choices = choose(config, given, ranks)
    say(choices)
    return config
