"""What the stages of RLHF share, and whether they can run at all: asked before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from unlearn_ds import build, dist, ds_json, embedded
from unlearn_ds import model as models
from unlearn_ds.config import RunConfig, UsageError
from unlearn_ds.data.encode import Encoder
from unlearn_ds.registry import SCENARIOS, resolve
from unlearn_ds.rlhf.preferences import Preferences, check_rows, padded, preferences
from unlearn_ds.rlhf.recipe import Recipe
from unlearn_ds.scenarios import ScenarioData

BYTES_PER_PARAMETER = 40
"""On every device: weights, gradient and two moments of policy and critic, weights of reference and reward, in fp32."""


class Setting(NamedTuple):
    """tokenizer: pads with a token that stands in no row. end_id: ends an answer. folder: where models are kept between
    stages. is_bf16: autocast; weights stay in fp32. response_length: tokens that PPO generates. synchronize: waits for
    the device. checkpointing: of activations. progress: a bar a stage. revision: of a model from the hub."""

    tokenizer: PreTrainedTokenizerBase
    end_id: int
    folder: Path
    is_bf16: bool
    response_length: int
    seed: int
    synchronize: Callable[[], None]
    checkpointing: bool = False
    progress: bool = True
    revision: str | None = None

    def arguments(self, recipe: Recipe, learning_rate: float) -> dict[str, Any]:
        """What TRL's three configurations have in common."""
        return {
            "output_dir": str(self.folder / "trl"), "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "use_cpu": dist.device_type() == "cpu", "bf16": self.is_bf16, "seed": self.seed,
            "gradient_checkpointing": self.checkpointing, "per_device_train_batch_size": recipe.batch,
            "gradient_accumulation_steps": recipe.accumulation, "learning_rate": learning_rate,
            "ddp_find_unused_parameters": False,
        }  # fmt: skip


class Ready(NamedTuple):
    """Where the model of a run lies, and its rows, read: all that RLHF needs beside a recipe."""

    path: str
    encoder: Encoder
    data: ScenarioData
    learned: Preferences


def ready(config: RunConfig, recipe: Recipe) -> Ready:
    """Read what RLHF learns from. Raises ``UsageError`` for whatever would keep one of its stages from running, so ask
    before anything is trained, and once the ranks have met."""
    check_installed()
    path = embedded.locate(config.model.path)
    check_model(path, config.model.revision)
    encoder = build.encoder(config, path)
    data = resolve("scenario", config.scenario, SCENARIOS).load(config, encoder)
    learned = preferences(data, encoder)
    check_rows(learned.prompts, recipe)
    padded(build.encoder(config, path).tokenizer, encoder.end_id, learned)
    return Ready(path, encoder, data, learned)


def setting(
    config: RunConfig, path: str, learned: Preferences, folder: Path, synchronize: Callable[[], None]
) -> Setting:
    """The setting of a run whose model lies at ``path``, answers as long as its evaluation generates them."""
    encoder = build.encoder(config, path)  # one of its own: RLHF pads in another way
    return Setting(
        tokenizer=padded(encoder.tokenizer, encoder.end_id, learned), end_id=encoder.end_id, folder=folder,
        is_bf16=ds_json.is_bf16(ds_json.load(config.engine.ds_config)), response_length=config.eval.max_new_tokens,
        seed=config.seed, synchronize=synchronize, checkpointing=config.model.activation_checkpointing,
        progress=config.log.progress, revision=config.model.revision,
    )  # fmt: skip


def check_installed() -> None:
    """Raise ``UsageError`` unless TRL is there with all three trainers."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        import trl
        import trl.experimental.ppo  # noqa: F401 - gone from TRL 1.13 on
    except ImportError as error:
        raise UsageError(
            f'RLHF needs TRL with its PPO trainer ({error}); install it: pip install "unlearn_ds[rlhf]".'
        ) from error


def check_model(path: str, revision: str | None) -> None:
    """Raise ``UsageError`` for an architecture without a reward model, and for models too large for a device."""
    architecture = models.load_config(path, revision)
    if type(architecture) not in AutoModelForSequenceClassification._model_mapping:
        raise UsageError(f"RLHF: transformers has no reward model (sequence classifier) of {architecture.model_type}.")
    needed = BYTES_PER_PARAMETER * models.size(architecture).total
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        if needed > there:
            raise UsageError(
                f"RLHF by TRL holds four models whole on every device, {needed / 2**30:.0f} GiB and activations, and "
                f"this one has {there / 2**30:.0f} GiB: compare a smaller model, or see --table."
            )
