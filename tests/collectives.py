"""Count what ranks send: torch's collectives, wrapped before DeepSpeed takes hold of them."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch.distributed as torch_dist

WHOLE = {
    "all_gather_into_tensor": 0, "all_gather": 0, "reduce_scatter_tensor": 1, "all_reduce": 0, "reduce": 0,
    "broadcast": 0,
}  # fmt: skip
"""Collective -> which argument holds the whole tensor, so that sizes do not depend on the number of ranks."""


class Counter:
    """Bytes of whole tensors and calls by collective and size of its group, since the last ``reset``."""

    def __init__(self) -> None:
        self.found: dict[str, list[int]] = {}
        for name, position in WHOLE.items():
            setattr(torch_dist, name, self._wrapped(getattr(torch_dist, name), name, position))
        self.reset()

    def reset(self) -> None:
        self.found = defaultdict(lambda: [0, 0])

    def taken(self) -> dict[str, tuple[int, int]]:
        """What was counted so far, untouched by what follows."""
        return {name: (num_bytes, calls) for name, (num_bytes, calls) in self.found.items()}

    def _wrapped(self, function: Callable[..., Any], name: str, position: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            whole = args[position] if len(args) > position else next(iter(kwargs.values()))
            tensors = whole if isinstance(whole, (list, tuple)) else [whole]
            total = self.found[f"{name}@{torch_dist.get_world_size(kwargs.get('group'))}"]
            total[0] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            total[1] += 1
            return function(*args, **kwargs)

        return counted
