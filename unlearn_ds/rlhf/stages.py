"""The three stages of RLHF by TRL's trainers: supervised fine-tuning, a reward model, PPO.

Four models of one size, as OpenRLHF and safe-rlhf run it: policy, reference, reward model, critic; every device holds
all of them. TRL has its PPO in releases up to 1.12, which the extra ``rlhf`` asks for.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_callback import PrinterCallback

from unlearn_ds import dist, ds_json
from unlearn_ds.config import RunConfig, UsageError
from unlearn_ds.data.encode import Encoder
from unlearn_ds.rlhf.meter import Enough, Meter, Step
from unlearn_ds.rlhf.preferences import Rows, padded
from unlearn_ds.rlhf.recipe import Recipe


class Setting(NamedTuple):
    """What the stages share. is_bf16: autocast; weights stay in fp32. response_length: tokens that PPO generates.

    end_id: ends an answer. folder: where models are kept between stages.
    """

    tokenizer: PreTrainedTokenizerBase
    end_id: int
    folder: Path
    is_bf16: bool
    response_length: int
    seed: int
    synchronize: Callable[[], None]
    checkpointing: bool = False
    progress: bool = True

    def arguments(self, recipe: Recipe, learning_rate: float) -> dict[str, Any]:
        """What TRL's three configurations have in common."""
        return {
            "output_dir": str(self.folder / "trl"), "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "use_cpu": dist.device_type() == "cpu", "bf16": self.is_bf16, "seed": self.seed,
            "gradient_checkpointing": self.checkpointing, "per_device_train_batch_size": recipe.batch,
            "learning_rate": learning_rate, "ddp_find_unused_parameters": False,
        }  # fmt: skip


class Stage(NamedTuple):
    """What a stage took. samples: of one step, all ranks together. model: where the trained model is kept."""

    name: str
    samples: int
    steps: Sequence[Step]
    model: Path


def setting(config: RunConfig, encoder: Encoder, folder: Path, synchronize: Callable[[], None]) -> Setting:
    """The setting of a run's model, answers as long as its evaluation generates them. Changes the encoder's tokenizer
    (``preferences.padded``)."""
    return Setting(
        tokenizer=padded(encoder.tokenizer, encoder.end_id), end_id=encoder.end_id, folder=folder,
        is_bf16=ds_json.is_bf16(ds_json.load(config.engine.ds_config)), response_length=config.eval.max_new_tokens,
        seed=config.seed, synchronize=synchronize, checkpointing=config.model.activation_checkpointing,
        progress=config.log.progress,
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


def sft(
    path: str, rows: Rows, recipe: Recipe, setting: Setting, steps: int = 0
) -> Stage:  # fmt: skip
    """Fine-tune the model at ``path`` on demonstrations. steps: at most so many; 0: all epochs."""
    from trl import SFTConfig, SFTTrainer

    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    arguments = SFTConfig(
        **setting.arguments(recipe, recipe.sft_learning_rate),
        num_train_epochs=recipe.sft_epochs,
        max_steps=steps or -1,
        loss_type="nll",  # its other one computes logits again in backward, out of sight of the meter
    )
    trainer = SFTTrainer(policy, arguments, train_dataset=_dataset(rows), processing_class=setting.tokenizer)
    return _trained("sft", trainer, [policy], _num_steps(rows, recipe.sft_epochs, recipe, steps), setting)


def reward_model(
    path: str, rows: Rows, recipe: Recipe, setting: Setting, steps: int = 0
) -> Stage:  # fmt: skip
    """Train a reward model, from the model at ``path``, on pairs of answers; a sample is a pair."""
    from trl import RewardConfig, RewardTrainer

    reward = _scalar(path, setting)
    arguments = RewardConfig(
        **setting.arguments(recipe, recipe.reward_learning_rate), num_train_epochs=recipe.reward_epochs,
        max_steps=steps or -1, max_length=None,
    )  # fmt: skip
    trainer = RewardTrainer(reward, arguments, train_dataset=_dataset(rows), processing_class=setting.tokenizer)
    num_steps = _num_steps(rows, recipe.reward_epochs, recipe, steps)
    return _trained("reward model", trainer, [reward], num_steps, setting)


def ppo(
    path: str, reward_path: str, rows: Rows, recipe: Recipe, setting: Setting, steps: int = 0,
    enough: Callable[[Stage], bool] | None = None,
) -> Stage:  # fmt: skip
    """Train the model at ``path`` by PPO against the reward model; the critic begins as that. A sample is an answer.

    enough: asked after every ``recipe.ask_every`` updates, with the stage so far; True ends it.
    """
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
    reward, critic = (_scalar(reward_path, setting) for _ in range(2))
    batch = recipe.batch * dist.world_size()
    if len(rows) < batch:
        raise UsageError(f"PPO takes {batch} prompts at a time and there are {len(rows)}: take a smaller --batch_size.")
    num_steps = _num_steps(rows, recipe.ppo_passes, recipe, steps)
    arguments = PPOConfig(
        **setting.arguments(recipe, recipe.ppo_learning_rate), kl_coef=recipe.kl_coefficient,
        total_episodes=num_steps * batch, num_ppo_epochs=recipe.ppo_epochs,
        response_length=setting.response_length, stop_token_id=setting.end_id, num_sample_generations=0,
    )  # fmt: skip
    trainer = PPOTrainer(
        arguments, setting.tokenizer, policy, reference, reward, _dataset(rows), critic, eval_dataset=_dataset(rows[:1])
    )
    trainer.accelerator.print = lambda *_: None
    return _trained("ppo", trainer, [policy, reference, reward, critic], num_steps, setting, recipe.ask_every, enough)


def _trained(
    name: str, trainer: Any, watched: Sequence[PreTrainedModel], num_steps: int, setting: Setting,
    every: int = 0, enough: Callable[[Stage], bool] | None = None,
) -> Stage:  # fmt: skip
    """Run a trainer under a meter and keep its model, the first of those it runs."""
    folder = setting.folder / name.replace(" ", "_")
    samples = trainer.args.per_device_train_batch_size * dist.world_size()

    def so_far() -> Stage:
        # Not saved by the trainer: PPO's takes policy and critic together, and fails where they are replicated.
        if dist.is_main():
            watched[0].save_pretrained(folder)
            setting.tokenizer.save_pretrained(folder)
        dist.barrier()
        return Stage(name, samples, tuple(meter.steps), folder)

    def after_step(step: int) -> None:
        if enough is not None and step % every == 0 and enough(so_far()):
            raise Enough

    meter = Meter(name, num_steps, setting.synchronize, after_step, setting.progress).watch(*watched)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(meter)
    with meter, contextlib.suppress(Enough):
        trainer.train()
    return so_far()


def _dataset(rows: Rows) -> Dataset:
    return Dataset.from_list([dict(row) for row in rows])


def _num_steps(rows: Rows, passes: int, recipe: Recipe, limit: int) -> int:
    return limit or passes * math.ceil(len(rows) / (recipe.batch * dist.world_size()))


def _scalar(path: str, setting: Setting) -> PreTrainedModel:
    """The model at ``path`` with a head that gives one number."""
    torch.manual_seed(setting.seed)  # a head that is new is random
    return AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=torch.float32, pad_token_id=setting.tokenizer.pad_token_id
    )
