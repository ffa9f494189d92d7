"""The frozen reference of the KL term, never a deep copy of the policy: live on an engine, or cached on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from unlearn_ds import dist
from unlearn_ds.config import UsageError
from unlearn_ds.data.packing import Placed, kl_part, pack
from unlearn_ds.types import EncodedRow, PackedBatch, ReferenceRows, Term

HiddenRows = Callable[[PackedBatch], torch.Tensor]
"""A model as the reference sees it: packed batch -> final hidden states at its response rows, [N, H]."""


class LiveReference:
    """A second model (``offload``, ``nvme`` or ``resident``) that runs on the retain rows of each micro-batch.

    weight_VH: the reference's LM head, a copy of the policy's before the first step, so that no step gathers it; None
    where the policy's own head is frozen.
    """

    def __init__(self, hidden_rows: HiddenRows, weight_VH: torch.Tensor | None):
        self._hidden_rows, self._weight_VH = hidden_rows, weight_VH

    def rows(self, batch: PackedBatch) -> ReferenceRows | None:
        """The reference at the KL rows of ``batch``; None when the objective has no KL term."""
        if not batch.kl_keys:
            return None
        return ReferenceRows(self._hidden_rows(kl_part(batch)), self._weight_VH)


class AdapterReference:
    """The policy itself with its adapters off (``adapter``): no second model, no second LM head."""

    def rows(self, batch: PackedBatch) -> PackedBatch | None:
        """The KL rows of ``batch``, packed for the policy to run itself; None when the objective has no KL term."""
        return kl_part(batch) if batch.kl_keys else None


class CachedReference:
    """The reference's final hidden states at the retain response positions, computed once and kept on disk.

    Exact up to the rounding of a differently shaped matrix product, and no second model during training. Entries are
    keyed by row content; the folder is keyed by the weights that made it.
    """

    def __init__(self, folder: Path, weight_VH: torch.Tensor | None):
        self._weight_VH = weight_VH
        self._where: dict[str, Path] = {}
        self._open: dict[Path, safe_open] = {}
        for index in sorted(folder.glob("*.json")):
            self._where.update(dict.fromkeys(json.loads(index.read_text()), index.with_suffix(".safetensors")))

    def rows(self, batch: PackedBatch) -> ReferenceRows | None:
        """The cached states at the KL rows of ``batch``; ``UsageError`` when a row was never cached."""
        if not batch.kl_keys:
            return None
        hidden_NH = torch.cat([self._read(key) for key in batch.kl_keys])
        return ReferenceRows(hidden_NH.to(batch.input_ids_T.device, non_blocking=True), self._weight_VH)

    def _read(self, key: str) -> torch.Tensor:
        if key not in self._where:
            raise UsageError(f"the reference cache lacks row {key}; is its folder shared between all nodes?")
        path = self._where[key]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path].get_tensor(key)


def build_cache(
    folder: Path, hidden_rows: HiddenRows, rows: Sequence[EncodedRow], device: torch.device, rows_per_batch: int = 16
) -> None:
    """Write the hidden states of ``rows``: each rank a strided share, in one file of its own.

    Every rank runs the same number of forwards, so the model may be sharded. Rows that are there already stay.
    """
    there = {key for index in folder.glob("*.json") for key in json.loads(index.read_text())}
    missing = list({row.key: row for row in rows if row.key not in there}.values())
    dist.barrier()
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    term = Term("retain", "retain", "kl", 1.0)
    world, rank = dist.world_size(), dist.rank()
    tensors: dict[str, torch.Tensor] = {}
    for start in range(0, len(missing), rows_per_batch * world):
        # A rank without rows of its own in the last round repeats the first, so that all take part.
        mine = missing[start + rank : start + rows_per_batch * world : world] or missing[:1]
        batch = pack([Placed(row, 0, 0.0) for row in mine], [term])
        hidden_NH = hidden_rows(batch.to(device)).cpu()
        counts = [len(row.answer_ids) for row in mine]
        tensors |= {row.key: part.clone() for row, part in zip(mine, hidden_NH.split(counts), strict=True)}
    index = folder / f"{missing[0].key}-{rank:05d}-of-{world:05d}.json"
    save_file(tensors, index.with_suffix(".safetensors"))
    index.write_text(json.dumps(sorted(tensors)))
    dist.barrier()
