"""Which rows make up step n: a pure function of (seed, step), the same for every number of ranks and micro-batches.

Nothing is carried from step to step, so the data cursor of a resumed run is its step number.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unlearn_ds.config import UsageError
from unlearn_ds.data.packing import Placed, pack
from unlearn_ds.types import EncodedRow, PackedBatch, Row, Term

_FORGET, _RETAIN, _MISMATCH = 1, 2, 3


@dataclass(frozen=True)
class TrainingRows:
    """What a run trains on: forget rows, mismatch answers (ids ending in the end token), retain rows."""

    forget: Sequence[EncodedRow]
    mismatch_answers: Sequence[tuple[int, ...]]
    retain: Sequence[EncodedRow]


@dataclass(frozen=True)
class Layout:
    """How the global batch of a step is cut: ``world_size * num_micro_batches`` equal parts."""

    rank: int = 0
    world_size: int = 1
    num_micro_batches: int = 1
    forget_per_micro_batch: int = 8
    retain_per_micro_batch: int = 8

    @property
    def num_parts(self) -> int:
        return self.world_size * self.num_micro_batches


class Loader:
    """Batches of a run.

    Args:
        rows: encoded training rows. terms: the objective. layout: ranks and sizes. seed: of order and mismatch draws.
        num_mismatch: K answers for each forget prompt. reduction: "sequence" or "token". max_length: tokens of a row.
        share_prompts: whether the answers to a prompt follow one copy of it.
    """

    def __init__(
        self,
        rows: TrainingRows,
        terms: Sequence[Term],
        layout: Layout,
        *,
        seed: int = 0,
        num_mismatch: int = 1,
        reduction: str = "sequence",
        max_length: int = 512,
        share_prompts: bool = False,
    ):
        self.rows, self.terms, self.layout, self.seed = rows, tuple(terms), layout, seed
        self.num_mismatch, self.reduction, self.max_length = num_mismatch, reduction, max_length
        self.share_prompts = share_prompts
        self._index = {term.rows: index for index, term in enumerate(self.terms)}
        needed = {
            *self._index,
            *(["forget"] if "mismatch" in self._index else []),
        }  # mismatch answers follow its prompts
        for kind, there in (("forget", rows.forget), ("mismatch", rows.mismatch_answers), ("retain", rows.retain)):
            if kind in needed and not there:
                raise UsageError(f"the objective needs {kind} rows and there are none")

    def micro_batches(self, step: int) -> list[PackedBatch]:
        """The micro-batches of this rank in step ``step`` (0-based)."""
        units = self.global_batch(step)
        divisors = self.normalizers(units)
        weights = [term.weight * self.layout.world_size for term in self.terms]  # DeepSpeed averages over ranks
        batches = []
        for part in range(self.layout.rank, self.layout.num_parts, self.layout.world_size):
            placed = []
            for term, row in (item for unit in units[part] for item in unit):
                divisor = divisors[term] * (len(row.answer_ids) if self.reduction == "sequence" else 1)
                placed.append(Placed(row, term, weights[term] / divisor))
            batches.append(pack(placed, self.terms, self.share_prompts))
        return batches

    def normalizers(self, parts: list[list[list[tuple[int, EncodedRow]]]]) -> list[float]:
        """What each term is divided by: its sequences, or its response tokens, in the whole global batch."""
        divisors = [0.0] * len(self.terms)
        for term, row in (item for part in parts for unit in part for item in unit):
            divisors[term] += 1 if self.reduction == "sequence" else len(row.answer_ids)
        return divisors

    def global_batch(self, step: int) -> list[list[list[tuple[int, EncodedRow]]]]:
        """Parts of the global batch; a part is a list of units, a unit rows that share a prompt: (term, row)."""
        layout = self.layout
        prompts, retain = [], []
        if {"forget", "mismatch"} & self._index.keys():
            drawn = self._draw(_FORGET, len(self.rows.forget), step, layout.forget_per_micro_batch * layout.num_parts)
            picks = self._mismatch_picks(step, len(drawn))
            prompts = [self._unit(self.rows.forget[i], picks[n]) for n, i in enumerate(drawn)]
        if "retain" in self._index:
            drawn = self._draw(_RETAIN, len(self.rows.retain), step, layout.retain_per_micro_batch * layout.num_parts)
            retain = [[(self._index["retain"], self.rows.retain[i])] for i in drawn]
        return [
            a + b for a, b in zip(_deal(prompts, layout.num_parts), _deal(retain, layout.num_parts)[::-1], strict=True)
        ]

    def _unit(self, forget: EncodedRow, picks: Sequence[int]) -> list[tuple[int, EncodedRow]]:
        unit = [(self._index["forget"], forget)] if "forget" in self._index else []
        room = max(1, self.max_length - len(forget.prompt_ids))
        for pick in picks:
            answer = self.rows.mismatch_answers[pick][:room]
            unit.append((self._index["mismatch"], EncodedRow(forget.prompt_ids, answer)))
        return unit

    def _mismatch_picks(self, step: int, count: int) -> Sequence[Sequence[int]]:
        if "mismatch" not in self._index:
            return [()] * count
        generator = np.random.default_rng([self.seed, _MISMATCH, step])
        pool = len(self.rows.mismatch_answers)
        # Without repetition within a prompt, unless the pool is too small (one fixed text).
        return [generator.choice(pool, self.num_mismatch, replace=pool < self.num_mismatch) for _ in range(count)]

    def _draw(self, stream: int, size: int, step: int, count: int) -> list[int]:
        """Rows of this step from an endless stream of seeded permutations: every row once before any row twice."""
        positions = range(step * count, (step + 1) * count)
        return [int(self._permutation(stream, size, p // size)[p % size]) for p in positions]

    @functools.lru_cache(maxsize=8)  # noqa: B019 - a loader lives as long as its run
    def _permutation(self, stream: int, size: int, epoch: int) -> np.ndarray:
        return _permutation(self.seed, stream, size, epoch)


def first_pass(forget: Sequence[Row], seed: int) -> list[Row]:
    """Rows to forget in the order in which a run first trains on them: a short run never comes to the last."""
    return [forget[i] for i in _permutation(seed, _FORGET, len(forget), epoch=0)]


def _permutation(seed: int, stream: int, size: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, epoch]).permutation(size)


def _deal(units: list, num_parts: int) -> list[list]:
    """Deal units to parts of equal count and nearly equal tokens: longest first, there and back again."""
    order = sorted(range(len(units)), key=lambda i: (-sum(len(row) for _, row in units[i]), i))
    parts: list[list] = [[] for _ in range(num_parts)]
    for n, i in enumerate(order):
        there, back = divmod(n, num_parts)
        parts[back if there % 2 == 0 else num_parts - 1 - back].append(units[i])
    return parts
