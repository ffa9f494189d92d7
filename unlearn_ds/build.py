"""Build the parts of a run from its configuration: model, engine, loader, reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from unlearn_ds import attention, dist, ds_json, embedded, engine, log
from unlearn_ds import model as models
from unlearn_ds.config import RunConfig
from unlearn_ds.data.encode import Encoder
from unlearn_ds.data.loader import Layout, Loader, TrainingRows
from unlearn_ds.reference import CachedReference, LiveReference, build_cache
from unlearn_ds.registry import OBJECTIVES, resolve
from unlearn_ds.scenarios import ScenarioData
from unlearn_ds.types import Row

Reference = LiveReference | CachedReference


def dtype_of(values: dict[str, Any]) -> torch.dtype:
    """Compute precision of a DeepSpeed configuration."""
    return torch.bfloat16 if ds_json.is_bf16(values) else torch.float32


def load_model(config: RunConfig, path: str, values: dict[str, Any], device: torch.device) -> models.PackedCausalLM:
    """Load a model, sharded where the configuration says so, and wrap it for packed batches."""
    name, _ = attention.resolve(config.model.attention, device, dtype_of(values))
    with engine.sharded_loading(values):
        causal_lm = models.load_causal_lm(path, dtype_of(values), config.model.revision)
    model = models.PackedCausalLM(causal_lm, name, config.engine.loss_workspace_mib * 2**20)
    return model if ds_json.stage(values) == 3 else model.to(device)


def policy(config: RunConfig, path: str, values: dict[str, Any], device: torch.device) -> engine.Policy:
    """The trained model on its engine."""
    name, reason = attention.resolve(config.model.attention, device, dtype_of(values))
    log.say(
        f"engine      ZeRO-{ds_json.stage(values)} on {dist.world_size()} x {device.type}, "
        f"{str(dtype_of(values)).removeprefix('torch.')}; attention: {name} ({reason})"
    )
    model = load_model(config, path, values, device)
    if config.model.activation_checkpointing:
        model.enable_activation_checkpointing()
    return engine.Policy(model, values, config.optim)


def loader(config: RunConfig, encoder: Encoder, data: ScenarioData, forget: Sequence[Row]) -> Loader:
    """Batches of a run that forgets, or memorises, the rows ``forget``."""
    objective = config.objective
    rows = TrainingRows(
        encoder.encode_all(forget),
        [encoder.answer_ids(answer) for answer in data.mismatch_answers],
        encoder.encode_all(data.normal["train"]),
    )
    layout = Layout(
        dist.rank(), dist.world_size(), config.optim.gradient_accumulation_steps,
        config.optim.batch_size, config.optim.retain_batch_size,
    )  # fmt: skip
    terms = resolve("objective", objective.name, OBJECTIVES)(objective)
    return Loader(
        rows, terms, layout, seed=config.seed, num_mismatch=objective.num_mismatch, reduction=objective.reduction,
        max_length=config.data.max_length,
    )  # fmt: skip


def reference(
    config: RunConfig, path: str, values: dict[str, Any], trained: engine.Policy, batches: Loader
) -> Reference | None:
    """The frozen reference of the KL term, made before the first step; None when the objective has no KL term."""
    if not any(term.loss == "kl" for term in batches.terms):
        return None
    mode, device = config.engine.reference, trained.model.device
    log.say(f"reference   {mode}")
    weight_VH = trained.full_weight(trained.model.causal_lm.get_output_embeddings().weight)
    if mode == "cached":
        folder = embedded.cache_folder() / "reference" / trained.weights_digest()
        # Before the first step the policy is the reference: no second model is ever loaded.
        build_cache(folder, trained.hidden_rows, batches.rows.retain, device)
        return CachedReference(folder, weight_VH)
    reference_values = ds_json.for_reference(values, mode, trained.model.config.hidden_size)
    model = load_model(config, path, reference_values, device)
    return LiveReference(engine.ReferenceEngine(model, reference_values).hidden_rows, weight_VH)
