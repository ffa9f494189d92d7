"""How RLHF is run: every knob, and its words on the command line. No torch here."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from unlearn_ds.config import UsageError

PREFIX = "rlhf."


class Recipe(NamedTuple):
    """Learning rates are TRL's defaults, but for PPO's: 3e-6 is for models of some billions of parameters. One pass of
    each stage over its rows and one PPO epoch, as DeepSpeed-Chat's benchmark has it. batch: samples of a micro-batch on
    one device; accumulation: of them in a step. ask_every: updates of PPO between two looks at the rate."""

    batch: int = 8
    accumulation: int = 1
    sft_epochs: int = 1
    sft_learning_rate: float = 2e-5
    reward_epochs: int = 1
    reward_learning_rate: float = 1e-4
    ppo_passes: int = 1
    ppo_epochs: int = 1
    ppo_learning_rate: float = 1e-5
    kl_coefficient: float = 0.05
    ask_every: int = 5

    @property
    def samples_a_step(self) -> int:
        """Of all ranks together."""
        return self.batch * self.accumulation * int(os.environ.get("WORLD_SIZE", "1"))


def parse(flags: Mapping[str, Any], batch: int, accumulation: int = 1) -> Recipe:
    """The recipe that flags ``rlhf.NAME`` make; ``UsageError`` for a name or value that is none. batch, accumulation:
    where no flag says otherwise."""
    defaults = Recipe(batch=batch, accumulation=accumulation)._asdict()
    found = {}
    for flag, text in flags.items():
        name = flag.removeprefix(PREFIX)
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, cutoff=0) or list(defaults)
            raise UsageError(f"unknown flag --{flag}; did you mean {', '.join(f'--{PREFIX}{n}' for n in near)}?")
        kind = type(defaults[name])
        try:
            found[name] = kind(str(text))
        except ValueError:
            found[name] = 0
        if found[name] <= 0:
            whole = "whole " if kind is int else ""
            raise UsageError(f"--{flag} takes a {whole}number above 0; got '{text}'.")
    return Recipe(**{**defaults, **found})


def help_text() -> str:
    """One line a flag, with its default."""
    return "\n".join(f"  --{PREFIX}{name} [{value:g}]" for name, value in Recipe()._asdict().items())
