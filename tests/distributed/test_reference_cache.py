"""The cached reference on two ranks: what fails on one is told on both, instead of leaving the other waiting."""

from __future__ import annotations

import datetime
import json

import pytest
import torch

from unlearn_ds import dist
from unlearn_ds.config import UsageError
from unlearn_ds.reference import CachedReference, build_cache
from unlearn_ds.types import EncodedRow

pytestmark = pytest.mark.dist
WORLD, CPU = 2, torch.device("cpu")
ROWS = [EncodedRow((1, 2, n), tuple(range(3, 5 + n % 3))) for n in range(9)]


def hidden_rows(batch):
    """A model whose states can be told apart: the token at each position that predicts a response token."""
    return batch.input_ids_T[batch.loss_index_N, None].float().expand(-1, 4).contiguous()


def told(call):
    try:
        call()
    except UsageError as error:
        return str(error)
    return None


def worker(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    shared, own = folder / "shared", folder / f"of rank {rank}"
    build_cache(shared, hidden_rows, ROWS, CPU, rows_per_batch=2)
    there = CachedReference(shared, None)
    found = {"files": len(list(shared.glob("*.json"))), "rows": [there.read(row.key).tolist() for row in ROWS]}
    dist.barrier()  # both have read: what is mapped changes now
    if rank == 0:
        file = min(shared.glob("*.safetensors"))
        file.write_bytes(b"broken")
    dist.barrier()
    found["damaged"] = told(lambda: [build_cache(shared, hidden_rows, ROWS, CPU) for _ in range(20)])
    if rank == 0:
        own.mkdir()
        (own / "row.json").write_text(json.dumps([ROWS[0].key]))
    dist.barrier()
    found["not shared"] = told(lambda: build_cache(own, hidden_rows, ROWS, CPU))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.shutdown()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    torch.multiprocessing.spawn(worker, (folder,), nprocs=WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def test_ranks_write_a_file_each_and_read_all_rows(ranks):
    for found in ranks:
        assert found["files"] == WORLD
        for row, states in zip(ROWS, found["rows"], strict=True):
            tokens = [*row.prompt_ids[-1:], *row.answer_ids[:-1]]
            assert states == [[float(token)] * 4 for token in tokens]


def test_a_damaged_file_is_told_on_every_rank(ranks):
    assert ranks[0]["damaged"] == ranks[1]["damaged"] and "cannot be read" in ranks[0]["damaged"]


def test_a_folder_that_nodes_do_not_share_is_refused_on_every_rank(ranks):
    assert ranks[0]["not shared"].endswith("it needs a folder they share")
    assert "it needs a folder they share" in ranks[1]["not shared"]
