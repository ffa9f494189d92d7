"""Refuse a configuration that cannot work, before any model is touched. Nothing here imports torch."""

from __future__ import annotations

import math
import os
from pathlib import Path

from unlearn_ds import ds_json
from unlearn_ds.config import (
    DATA_SUFFIXES,
    EMBEDDED_MODEL,
    RunConfig,
    UsageError,
    looks_like_file,
    retain_names,
    stop_rules,
)
from unlearn_ds.registry import JUDGES, KERNELS, OBJECTIVES, REFERENCES, SCENARIOS, STOP_RULES, check_name, resolve


def check(config: RunConfig) -> None:
    """Raise ``UsageError`` with a sentence to act on for the first thing in ``config`` that cannot work."""
    try:
        check_name("scenario", config.scenario, SCENARIOS)
        check_name("objective", config.objective.name, OBJECTIVES)
        check_name("reference", config.engine.reference, {"auto": "", **REFERENCES})
        check_name("judge", config.eval.judge, {"auto": "", **JUDGES})
    except ValueError as error:
        raise UsageError(str(error)) from None
    _check_choice("--data", config.data.source, ("sample", "full"))
    _check_choice("--data.template", config.data.template, ("auto", "chat", "paper", "none"))
    _check_choice("--reduction", config.objective.reduction, ("sequence", "token"))
    _check_choice("--schedule", config.optim.schedule, ("linear", "cosine", "constant"))
    _check_choice("--eval.gather", config.eval.gather, ("auto", "always", "never"))
    _check_choice("--attention", config.model.attention, ("auto", "flash", "varlen", "flex", "sdpa"))
    _check_choice("--engine.loss_kernel", config.engine.loss_kernel, ("auto", *KERNELS))
    _check_choice("--resume", config.checkpoint.resume, ("none", "auto"))
    _check_choice("--lora_export", config.lora.export, ("merged", "separate"))
    _check_numbers(config)
    _check_relations(config)
    for name, value in stop_rules(config.stop.rules).items():
        resolve("stop rule", name, STOP_RULES).check(value, config)
    _check_files(config)


