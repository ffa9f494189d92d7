"""The optimizer that DeepSpeed is given."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips by global norm and leaves everything untouched when the norm is not finite.

    DeepSpeed's own optimizers do both, but with stage 0 in fp32 it calls ours directly.
    """

    clip_norm = 0.0
    overflow = False
    _global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        if not self.clip_norm:
            return super().step(closure)
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        self._global_grad_norm, self.overflow = norm, not math.isfinite(norm)
        if self.overflow:
            return None
        for gradient in gradients:
            gradient.mul_(min(1.0, self.clip_norm / (norm + 1e-6)))
        return super().step(closure)
