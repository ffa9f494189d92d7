"""DeepSpeed's all-reduce in shared memory on CPUs: it works, and nothing of it stays behind."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch

WORLD = 2


def worker(rank, port, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    from unlearn_ds import dist, engine
    from unlearn_ds.config import EngineConfig

    engine.start(EngineConfig())
    import deepspeed

    tensor = torch.full((5,), 1.0 + rank, dtype=torch.bfloat16)
    deepspeed.comm.inference_all_reduce(tensor)
    named = [path.name for path in Path("/dev/shm").glob(f"*_{port}_*")]
    Path(folder, str(rank)).write_text(f"{tensor.tolist()} {named}")
    dist.shutdown()


@pytest.mark.dist
def test_ranks_reduce_through_shared_memory_and_leave_none_behind(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=WORLD)
    assert [(tmp_path / str(rank)).read_text() for rank in range(WORLD)] == [f"{[3.0] * 5} []"] * WORLD
    assert not list(Path("/dev/shm").glob(f"*_{port}_*"))
