"""The variables of launchers, as srun 22.05 and Open MPI 4.1 set them, and what becomes of them."""

from __future__ import annotations

import socket

import pytest

from unlearn_ds import ranks
from unlearn_ds.config import UsageError

STEP = {
    "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "5", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "alone", "SLURM_JOB_ID": "41234",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}  # fmt: skip


def test_a_task_of_srun_is_a_rank():
    variables = dict(STEP)
    assert ranks.adopt(variables) == "srun"
    found = [variables[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")]
    assert found == ["3", "5", "1", "2", "2"]
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("alone", "21234")


def test_a_batch_script_is_no_rank():
    """There Slurm sets the number of tasks that the job will have, and 0 for its own place among them."""
    variables = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "8"}
    assert ranks.adopt(variables) is None and "RANK" not in variables


def test_a_process_of_mpirun_is_a_rank_when_it_is_told_where_the_first_is():
    with pytest.raises(UsageError, match=r"MASTER_ADDR and MASTER_PORT unset.*mpi\.sh"):
        ranks.adopt(dict(MPI))
    variables = {**MPI, "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    assert ranks.adopt(variables) == "Open MPI"
    assert (variables["RANK"], variables["WORLD_SIZE"], variables["LOCAL_SIZE"]) == ("1", "2", "1")


def test_what_deepspeed_or_torchrun_has_set_is_left_alone():
    variables = {**STEP, "RANK": "7"}
    assert ranks.adopt(variables) is None and variables["RANK"] == "7"


@pytest.mark.parametrize(("counts", "expected"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,3(x2)", [1, 3, 3])])
def test_tasks_of_each_node(counts, expected):
    assert [ranks.tasks_of_node(counts, node) for node in range(len(expected))] == expected


def test_a_list_of_tasks_that_cannot_be_read_is_told():
    with pytest.raises(UsageError, match="4x2"):
        ranks.tasks_of_node("4x2", 0)


def test_an_interface_is_chosen_for_several_nodes_only():
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    alone = {**address, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert ranks.choose_interface(alone) is None and "GLOO_SOCKET_IFNAME" not in alone
    several = {**address, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert ranks.choose_interface(several) == "lo" == several["GLOO_SOCKET_IFNAME"]
    chosen = {**several, "GLOO_SOCKET_IFNAME": "eth7"}
    assert ranks.choose_interface(chosen) is None and chosen["GLOO_SOCKET_IFNAME"] == "eth7"


def test_a_first_node_without_an_address_is_told(monkeypatch):
    def unknown(*_args, **_kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UsageError, match="nowhere cannot be reached"):
        ranks.interface_to("nowhere", 29500)


def test_a_rank_leaves_its_number_and_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.setenv(ranks.STATUS, str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "3")
    ranks.note_start()
    ranks.note_exit(75)
    assert int((tmp_path / "pid-3").read_text()) > 1 and (tmp_path / "code-3").read_text() == "75"


def test_a_supervisor_of_another_machine_is_left_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(ranks.STATUS, str(tmp_path / "elsewhere"))
    ranks.note_exit(0)
    assert list(tmp_path.iterdir()) == []
