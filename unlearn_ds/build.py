"""Build the parts of a run from its configuration: model, engine, loader, reference."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unlearn_ds import attention, dist, ds_json, embedded, engine, log, lora, ops, workspace
from unlearn_ds import model as models
from unlearn_ds.config import RunConfig
from unlearn_ds.data.encode import Encoder
from unlearn_ds.data.loader import Layout, Loader, TrainingRows
from unlearn_ds.reference import AdapterReference, CachedReference, LiveReference, build_cache
from unlearn_ds.registry import OBJECTIVES, REFERENCES, resolve
from unlearn_ds.scenarios import ScenarioData
from unlearn_ds.stopping import Stopping
from unlearn_ds.types import Row

Reference = LiveReference | CachedReference | AdapterReference


def dtype_of(values: dict[str, Any]) -> torch.dtype:
    """Compute precision of a DeepSpeed configuration."""
    return torch.bfloat16 if ds_json.is_bf16(values) else torch.float32


def encoder(config: RunConfig, path: str) -> Encoder:
    """Tokenizer and template of a run whose model lies at ``path``."""
    tokenizer = models.load_tokenizer(path, config.model.revision)
    return Encoder(tokenizer, config.data.template, config.data.system_prompt, config.data.max_length)


def resolve_attention(config: RunConfig, path: str, values: dict[str, Any], device: torch.device) -> tuple[str, str]:
    """The attention of a run and why; ``UsageError`` when the one asked for cannot work here or for this model."""
    options = models.load_config(path, config.model.revision).get_text_config().to_dict()
    softcap = options.get("attn_logit_softcapping") is not None
    return attention.resolve(config.model.attention, device, dtype_of(values), softcap)


def load_model(
    config: RunConfig, path: str, values: dict[str, Any], device: torch.device, attention_name: str
) -> models.PackedCausalLM:
    """Load a model, sharded where the configuration says so, and wrap it for packed batches."""
    with engine.sharded_loading(values):
        causal_lm = models.load_causal_lm(path, dtype_of(values), config.model.revision)
    model = models.PackedCausalLM(causal_lm, attention_name, loss_options(config, values, device))
    return model if ds_json.stage(values) == 3 else model.to(device)


def loss_options(config: RunConfig, values: dict[str, Any], device: torch.device) -> ops.LossOptions:
    """How losses are computed; ``UsageError`` when the kernel asked for cannot work here."""
    kernel, _ = ops.resolve_kernel(config.engine.loss_kernel, device)
    limit = workspace.num_bytes(config.engine.loss_workspace_mib, device.type, ds_json.is_bf16(values))
    return ops.LossOptions(workspace_bytes=limit, kernel=kernel)


def policy(config: RunConfig, path: str, values: dict[str, Any], device: torch.device) -> engine.Policy:
    """The trained model on its engine."""
    folder = _disk(config, "policy-") if ds_json.uses_disk(values) else None
    values = ds_json.for_machine(values, dist.local_world_size(), folder.name if folder else None)
    name, reason = resolve_attention(config, path, values, device)
    log.say(
        f"engine      ZeRO-{ds_json.stage(values)} on {dist.world_size()} x {device.type}, "
        f"{str(dtype_of(values)).removeprefix('torch.')}; attention: {name} ({reason})"
    )
    kernel, reason = ops.resolve_kernel(config.engine.loss_kernel, device)
    log.say(f"loss        {kernel} rows ({reason})")
    model = load_model(config, path, values, device, name)
    if config.lora.rank:
        lora.add(model.causal_lm, config.lora, config.seed)
        trained = sum(p.numel() for n, p in model.named_parameters() if lora.is_adapter(n))
        log.say(
            f"lora        rank {config.lora.rank}, alpha {config.lora.alpha:g}, {len(lora.layers(model))} modules, "
            f"{trained:,} parameters trained"
        )
    if config.model.activation_checkpointing:
        model.enable_activation_checkpointing()
    return engine.Policy(model, values, config.optim, folder)


def _disk(config: RunConfig, prefix: str) -> tempfile.TemporaryDirectory[str]:
    """A folder of this rank's own: DeepSpeed empties the one it is given, whatever another run has there."""
    return tempfile.TemporaryDirectory(prefix=prefix, dir=Path(config.engine.nvme_path or "").expanduser())


