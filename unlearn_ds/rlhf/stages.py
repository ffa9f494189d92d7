"""The three stages of RLHF by TRL's trainers: supervised fine-tuning, a reward model, PPO.

Four models of one size, as OpenRLHF and safe-rlhf run it: policy, reference, reward model, critic; every device holds
all of them. TRL has its PPO in releases up to 1.12, which the extra ``rlhf`` asks for.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.trainer_callback import PrinterCallback

from unlearn_ds import dist
from unlearn_ds.config import UsageError
from unlearn_ds.rlhf.meter import Enough, Meter, Step
from unlearn_ds.rlhf.preferences import Rows, check_rows
from unlearn_ds.rlhf.recipe import Recipe
from unlearn_ds.rlhf.setting import Setting


class Stage(NamedTuple):
    """What a stage took. samples: of one step, all ranks together. model: where the trained model is kept."""

    name: str
    samples: int
    steps: Sequence[Step]
    model: Path


def sft(path: str, rows: Rows, recipe: Recipe, setting: Setting, steps: int = 0) -> Stage:
    """Fine-tune the model at ``path`` on demonstrations. steps: at most so many; 0: all epochs."""
    from trl import SFTConfig, SFTTrainer

    policy = _load(AutoModelForCausalLM, path, setting)
    arguments = SFTConfig(
        **setting.arguments(recipe, recipe.sft_learning_rate), num_train_epochs=recipe.sft_epochs,
        max_steps=steps or -1, max_length=None,
        loss_type="nll",  # its other one computes logits again in backward, out of sight of the meter
    )  # fmt: skip
    trainer = SFTTrainer(policy, arguments, train_dataset=_dataset(rows), processing_class=setting.tokenizer)
    num_steps = _num_steps(rows, recipe.sft_epochs, recipe, steps)
    return _trained("sft", trainer, [policy], num_steps, recipe, setting)


def reward_model(path: str, rows: Rows, recipe: Recipe, setting: Setting, steps: int = 0) -> Stage:
    """Train a reward model, from the model at ``path``, on pairs of answers; a sample is a pair."""
    from trl import RewardConfig, RewardTrainer

    reward = _scalar(path, setting)
    arguments = RewardConfig(
        **setting.arguments(recipe, recipe.reward_learning_rate), num_train_epochs=recipe.reward_epochs,
        max_steps=steps or -1, max_length=None,
    )  # fmt: skip
    trainer = RewardTrainer(reward, arguments, train_dataset=_dataset(rows), processing_class=setting.tokenizer)
    num_steps = _num_steps(rows, recipe.reward_epochs, recipe, steps)
    return _trained("reward model", trainer, [reward], num_steps, recipe, setting)


def ppo(
    path: str, reward_path: str, rows: Rows, recipe: Recipe, setting: Setting, steps: int = 0,
    enough: Callable[[Stage], bool] | None = None,
) -> Stage:  # fmt: skip
    """Train the model at ``path`` by PPO against the reward model; the critic begins as that. A sample is an answer.

    enough: asked after every ``recipe.ask_every`` updates, with the stage so far; True ends it. Raises ``UsageError``
    for fewer rows than an update takes.
    """
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    check_rows(rows, recipe)
    policy, reference = (_load(AutoModelForCausalLM, path, setting) for _ in range(2))
    reward, critic = (_scalar(reward_path, setting) for _ in range(2))
    if setting.checkpointing:
        for model in (policy, critic):  # PPO's trainer does not look at its own flag
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.config.use_cache = True  # for generation
    num_steps = _num_steps(rows, recipe.ppo_passes, recipe, steps)
    arguments = PPOConfig(
        **setting.arguments(recipe, recipe.ppo_learning_rate), kl_coef=recipe.kl_coefficient,
        total_episodes=num_steps * recipe.samples_a_step, num_ppo_epochs=recipe.ppo_epochs,
        response_length=setting.response_length, stop_token_id=setting.end_id, num_sample_generations=0,
    )  # fmt: skip
    trainer = PPOTrainer(
        arguments, setting.tokenizer, policy, reference, reward, _dataset(rows), critic, eval_dataset=_dataset(rows[:1])
    )
    trainer.accelerator.print = lambda *_: None
    # Nor does it hand its precision on.
    with torch.autocast(dist.device_type(), torch.bfloat16, enabled=setting.is_bf16):
        return _trained(
            "ppo", trainer, [policy, reference, reward, critic], num_steps, recipe, setting, enough
        )  # fmt: skip


def _trained(
    name: str, trainer: Any, watched: Sequence[PreTrainedModel], num_steps: int, recipe: Recipe, setting: Setting,
    enough: Callable[[Stage], bool] | None = None,
) -> Stage:  # fmt: skip
    """Run a trainer under a meter and keep its model, the first of those it runs."""
    folder = setting.folder / name.replace(" ", "_")

    def so_far() -> Stage:
        # Not saved by the trainer: PPO's takes policy and critic together, and fails where they are replicated.
        if dist.is_main():
            watched[0].save_pretrained(folder)
            setting.tokenizer.save_pretrained(folder)
        dist.barrier()
        if not (folder / "config.json").exists():
            raise UsageError(f"{folder} is not on this node: --output_dir must name a disk that all nodes share.")
        return Stage(name, recipe.samples_a_step, tuple(meter.steps), folder)

    def after_step(step: int) -> None:
        if enough is not None and step % recipe.ask_every == 0 and enough(so_far()):
            raise Enough

    meter = Meter(name, num_steps, setting.synchronize, after_step, setting.progress).watch(*watched)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(meter)
    with meter, contextlib.suppress(Enough), _quiet_datasets():
        trainer.train()
    found = so_far()
    # Models, optimizer and trainer refer to each other: four models more would stand beside them.
    trainer.accelerator.free_memory()
    gc.collect()
    return found


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    import datasets

    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _dataset(rows: Rows) -> Dataset:
    return Dataset.from_list([dict(row) for row in rows])


def _num_steps(rows: Rows, passes: int, recipe: Recipe, limit: int) -> int:
    return limit or passes * math.ceil(len(rows) / recipe.samples_a_step)


def _load(kind: Any, path: str, setting: Setting, **options: Any) -> PreTrainedModel:
    """A model with fp32 weights; a hub id of the revision that the run has."""
    revision = None if Path(path).is_dir() else setting.revision
    return kind.from_pretrained(path, revision=revision, dtype=torch.float32, **options)


def _scalar(path: str, setting: Setting) -> PreTrainedModel:
    """The model at ``path`` with a head that gives one number."""
    torch.manual_seed(setting.seed)  # a head that is new is random
    return _load(
        AutoModelForSequenceClassification, path, setting, num_labels=1, pad_token_id=setting.tokenizer.pad_token_id
    )