def _check_choice(flag: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UsageError(f"{flag} must be one of {', '.join(valid)}; got '{value}'.")


def _check_numbers(config: RunConfig) -> None:
    objective, optim = config.objective, config.optim
    positive = {
        "--max_steps": optim.max_steps, "--batch_size": optim.batch_size, "--learning_rate": optim.learning_rate,
        "--gradient_accumulation_steps": optim.gradient_accumulation_steps, "--data.max_length": config.data.max_length,
        "--optim.max_skipped": optim.max_skipped,
        "--eval.batch_size": config.eval.batch_size, "--eval.max_new_tokens": config.eval.max_new_tokens,
        "--memorize.epochs": config.memorize.epochs, "--memorize.batch_size": config.memorize.batch_size,
        "--checkpoint.keep": config.checkpoint.keep, "--engine.timeout_minutes": config.engine.timeout_minutes,
        "--memorize.learning_rate": config.memorize.learning_rate, "--optim.adam_epsilon": optim.adam_epsilon,
        "--eval.num_unlearned": config.eval.num_unlearned, "--eval.num_unseen": config.eval.num_unseen,
        "--eval.num_normal": config.eval.num_normal, "--eval.num_neutral_texts": config.eval.num_neutral_texts,
        "--eval.num_neutral_choices": config.eval.num_neutral_choices,
        "--eval.num_neutral_questions": config.eval.num_neutral_questions,
        "--eval.num_harmless": config.eval.num_harmless,
        "--data.prompt_characters": config.data.prompt_characters, "--data.num_self": config.data.num_self,
        "--data.self_tokens": config.data.self_tokens,
        "--data.answer_characters": config.data.answer_characters,
        "--memorize.unless_rate": config.memorize.unless_rate,
        "--stop.patience_steps": config.stop.patience_steps, "--stop.window": config.stop.window,
    }  # fmt: skip
    for flag, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{flag} must be above 0; got {value}.")
    not_negative = {
        "--engine.loss_workspace_mib": config.engine.loss_workspace_mib, "--nodes": config.cluster.nodes,
        "--gpus_per_node": config.cluster.gpus_per_node, "--gpu_memory": config.cluster.gpu_memory,
        "--host_memory": config.cluster.host_memory, "--global_batch_size": optim.global_batch_size,
        "--eps_forget": objective.eps_forget, "--eps_mismatch": objective.eps_mismatch, "--seed": config.seed,
        "--eps_retain": objective.eps_retain, "--forget_bound": objective.forget_bound,
        "--gradient_clipping": optim.gradient_clipping, "--warmup_ratio": optim.warmup_ratio,
        "--save_every": config.checkpoint.save_every, "--eval_every": config.eval.every,
        "--weight_decay": optim.weight_decay, "--data.max_rejected": config.data.max_rejected,
        "--retain_batch_size": optim.retain_batch_size, "--data.limit": config.data.limit,
        "--eval.margin": config.eval.margin, "--memorize.eps_retain": config.memorize.eps_retain,
        "--optim.adam_beta1": optim.adam_beta1, "--optim.adam_beta2": optim.adam_beta2,
        "--eval.num_other_form": config.eval.num_other_form,
        "--stop.extra": config.stop.extra, "--stop.max_accuracy_drop": config.stop.max_accuracy_drop,
        "--stop.max_perplexity_rise": config.stop.max_perplexity_rise,
        "--engine.heartbeat_seconds": config.engine.heartbeat_seconds,
        "--lora_rank": config.lora.rank, "--objective.mismatch_smoothing": objective.mismatch_smoothing,
    }  # fmt: skip
    for flag, value in not_negative.items():
        if not (math.isfinite(value) and value >= 0):
            hint = " The sign of the ascent is written in the code." if flag.startswith("--eps") else ""
            raise UsageError(f"{flag} must not be negative; got {value}.{hint}")
    below_one = {
        "--objective.mismatch_smoothing": objective.mismatch_smoothing,
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
    if "{answer}" not in config.eval.judge_form:
        raise UsageError(
            f"--eval.judge_form must hold {{answer}}, and may hold {{prompt}}; got {config.eval.judge_form!r}."
        )
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
    engine, folder = config.engine, config.engine.nvme_path
    users = ["--reference nvme"] * (engine.reference == "nvme")
    if engine.ds_config != "auto" and ds_json.uses_disk(ds_json.load(engine.ds_config)):
        users.append(f"--ds_config {engine.ds_config}")
    if users and folder is None:
        raise UsageError(
            f"{' and '.join(users)} needs --engine.nvme_path FOLDER, a folder on a local disk for weights and "
            "optimizer states."
        )
    if folder is not None and not users:
        raise UsageError(
            "--engine.nvme_path is only read by --reference nvme and by a --ds_config that offloads to nvme; this run "
            f"has --reference {engine.reference} and --ds_config {engine.ds_config}."
        )
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise UsageError(f"--engine.nvme_path: no such folder: {folder}")
    if folder is not None and not os.access(Path(folder).expanduser(), os.W_OK):
        raise UsageError(f"--engine.nvme_path: {folder} cannot be written to.")


def _check_files(config: RunConfig) -> None:
    data = config.data
    for flag, name in (("--forget_data", data.forget_data), ("--mismatch_data", data.mismatch_data),
                       ("--harmless_data", data.harmless_data),
                       *(("--retain_data", source) for source in retain_names(data))):  # fmt: skip
        if name and looks_like_file(name) and not Path(name).expanduser().exists():
            raise UsageError(f"{flag}: no such file: {name}")
        if name and Path(name).expanduser().is_file() and not name.lower().endswith(DATA_SUFFIXES):
            raise UsageError(f"{flag}: {name} is none of {', '.join(DATA_SUFFIXES)}")
    if data.retain_data and not retain_names(data):
        raise UsageError(
            "--retain_data self needs a second source: held-out normal rows and unrelated answers come from it."
        )
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
