"""The frozen reference of the KL term, never a deep copy of the policy: live on an engine, or cached on disk."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from unlearn_ds import dist
from unlearn_ds.config import UsageError
from unlearn_ds.data.packing import Placed, kl_part, pack
from unlearn_ds.types import EncodedRow, PackedBatch, ReferenceRows, Term

FILE_BYTES = 2**28
"""Of a file of the cache: what a killed run has to compute again."""
NUM_VERIFIED = 4
"""Cached rows that are computed again whenever a cache is taken up."""

HiddenRows = Callable[[PackedBatch], torch.Tensor]
"""A model as the reference sees it: packed batch -> final hidden states at its response rows, [N, H]."""


class LiveReference:
    """A second model (``offload``, ``nvme`` or ``resident``) that runs on the retain rows of each micro-batch.

    weight_VH: the reference's LM head, a copy of the policy's before the first step, so that no step gathers it; None
    where the policy's own head is frozen.
    """

    def __init__(self, hidden_rows: HiddenRows, weight_VH: torch.Tensor | None):
        self._hidden_rows, self._weight_VH = hidden_rows, weight_VH

    def fetch(self, batch: PackedBatch) -> None:
        """Nothing to read ahead."""

    def rows(self, batch: PackedBatch) -> ReferenceRows | None:
        """The reference at the KL rows of ``batch``; None when the objective has no KL term."""
        if not batch.kl_keys:
            return None
        return ReferenceRows(self._hidden_rows(kl_part(batch)), self._weight_VH)


class AdapterReference:
    """The policy itself with its adapters off (``adapter``): no second model, no second LM head."""

    def fetch(self, batch: PackedBatch) -> None:
        """Nothing to read ahead."""

    def rows(self, batch: PackedBatch) -> PackedBatch | None:
        """The KL rows of ``batch``, packed for the policy to run itself; None when the objective has no KL term."""
        return kl_part(batch) if batch.kl_keys else None


class CachedReference:
    """The reference's final hidden states at the retain response positions, computed once and kept on disk.

    Exact up to the rounding of a differently shaped matrix product, and no second model during training. Entries are
    keyed by row content; the folder is keyed by the weights that made it. Files are mapped into memory; what ``fetch``
    has read ahead waits in pinned memory for a device that copies from there.
    """

    def __init__(self, folder: Path, weight_VH: torch.Tensor | None):
        self.folder, self._weight_VH = folder, weight_VH
        self._where = _index(folder)
        self._open: dict[Path, safe_open] = {}
        self._ahead: dict[tuple[str, ...], torch.Tensor] = {}

    def fetch(self, batch: PackedBatch) -> None:
        """Read the states of a batch to come; may run beside a step."""
        if batch.kl_keys:
            self._ahead[tuple(batch.kl_keys)] = self._states(batch)

    def rows(self, batch: PackedBatch) -> ReferenceRows | None:
        """The cached states at the KL rows of ``batch``; ``UsageError`` when a row was never cached."""
        if not batch.kl_keys:
            return None
        hidden_NH = self._ahead.pop(tuple(batch.kl_keys), None)
        hidden_NH = self._states(batch) if hidden_NH is None else hidden_NH
        return ReferenceRows(hidden_NH.to(batch.input_ids_T.device, non_blocking=True), self._weight_VH)

    def _states(self, batch: PackedBatch) -> torch.Tensor:
        hidden_NH = torch.cat([self.read(key) for key in batch.kl_keys])
        return hidden_NH.pin_memory() if torch.cuda.is_available() else hidden_NH

    def read(self, key: str) -> torch.Tensor:
        """States of one row, [its response tokens, H], on the host."""
        if key not in self._where:
            raise UsageError(f"the reference cache lacks row {key}; is its folder shared between all nodes?")
        path = self._where[key]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            return self._open[path].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"the reference cache {path} cannot be read ({error}): delete {self.folder}") from error

    def __contains__(self, key: str) -> bool:
        return key in self._where


def build_cache(
    folder: Path, hidden_rows: HiddenRows, rows: Sequence[EncodedRow], device: torch.device, rows_per_batch: int = 16
) -> None:
    """Write the hidden states of ``rows``: each rank a strided share, in files of its own.

    Every rank runs the same number of forwards, so the model may be sharded. Rows that are there already stay, and a
    few of them are computed again: ``UsageError``, on every rank, where they are not what this model gives.
    """
    there = _on_each_rank(lambda: CachedReference(folder, None))
    distinct = list({row.key: row for row in rows}.values())
    known, missing = ([row for row in distinct if (row.key in there) is kept] for kept in (True, False))
    # All ranks must see the same files, or they would not run the same forwards.
    if len(set(dist.gather_objects(tuple(row.key for row in missing)))) > 1:
        raise UsageError(f"the reference cache {folder} is not the same on all nodes: it needs a folder they share")
    _verify(there, hidden_rows, known, device)
    if not missing:
        return
    world, rank = dist.world_size(), dist.rank()
    tensors: dict[str, torch.Tensor] = {}
    for start in range(0, len(missing), rows_per_batch * world):
        # A rank without rows of its own in the last round repeats the first, so that all take part.
        mine = missing[start + rank : start + rows_per_batch * world : world] or missing[:1]
        tensors |= _computed(hidden_rows, mine, device)
        if sum(x.nbytes for x in tensors.values()) > FILE_BYTES:
            _write(folder, tensors)
            tensors = {}
    if tensors:
        _write(folder, tensors)
    dist.barrier()


def _on_each_rank(call: Callable[[], Any]) -> Any:
    """The result of something that each rank does alone; where it fails on one, ``UsageError`` on all of them."""
    value, error = None, None
    try:
        value = call()
    except UsageError as raised:
        error = str(raised)
    errors = [told for told in dist.gather_objects(error) if told]
    if errors:
        raise UsageError(errors[0])
    return value


def _index(folder: Path) -> dict[str, Path]:
    """Row key -> file, of everything that is in a cache."""
    where: dict[str, Path] = {}
    for index in sorted(folder.glob("*.json")):
        try:
            keys = json.loads(index.read_text())
        except ValueError as error:
            raise UsageError(f"the reference cache {index} cannot be read ({error}): delete {folder}") from error
        where.update(dict.fromkeys(keys, index.with_suffix(".safetensors")))
    return where


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Add one file and its index, each whole or not at all: a killed run leaves nothing half done. A file is named by
    its rows, so what a second run writes over it is equal, and what the first has mapped stays."""
    name = hashlib.blake2s(" ".join(sorted(tensors)).encode(), digest_size=16).hexdigest()
    path = folder / f"{name}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            new, index = Path(unfinished, "new.safetensors"), Path(unfinished, "new.index")
            save_file(tensors, new)
            index.write_text(json.dumps(sorted(tensors)))
            new.replace(path)
            index.replace(path.with_suffix(".json"))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the reference cache cannot be written to {folder}: {error}") from error


