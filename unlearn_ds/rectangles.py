"""Sequences of a packed stream side by side, those of about one length in one rectangle: attention on CPUs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from unlearn_ds.types import SharedPrompts

NUM_SEQUENCES = 8
"""Of a rectangle: fewer would be filled up less, and cost more calls."""


class Rectangles(NamedTuple):
    """P counts places in all rectangles, one after another.

    source_P: token of the stream at each place; beyond the end of a sequence its last one, which no token of it sees.
    home_T: for each token of the stream one of its places. shapes: (sequences, length) of each rectangle.
    """

    source_P: torch.Tensor
    home_T: torch.Tensor
    shapes: list[tuple[int, int]]


def grouped(lengths: Sequence[int]) -> list[list[int]]:
    """The sequences of each rectangle, by index."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + NUM_SEQUENCES] for start in range(0, len(order), NUM_SEQUENCES)]


def shapes(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(sequences, length) of each rectangle that sequences of these lengths fill."""
    return [(len(group), max(lengths[s] for s in group)) for group in grouped(lengths)]


@functools.lru_cache(maxsize=4)
def lay(cu_seqlens: torch.Tensor, shared: SharedPrompts | None) -> Rectangles:
    """The rectangles of a stream, made once for all layers; tensors are keyed by identity."""
    starts = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
    sizes, source, place = shapes(lengths), [], [0] * starts[-1]
    for group, (_, longest) in zip(grouped(lengths), sizes, strict=True):
        for s in group:
            tokens = range(starts[s], starts[s] + lengths[s])
            place[tokens.start : tokens.stop] = range(len(source), len(source) + len(tokens))
            source += [*tokens, *[tokens.stop - 1] * (longest - len(tokens))]
    source_P, home_U = torch.tensor(source, dtype=torch.long), torch.tensor(place, dtype=torch.long)
    if shared is None:
        return Rectangles(source_P, home_U, sizes)
    return Rectangles(shared.stream_U[source_P], home_U[shared.home_T], sizes)
