"""Ranks and sums over them. Works without a process group as one rank."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist


def is_initialized() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    return torch_dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    return torch_dist.get_world_size() if is_initialized() else 1


def local_world_size() -> int:
    """Ranks on this machine, as the launcher says; all of them when it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())


def is_main() -> bool:
    """True on the one rank that writes files and talks to the user."""
    return rank() == 0


def barrier() -> None:
    if is_initialized():
        torch_dist.barrier()


def sums(values: Sequence[float], device: torch.device) -> list[float]:
    """Sum each value over ranks in float64; one collective."""
    if world_size() == 1:
        return [float(v) for v in values]
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch_dist.all_reduce(tensor)
    return tensor.tolist()


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(gathered, value)
    return gathered


def device_type() -> str:
    """Type of the device that a run of this machine trains on, known before any process group is."""
    accelerated = torch.accelerator.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return torch.accelerator.current_accelerator().type if accelerated else "cpu"


def computes_bf16() -> bool:
    """True where bf16 matrix products are done in hardware: accelerators, and CPUs with the units for it."""
    if device_type() != "cpu":
        return True
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def default_environment() -> None:
    """Let a run without any launcher be a world of one rank on a free port."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def timeout(minutes: int) -> datetime.timedelta:
    return datetime.timedelta(minutes=minutes)


def shutdown() -> None:
    """Leave the process group, so that the interpreter exits without a warning."""
    if is_initialized():
        torch_dist.destroy_process_group()