def _computed(hidden_rows: HiddenRows, rows: Sequence[EncodedRow], device: torch.device) -> dict[str, torch.Tensor]:
    batch = pack([Placed(row, 0, 0.0) for row in rows], [Term("retain", "retain", "kl", 1.0)])
    hidden_NH = hidden_rows(batch.to(device)).cpu()
    parts = hidden_NH.split([len(row.answer_ids) for row in rows])
    return {row.key: part.clone() for row, part in zip(rows, parts, strict=True)}


def _verify(there: CachedReference, hidden_rows: HiddenRows, rows: Sequence[EncodedRow], device: torch.device) -> None:
    """Compare a few cached rows, other ones each time, with what the model computes now."""
    if not rows:
        return
    seed = dist.gather_objects(random.randrange(2**31))[0]  # every rank compares the same ones
    now = _computed(hidden_rows, random.Random(seed).sample(rows, min(NUM_VERIFIED, len(rows))), device)
    _on_each_rank(lambda: [_compare(there, key, states) for key, states in now.items()])


def _compare(there: CachedReference, key: str, now: torch.Tensor) -> None:
    kept, tolerance = there.read(key), 1e-3 if now.dtype == torch.float32 else 3e-2
    same_form = kept.shape == now.shape and kept.dtype == now.dtype
    error = float((kept.double() - now.double()).norm() / now.double().norm()) if same_form else float("inf")
    if not error <= tolerance:
        raise UsageError(
            f"the reference cache {there.folder} does not hold what this model computes (row {key} is off by "
            f"{error:.1%}): delete that folder, and it will be made again"
        )
