"""The helpers of ``dist`` in a real process group of two, over gloo."""

from __future__ import annotations

import datetime
import json

import pytest
import torch

from unlearn_ds import dist

pytestmark = pytest.mark.dist
WORLD = 2
CPU = torch.device("cpu")


def worker(rank, folder):
    """One of the ranks: writes what each helper returned to a file of its own."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    found = {
        "who": [dist.rank(), dist.world_size(), dist.is_main(), dist.is_initialized()],
        # Integers beyond float32: a token count of a large batch must not lose its last digit.
        "sums": dist.sums([2**24 + 1, 0.5 + rank, rank], CPU),
        "gathered": dist.gather_objects({"rank": rank, "texts": ["a"] * (rank + 1)}),
    }
    dist.barrier()
    dist.shutdown()
    found["after"] = [dist.rank(), dist.world_size(), dist.is_initialized()]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def test_each_rank_knows_its_place_until_the_group_is_left(ranks):
    assert [found["who"] for found in ranks] == [[0, 2, True, True], [1, 2, False, True]]
    assert [found["after"] for found in ranks] == [[0, 1, False]] * 2


def test_sums_are_exact_and_the_same_on_every_rank(ranks):
    assert [found["sums"] for found in ranks] == [[2**25 + 2, 2.0, 1.0]] * 2


def test_objects_of_uneven_size_are_gathered_in_rank_order(ranks):
    assert [found["gathered"] for found in ranks] == [
        [{"rank": 0, "texts": ["a"]}, {"rank": 1, "texts": ["a", "a"]}]
    ] * 2
