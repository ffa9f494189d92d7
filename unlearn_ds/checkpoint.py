"""Checkpoints of a run: saved whole or not at all, found again, and everything random restored."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from unlearn_ds import dist
from unlearn_ds.config import UsageError

_MARKER = "complete.json"


class Saved(Protocol):
    """What a checkpoint needs of an engine."""

    def save_checkpoint(self, folder: Path, tag: str, state: dict[str, Any]) -> None: ...

    def load_checkpoint(self, folder: Path, tag: str) -> dict[str, Any]: ...


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def save(policy: Saved, folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint after ``step`` steps on all ranks, then drop all but the ``keep`` newest.

    A marker is written last, by the main rank: a checkpoint without one was interrupted and is never resumed from.
    ``state`` is what the trainer needs back; the random states of this rank go with it.
    """
    tag = folder_name(step)
    if dist.is_main():
        shutil.rmtree(folder / tag, ignore_errors=True)
    dist.barrier()
    policy.save_checkpoint(folder, tag, {"trainer": {**state, "step": step}, "world_size": dist.world_size()})
    torch.save(_random_states(), folder / tag / f"random-{dist.rank():05d}.pt")
    dist.barrier()
    if dist.is_main():
        (folder / tag / _MARKER).write_text(json.dumps({"step": step, "world_size": dist.world_size()}))
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return folder / tag


def complete(folder: Path) -> list[Path]:
    """Checkpoints that were written to the end, oldest first."""
    return sorted(marker.parent for marker in folder.glob(f"step-*/{_MARKER}"))


def keep_only(folder: Path, step: int | None) -> bool:
    """Remove every checkpoint but that of ``step``, or all without one; False when that of ``step`` is not there."""
    there = step is None or (folder / folder_name(step)) in complete(folder)
    dist.barrier()
    for path in folder.glob("step-*") if dist.is_main() else ():
        if step is None or path.name != folder_name(step):
            shutil.rmtree(path)
    dist.barrier()
    return there


def load_newest(policy: Saved, folder: Path) -> dict[str, Any] | None:
    """Restore weights, optimizer, schedule and random states; return the trainer's state, None when there is nothing.

    Raises ``UsageError`` when the checkpoint belongs to another number of ranks.
    """
    there = complete(folder)
    seen = dist.gather_objects(there[-1].name if there else None)
    if len(set(seen)) > 1:
        raise UsageError(
            f"{folder} does not hold the same checkpoints on all nodes; --output_dir must lie on a disk they share."
        )
    if not there:
        return None
    saved = json.loads((there[-1] / _MARKER).read_text())["world_size"]
    if saved != dist.world_size():
        raise UsageError(
            f"{there[-1]} was written by {saved} ranks and this run has {dist.world_size()}: start it with {saved}."
        )
    state = policy.load_checkpoint(folder, there[-1].name)
    states = torch.load(there[-1] / f"random-{dist.rank():05d}.pt", weights_only=False)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    return state["trainer"]


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
