from __future__ import annotations

import os
import time

import pytest
import torch

from unlearn_ds import dist, local_files

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


@pytest.mark.parametrize("built", [True, False])
def test_a_rank_that_waits_for_others_says_so_and_for_what(monkeypatch, tmp_path, capsys, built):
    for name, value in (("LOCAL_RANK", "0"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "n1"), ("MASTER_PORT", "2950")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(dist, "device_type", lambda: "cpu")
    if built:
        (tmp_path / "deepspeed_shm_comm.so").touch()
    monkeypatch.setattr(dist, "FIRST_WORD", 0.01)
    with dist.waiting():
        time.sleep(0.5)
    said = capsys.readouterr().out
    assert said.count("waiting") == 1  # the next word comes much later
    assert ("for 4 ranks to meet at n1:2950" if built else "compiled once") in said
    monkeypatch.setenv("LOCAL_RANK", "1")
    with dist.waiting():
        time.sleep(0.1)
    assert not capsys.readouterr().out


def test_ops_are_compiled_into_the_environment_that_runs(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    for before, after in ((None, str(tmp_path / "torch_extensions")), ("/elsewhere", "/elsewhere")):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", before or "")
        if before is None:
            monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        local_files.keep_ops_in_environment()
        assert os.environ["TORCH_EXTENSIONS_DIR"] == after
