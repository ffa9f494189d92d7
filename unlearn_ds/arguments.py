"""The command line: flags to a ``RunConfig``, and the help page.

Common knobs are flat flags; every other knob is ``--section.field value``. An unknown name is refused with the nearest
valid ones. Precedence: defaults < preset < command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from unlearn_ds.config import EMBEDDED_MODEL, RunConfig, UsageError, replace
from unlearn_ds.presets import EMBEDDED_PRESET, FULL, PRESETS, SCENARIO_DEFAULTS
from unlearn_ds.registry import SCENARIOS, check_name, did_you_mean

FLAT = {
    "model": "model.path", "attention": "model.attention",
    "activation_checkpointing": "model.activation_checkpointing",
    "share_prompts": "model.share_prompts",
    "data": "data.source", "forget_data": "data.forget_data", "retain_data": "data.retain_data",
    "mismatch_data": "data.mismatch_data", "harmless_data": "data.harmless_data",
    "mismatch_text": "data.mismatch_text",
    "forget_columns": "data.forget_columns", "retain_columns": "data.retain_columns",
    "mismatch_columns": "data.mismatch_columns", "template": "data.template",
    "objective": "objective.name", "eps_forget": "objective.eps_forget", "eps_mismatch": "objective.eps_mismatch",
    "eps_retain": "objective.eps_retain", "num_mismatch": "objective.num_mismatch",
    "reduction": "objective.reduction", "forget_bound": "objective.forget_bound", "memorize": "memorize.enabled",
    "learning_rate": "optim.learning_rate", "weight_decay": "optim.weight_decay", "schedule": "optim.schedule",
    "warmup_ratio": "optim.warmup_ratio", "max_steps": "optim.max_steps", "batch_size": "optim.batch_size",
    "retain_batch_size": "optim.retain_batch_size",
    "gradient_accumulation_steps": "optim.gradient_accumulation_steps",
    "global_batch_size": "optim.global_batch_size", "gradient_clipping": "optim.gradient_clipping",
    "lora_rank": "lora.rank", "lora_alpha": "lora.alpha", "lora_targets": "lora.targets",
    "lora_export": "lora.export",
    "ds_config": "engine.ds_config", "reference": "engine.reference",
    "nodes": "cluster.nodes", "gpus_per_node": "cluster.gpus_per_node", "gpu_memory": "cluster.gpu_memory",
    "host_memory": "cluster.host_memory",
    "eval_every": "eval.every", "judge": "eval.judge", "stop": "stop.rules",
    "save_every": "checkpoint.save_every", "resume": "checkpoint.resume", "overwrite": "checkpoint.overwrite",
    "profile": "log.profile", "trace": "log.trace",
}  # fmt: skip
"""Flat flag -> dotted knob. Fields of ``RunConfig`` itself (scenario, preset, ...) are flags as they are."""

IGNORED = ("local_rank",)
"""Appended by the ``deepspeed`` launcher; the rank comes from the environment."""


def parse(flags: Mapping[str, Any]) -> RunConfig:
    """Build the configuration from flags as Python Fire hands them over (names without dashes, values as typed text).

    Raises ``UsageError`` for an unknown flag, scenario or preset and for a value of the wrong type. Values are checked
    against each other and against the disk by ``checks.check``, not here.
    """
    given = {_dotted(name): value for name, value in flags.items() if name not in IGNORED}
    knobs = {name: _coerce(name, value) for name, value in given.items()}
    scenario = knobs.get("scenario", RunConfig.scenario)
    try:
        check_name("scenario", scenario, SCENARIOS)
    except ValueError as error:
        raise UsageError(str(error)) from None
    preset, presets = knobs.get("preset"), PRESETS.get(scenario, {})
    if preset is None and knobs.get("model.path", EMBEDDED_MODEL) == EMBEDDED_MODEL:
        preset = EMBEDDED_PRESET
    if preset is not None and preset not in presets:
        raise UsageError(f"unknown preset '{preset}'. {did_you_mean(preset, presets)}")
    config = replace(RunConfig(), **SCENARIO_DEFAULTS.get(scenario, {}))
    values = presets[preset] if preset else {}
    if preset and values.get("lora.rank") and knobs.get("lora.rank") == 0:
        preset, values = _for_all_weights(preset, presets, knobs)
    if preset and preset.endswith(FULL) and knobs.get("lora.rank") and "optim.learning_rate" not in knobs:
        raise UsageError(f"--preset {preset} is for all weights; adapters take --preset {preset.removesuffix(FULL)}.")
    config = replace(config, **values)
    config = replace(config, **{**knobs, "preset": preset})
    return _resolve_defaults(config)


def _for_all_weights(
    preset: str, presets: Mapping[str, Mapping[str, Any]], knobs: Mapping[str, Any]
) -> tuple[str, Mapping[str, Any]]:
    """What a preset of adapters becomes with ``--lora_rank 0``: their learning rate is a hundred times too high."""
    if preset + FULL in presets:
        return preset + FULL, presets[preset + FULL]
    if "optim.learning_rate" not in knobs:
        raise UsageError(f"--preset {preset} --lora_rank 0: its learning rate is for adapters; give --learning_rate.")
    return preset, {name: value for name, value in presets[preset].items() if not name.startswith("lora.")}


def follows_plan(config: RunConfig) -> bool:
    """True for a run whose open knobs follow from the memory plan: with a preset of a large model, or cluster flags.

    Working that out loads libraries, which other runs do not need so early."""
    cluster = (config.cluster.nodes, config.cluster.gpus_per_node, config.cluster.gpu_memory)
    return config.preset not in (None, EMBEDDED_PRESET) or any((*cluster, config.optim.global_batch_size))


def given(flags: Mapping[str, Any]) -> set[str]:
    """Dotted names of the knobs that flags set: what nothing else may choose."""
    return {_dotted(name) for name in flags if name not in IGNORED}


def _resolve_defaults(config: RunConfig) -> RunConfig:
    """Replace the knobs whose default depends on other knobs by plain values."""
    if config.output_dir is None:
        config = replace(config, output_dir=f"runs/{config.scenario}")
    if config.memorize.enabled is None:
        sample = config.data.source == "sample" and not config.data.forget_data
        config = replace(config, **{"memorize.enabled": sample})
    if config.optim.retain_batch_size == 0:
        config = replace(config, **{"optim.retain_batch_size": config.optim.batch_size})
    if config.lora.rank > 0 and config.lora.alpha is None:
        config = replace(config, **{"lora.alpha": 2.0 * config.lora.rank})
    if config.engine.reference == "auto":
        config = replace(config, **{"engine.reference": "adapter" if config.lora.rank > 0 else "offload"})
    return config


def for_machine(config: RunConfig, computes_bf16: bool) -> RunConfig:
    """Replace ``--ds_config auto``: ZeRO-3 in bf16, or in fp32 on a CPU without bf16 units, which is ten times slower
    in bf16 than in fp32."""
    if config.engine.ds_config != "auto":
        return config
    return replace(config, **{"engine.ds_config": "zero3" if computes_bf16 else "zero3_fp32"})


def sections() -> dict[str, Any]:
    """Name -> dataclass of every section of ``RunConfig``."""
    return {field.name: type(field.default) for field in dataclasses.fields(RunConfig) if _is_section(field)}


def _is_section(field: dataclasses.Field) -> bool:
    return dataclasses.is_dataclass(field.default)


def _dotted(flag: str) -> str:
    if flag in FLAT:
        return FLAT[flag]
    own = {field.name for field in dataclasses.fields(RunConfig) if not _is_section(field)}
    if flag in own:
        return flag
    section, dot, name = flag.partition(".")
    fields = {key: {field.name for field in dataclasses.fields(cls)} for key, cls in sections().items()}
    if dot and section in fields and name in fields[section]:
        return flag
    every = {*FLAT, *own, *(f"{key}.{field}" for key, names in fields.items() for field in names)}
    hint = did_you_mean(flag, every).replace(" '", " '--")
    raise UsageError(f"unknown flag '--{flag}'. {hint}")


def _coerce(name: str, value: Any) -> Any:
    """Convert a value to the type of its field; ``UsageError`` when it does not fit."""
    section, dot, field = name.partition(".")
    owner = sections()[section] if dot else RunConfig
    wanted = typing.get_type_hints(owner)[field if dot else section]
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    if isinstance(value, str) and value == "None" and type(None) in options:
        return None
    if isinstance(value, str) and kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is str and not isinstance(value, (bool, tuple, list, dict, type(None))):
        return str(value)
    if typing.get_origin(kind) is tuple and not isinstance(value, (bool, dict)):
        parts = value if isinstance(value, (tuple, list)) else str(value).split(",")
        return tuple(str(part).strip() for part in parts)
    shown = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(kind, "a,b,c")
    flat = {dotted: flag for flag, dotted in FLAT.items()}
    raise UsageError(f"--{flat.get(name, name)} takes {shown}; got {value!r}.")


def help_text() -> str:
    """The help page: every flag with its default and meaning, common ones first."""
    flat_of = {dotted: flag for flag, dotted in FLAT.items()}
    presets = [f"  {scenario}: {', '.join(names)}" for scenario, names in PRESETS.items()]
    lines = [
        "usage: deepspeed launchers/train.py --scenario hallucination [--flag value ...]", "",
        "Values in brackets are defaults; a preset replaces them, flags replace both, --dry_run shows what will run.",
        f"Presets of each scenario (the embedded model takes {EMBEDDED_PRESET} by itself):", *presets, "",
    ]  # fmt: skip
    for field in dataclasses.fields(RunConfig):
        if not _is_section(field):
            lines.append(_help_line(field.name, field))
    for section, cls in sections().items():
        lines += ["", f"{section}:"]
        lines += [
            _help_line(flat_of.get(f"{section}.{f.name}", f"{section}.{f.name}"), f) for f in dataclasses.fields(cls)
        ]
    return "\n".join(lines)


def _help_line(flag: str, field: dataclasses.Field) -> str:
    default = "" if field.default in (None, ()) else f" [{field.default}]"
    return f"  --{flag:<30} {field.metadata['help']}{default}"
