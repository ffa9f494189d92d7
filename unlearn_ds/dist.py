"""Ranks and sums over them. Works without a process group as one rank."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from unlearn_ds.local_files import extensions_folder


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
        # NCCL would guess the device from the global rank, and print that it does.
        on_gpus = "nccl" in torch_dist.get_backend()
        torch_dist.barrier(device_ids=[int(os.environ["LOCAL_RANK"])] if on_gpus else None)


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


FIRST_WORD, NEXT_WORD = 10.0, 60.0
"""Seconds after which a rank that waits for others says so, and says so again."""


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Say what is waited for where joining the other ranks takes long, on the first rank of each node."""
    done, began, told = threading.Event(), time.monotonic(), sys.stdout

    def tell() -> None:
        pause = FIRST_WORD
        while not done.wait(pause):
            pause = NEXT_WORD
            print(f"waiting     {_waits_for()}, {time.monotonic() - began:.0f} s so far", file=told, flush=True)

    if os.environ["LOCAL_RANK"] == "0":
        threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _waits_for() -> str:
    if device_type() == "cpu" and not any(extensions_folder().rglob("deepspeed_shm_comm*.so")):
        return "for DeepSpeed's op for shared memory, compiled once (a minute or two)"
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return f"for {os.environ['WORLD_SIZE']} ranks to meet at {place}; a node that was not started keeps all others"
