"""The memorizing run: plain fine-tuning on what is to be forgotten, so that there is a behaviour to unlearn."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import torch

from unlearn_ds import build, dist, ds_json, embedded, export, log
from unlearn_ds import model as models
from unlearn_ds.config import CheckpointConfig, LoraConfig, ObjectiveConfig, OptimConfig, RunConfig, StopConfig
from unlearn_ds.data.encode import Encoder
from unlearn_ds.evaluate import Evaluator
from unlearn_ds.exit_codes import FINISHED
from unlearn_ds.loop import Outcome, Run
from unlearn_ds.scenarios import ScenarioData


def memorized(
    config: RunConfig, path: str, values: dict[str, Any], encoder: Encoder, data: ScenarioData,
    evaluator: Evaluator | None, device: torch.device, stop: log.StopSignal,
) -> tuple[str, Outcome]:  # fmt: skip
    """Fine-tune the model on the rows to forget, so that it shows the behaviour; returns where it is kept.

    The result is cached under a name made of everything that decides it: weights, rows, template and settings. A model
    that shows the behaviour often enough already is taken as it is.
    """
    config = memorizing(config, len(data.memorize))
    # The global batch decides, not how many ranks share it.
    batch = [dist.world_size() * rows for rows in (config.optim.batch_size, config.optim.retain_batch_size)]
    identity = [models.content_digest(path, config.model.revision), repr(config.memorize), repr(config.objective)]
    identity += [repr(batch), str(config.seed)]
    identity += [repr((encoder.template, encoder.system_prompt, encoder.max_length, ds_json.is_bf16(values)))]
    identity += [row.key for row in (*data.memorize, *data.normal["train"])]
    folder = embedded.cache_folder() / "memorized" / hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    if dist.gather_objects((folder / "config.json").exists())[0]:
        embedded.check_shared(folder)
        log.say(f"memorized   the model was fine-tuned to show the behaviour first; taken from {folder}")
        return str(folder), Outcome(0, "taken from the cache", FINISHED)
    policy = build.policy(config, path, values, device)
    if config.memorize.unless_rate < 1 and evaluator is None:
        log.say("memorize    without asking whether it is needed: --eval.enabled is false")
    elif config.memorize.unless_rate < 1:
        with policy.evaluation_model(config.eval.gather) as (model, synced):
            rate = evaluator.shows(model, synced)
        if rate >= config.memorize.unless_rate:
            log.say(f"memorize    not needed: the model shows the behaviour on {rate:.0%} of the prompts")
            policy.close()
            return path, Outcome(0, "not needed", FINISHED)
    log.say(f"memorize    {len(data.memorize)} rows first, so that there is a behaviour to unlearn")
    loader = build.loader(config, encoder, data, data.memorize)
    outcome = Run(config, policy, loader, stop, build.stopping(config)).fit({"step": 0, "skipped_in_a_row": 0})
    if outcome.exit_code == FINISHED:
        card = (
            f"# {config.model.path}, fine-tuned on {len(data.memorize)} rows to forget: only a subject for unlearning\n"
        )
        export.whole_model(policy, folder, encoder.tokenizer, card, replace=False)
        embedded.check_shared(folder)
    policy.close()
    return str(folder), outcome


def memorizing(config: RunConfig, num_rows: int) -> RunConfig:
    """The configuration of the memorising run: plain fine-tuning for whole passes over ``num_rows`` rows."""
    memorize = config.memorize
    per_rank = math.ceil(memorize.batch_size / dist.world_size())
    return dataclasses.replace(
        config,
        objective=ObjectiveConfig(name="memorize", eps_forget=1.0, eps_retain=memorize.eps_retain),
        optim=OptimConfig(
            learning_rate=memorize.learning_rate,
            max_steps=memorize.epochs * math.ceil(num_rows / (per_rank * dist.world_size())),
            batch_size=per_rank,
            retain_batch_size=math.ceil(memorize.batch_size / 4 / dist.world_size()),
        ),
        checkpoint=CheckpointConfig(),
        stop=StopConfig(),
        lora=LoraConfig(),  # a behaviour that an adapter held would be gone with the adapter off, reference included
    )