def stopping(config: RunConfig) -> Stopping:
    """The stop rules of a run; ``UsageError`` when one looks at a term that the objective does not have."""
    terms = resolve("objective", config.objective.name, OBJECTIVES)(config.objective)
    return Stopping(config, {term.name: term.loss for term in terms}, log.say)


def loader(config: RunConfig, encoder: Encoder, data: ScenarioData, forget: Sequence[Row]) -> Loader:
    """Batches of a run that forgets, or memorises, the rows ``forget``."""
    objective = config.objective
    # An unrelated answer goes where a forget answer goes, so it is encoded as those are.
    answer_ids = encoder.continuation_ids if forget and forget[0].continues else encoder.answer_ids
    rows = TrainingRows(
        encoder.encode_all(forget),
        [answer_ids(answer) for answer in data.mismatch_answers],
        encoder.encode_all(data.normal["train"]),
    )
    layout = Layout(
        dist.rank(), dist.world_size(), config.optim.gradient_accumulation_steps,
        config.optim.batch_size, config.optim.retain_batch_size,
    )  # fmt: skip
    terms = resolve("objective", objective.name, OBJECTIVES)(objective)
    return Loader(
        rows, terms, layout, seed=config.seed, num_mismatch=objective.num_mismatch, reduction=objective.reduction,
        max_length=config.data.max_length, share_prompts=config.model.share_prompts,
    )  # fmt: skip


def reference(
    config: RunConfig, path: str, values: dict[str, Any], trained: engine.Policy, batches: Loader
) -> Reference | None:
    """The frozen reference of the KL term, made before the first step; None when the objective has no KL term."""
    if not any(term.loss == "kl" for term in batches.terms):
        return None
    log.say(f"reference   {config.engine.reference}")
    return resolve("reference", config.engine.reference, REFERENCES)(config, path, values, trained, batches)


def check_offload(config: RunConfig, values: dict[str, Any]) -> None:
    """Raise ``UsageError`` when the machine lacks what offloaded states need; called before any model is loaded."""
    if config.engine.reference == "nvme" or ds_json.uses_disk(values):
        log.say("nvme        loading DeepSpeed's async_io; building it, the first time, takes minutes")
        engine.check_async_io()


def live_reference(
    config: RunConfig, path: str, values: dict[str, Any], trained: engine.Policy, _: Loader
) -> LiveReference:
    """A second model on an engine of its own, its weights in host memory, on disk or on the device."""
    policy_model, mode, folder, largest = trained.model, config.engine.reference, None, 0
    if mode == "nvme":
        folder = _disk(config, "reference-")
        largest = math.ceil(models.largest_weight(policy_model.config) / dist.world_size())
    reference_values = ds_json.for_reference(
        values, mode, policy_model.config.hidden_size, folder.name if folder else None, largest
    )
    model = load_model(config, path, reference_values, policy_model.device, policy_model.attention_name)
    return LiveReference(engine.ReferenceEngine(model, reference_values, folder).hidden_rows, _head(trained))


def adapter_reference(
    config: RunConfig, path: str, values: dict[str, Any], trained: engine.Policy, _: Loader
) -> AdapterReference:
    """The policy with its adapters off."""
    return AdapterReference()


def cached_reference(
    config: RunConfig, path: str, values: dict[str, Any], trained: engine.Policy, batches: Loader
) -> CachedReference:
    """Hidden states on disk, computed by the policy, which is the reference before its first step."""
    device = trained.model.device
    made_by = f"{str(dtype_of(values)).removeprefix('torch.')}-{trained.model.attention_name}-{device.type}"
    folder = embedded.cache_folder() / "reference" / f"{trained.weights_digest()}-{made_by}"
    build_cache(folder, trained.hidden_rows, batches.rows.retain, device)
    return CachedReference(folder, _head(trained))


def _head(trained: engine.Policy) -> torch.Tensor | None:
    """The LM head of the reference, whole: a copy of the policy's before its first step, or None for a frozen head."""
    weight = trained.model.causal_lm.get_output_embeddings().weight
    return trained.full_weight(weight) if weight.requires_grad else None
