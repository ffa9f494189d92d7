"""Seconds and FLOPs of a trainer that is not ours, seen through hooks of the models that it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from unlearn_ds import dist, log


class Step(NamedTuple):
    """One optimizer step, or one update of PPO with all that belongs to it; of all ranks together."""

    seconds: float
    flops: float


class Enough(Exception):
    """Raised inside a trainer that has no other way to be ended (PPO's loop asks nobody)."""


class Meter(TrainerCallback):
    """Counts products with weights: 2 FLOPs an element and token forward, and 2 for each gradient that backward makes.

    Attention scores, norms and optimizers are left out, as in ``cost.rlhf``. Layers that activation checkpointing runs
    again count again. after_step: called with the number of the step; what it does costs nothing here.
    """

    def __init__(
        self, label: str, total: int, synchronize: Callable[[], None],
        after_step: Callable[[int], None], progress: bool = True,
    ):  # fmt: skip
        self.steps: list[Step] = []
        self._label, self._total, self._progress, self._after_step = label, total, progress, after_step
        self._synchronize, self._flops = synchronize, 0.0
        self._handles: list[Any] = []

    def watch(self, *models: nn.Module) -> Meter:
        """Count the products of these models from now on."""
        for model in models:
            for module in model.modules():
                if isinstance(module, (nn.Linear, Conv1D)):
                    self._handles.append(module.register_forward_hook(self._count))
        return self

    def _count(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        x = inputs[0]
        # Under ZeRO-3 a weight is whole only around its module's forward, which is here.
        forward = 2.0 * module.weight.numel() * (x.numel() // x.shape[-1])
        # Within backward this is a layer that is run again: its gradients were counted the first time.
        is_backward = torch._C._current_graph_task_id() != -1
        gradients = 0 if is_backward or not torch.is_grad_enabled() else x.requires_grad + module.weight.requires_grad
        self._flops += forward * (1 + gradients)

    def __enter__(self) -> Meter:
        self._bar = log.Progress(self._total, 0, self._label, self._progress)
        self._bar.__enter__()
        self._begin()
        return self

    def _begin(self) -> None:
        self._synchronize()
        self._flops, self._mark = 0.0, time.perf_counter()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the first step: what the trainer sets up before it costs nothing; called by the trainer."""
        self._begin()

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._bar.__exit__()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Close a step; called by the trainer."""
        self._synchronize()
        seconds = time.perf_counter() - self._mark
        found = dist.gather_objects((seconds, self._flops))
        self.steps.append(Step(max(s for s, _ in found), sum(f for _, f in found)))
        self._bar.update({}, self._total)
        self._after_step(len(self.steps))
        self._begin()
