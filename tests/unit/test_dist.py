from __future__ import annotations

import os

import torch

from unlearn_ds import dist

CPU = torch.device("cpu")


def test_without_a_process_group_there_is_one_rank():
    assert (dist.rank(), dist.world_size(), dist.is_main(), dist.is_initialized()) == (0, 1, True, False)
    assert dist.sums([1, 2.5], CPU) == [1.0, 2.5]
    assert dist.gather_objects({"a": 1}) == [{"a": 1}]
    dist.barrier()
    dist.shutdown()


def test_a_run_without_a_launcher_is_a_world_of_one_on_a_free_port(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back after the test
        monkeypatch.delenv(name)
    dist.default_environment()
    assert [os.environ[name] for name in names[:4]] == ["0", "1", "0", "127.0.0.1"]
    assert 1024 <= int(os.environ["MASTER_PORT"]) < 65536


def test_the_environment_of_a_launcher_is_left_alone(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "12345")
    dist.default_environment()
    assert (os.environ["RANK"], os.environ["MASTER_PORT"]) == ("3", "12345")
