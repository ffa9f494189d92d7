"""Which weights ZeRO-3 gathers in a micro-batch: DeepSpeed's coordinator, followed module by module."""

from __future__ import annotations

import functools
from typing import NamedTuple

from unlearn_ds.cost.setup import Setup
from unlearn_ds.cost.shapes import Shape


class Use(NamedTuple):
    """A weight needed by a module: its number among the model's weights, and its elements."""

    weight: int
    numel: int


HOLDER = Use(-1, 0)
"""A module without weights of its own."""


class Gathers(NamedTuple):
    """Elements that forward and backward of a micro-batch gather under ZeRO-3, collectives of each, and the most
    elements that are there at a time."""

    forward: int
    backward: int
    calls: tuple[int, int]
    most: int


def gathers(shape: Shape, setup: Setup) -> Gathers:
    """What a micro-batch gathers with a complete trace."""
    return _followed(shape, setup.checkpointing, setup.persistence, setup.prefetch, setup.max_live, setup.max_reuse)


@functools.lru_cache(maxsize=256)
def _followed(
    shape: Shape, checkpointing: bool, persistence: int, prefetch: int, max_live: int, max_reuse: int
) -> Gathers:
    """Gathers of a micro-batch, as DeepSpeed's coordinator of partitioned parameters makes them.

    Before a module its weight is gathered, then those of modules to come up to ``prefetch`` elements; after it the
    weight is let go, unless it is used again before ``max_reuse`` elements of later modules have gone by, or the
    prefetcher has passed over a later use because it was still there. Small weights are always there.
    """
    forward = _forward(shape)
    uses, turn = forward + _backward(shape, checkpointing), len(forward)
    small = {use.weight for use in uses if use.numel < persistence} | {HOLDER.weight}
    there = set(small)
    live = 0
    passed: dict[int, int] = {}
    gathered, calls, ahead, most_live = [0, 0], [0, 0], 0, 0
    for step, use in enumerate(uses):
        numel = 0 if use.weight in there else use.numel
        calls[step >= turn] += numel > 0
        ahead = max(ahead, step + 1)
        there.add(use.weight)
        fetched, most = 0, min(prefetch, max_live - live - numel)
        while ahead < len(uses) and fetched < most:
            later = uses[ahead]
            passed[later.weight] = ahead
            ahead += 1
            if later.weight not in there:
                there.add(later.weight)
                fetched += later.numel
        gathered[step >= turn] += numel + fetched
        live += numel + fetched
        most_live = max(most_live, live)
        calls[step >= turn] += fetched > 0
        kept = use.weight in small or passed.get(use.weight, -1) > step + 1 or _reused(uses, step, max_reuse)
        if not kept:
            there.discard(use.weight)
            live -= use.numel
    return Gathers(*gathered, tuple(calls), most_live)


def _reused(uses: list[Use], position: int, max_reuse: int) -> bool:
    traversed = 0
    for later in uses[position + 1 :]:
        if traversed >= max_reuse:
            return False
        if later.weight == uses[position].weight:
            return True
        traversed += later.numel
    return False


def _forward(shape: Shape) -> list[Use]:
    """Modules of a forward in order: wrapper and decoder hold the others, the LM head comes last."""
    outer = [Use(number, numel) for number, numel in enumerate(shape.outer)]
    layers = [use for layer in range(shape.num_layers) for use in _layer(shape, layer)]
    return [HOLDER, HOLDER, *outer[: _embeddings(shape)], HOLDER, *layers, *_after_layers(shape, outer)]


def _embeddings(shape: Shape) -> int:
    """Embeddings before the first layer: of tokens, and where there are two norms' weights and biases of positions."""
    return 1 if shape.gated else 2


def _after_layers(shape: Shape, outer: list[Use]) -> list[Use]:
    return outer[_embeddings(shape) :] + (outer[:1] if shape.tied else [])


def _layer(shape: Shape, layer: int) -> list[Use]:
    """Modules of a layer in order; those that only hold others count, because DeepSpeed prefetches before each."""
    first = len(shape.outer) + layer * len(shape.layer)
    weights = [Use(first + number, numel) for number, numel in enumerate(shape.layer)]
    if not shape.gated:
        return [HOLDER, *weights]
    # input norm, attention (4), second norm, MLP: gate, activation, up, down
    return [HOLDER, weights[0], HOLDER, *weights[1:6], HOLDER, weights[6], HOLDER, *weights[7:]]


def _backward(shape: Shape, checkpointing: bool) -> list[Use]:
    """Uses of the backward pass, last module first. With checkpointing a layer runs forward once more as soon as its
    last product asks for what it has kept, so after the hooks of that product."""
    outer, layers = [Use(number, numel) for number, numel in enumerate(shape.outer)], []
    for layer in reversed(range(shape.num_layers)):
        uses, begun = _backward_of_layer(shape, layer), 3 if shape.gated else 2
        layers += uses[:begun] + (_layer(shape, layer) if checkpointing else []) + uses[begun:]
    *norms, head = _after_layers(shape, outer)
    return [HOLDER, head, HOLDER, *norms[::-1], *layers, *outer[: _embeddings(shape)][::-1]]


def _backward_of_layer(shape: Shape, layer: int) -> list[Use]:
    """Hooks of modules that hold others come before those of what they hold, as in a forward."""
    first, *uses = _layer(shape, layer)
    if not shape.gated:
        return [first, *uses[::-1]]
    norm, attention, *matrices = uses
    inside, (second, mlp, gate, activation, up, down) = matrices[:4], matrices[4:]
    return [first, mlp, down, up, activation, gate, second, attention, *inside[::-1], norm]
