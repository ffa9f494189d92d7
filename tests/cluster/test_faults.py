"""A rank that is killed on the second node, and a signal: every launcher ends everywhere, with its exit code."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
from harness import metrics, without_measured
from hosts import wait, wait_for_steps

pytestmark = [pytest.mark.slow, pytest.mark.dist]
LOST, STOPPED, LIMIT = 76, 75, 60
ENDLESS = ("--max_steps", 100000, "--schedule", "constant")
TWO = ("node1", "node2")


def start_hostfile(cluster, flags, port):
    return [cluster.start("node1", ["bash", "launchers/hostfile.sh", cluster.hostfile(*TWO), *flags])]


def start_without_ssh(cluster, flags, port):
    command = ["bash", "launchers/no_ssh.sh", cluster.hostfile(*TWO), *flags]
    return [cluster.start(node, command, MASTER_PORT=port) for node in TWO]


def start_torchrun(cluster, flags, port):
    command = ["bash", "launchers/torchrun.sh", *flags]
    common = {"NNODES": "2", "MASTER_ADDR": "node1", "MASTER_PORT": port}
    return [cluster.start(node, command, NODE_RANK=str(rank), **common) for rank, node in enumerate(TWO)]


def start_mpi(cluster, flags, port):
    return [cluster.start("node1", ["bash", "launchers/mpi.sh", cluster.hostfile(*TWO), *flags], MASTER_PORT=port)]


LAUNCHERS = {
    f.__name__.removeprefix("start_"): f for f in (start_hostfile, start_without_ssh, start_torchrun, start_mpi)
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_ends_the_run_on_all_nodes(cluster, tmp_path, launcher):
    processes = LAUNCHERS[launcher](cluster, cluster.flags(tmp_path / "out", *ENDLESS), cluster.free_port())
    wait_for_steps(tmp_path / "out", 2)
    (rank,) = cluster.ranks_on("node2")
    os.kill(rank, signal.SIGKILL)
    killed = time.monotonic()
    ends = [wait(process, LIMIT) for process in processes]
    assert time.monotonic() - killed < LIMIT
    assert [code for code, _ in ends] == [LOST] * len(ends), ends
    assert not cluster.ranks_on("node1") and not cluster.ranks_on("node2")
    # Who is lost stands there, in words of ours.
    assert any("--resume auto" in output for _, output in ends), ends


def test_a_signal_to_the_launcher_makes_all_ranks_save_and_leave(cluster, tmp_path):
    (process,) = start_hostfile(cluster, cluster.flags(tmp_path / "out", *ENDLESS), None)
    wait_for_steps(tmp_path / "out", 2)
    process.send_signal(signal.SIGTERM)
    code, output = wait(process, LIMIT)
    assert code == STOPPED, output
    done = len(metrics(tmp_path / "out"))
    assert (tmp_path / "out" / "checkpoints" / f"step-{done:06d}" / "complete.json").exists()


def test_a_job_of_slurm_is_queued_again_and_ends_with_the_same_numbers(cluster, tmp_path):
    """A rank of its second node is killed after the checkpoint of step 4; the job runs again from there."""
    flags = ("--max_steps", 8, "--save_every", 2)
    whole = cluster.run("node1", [*sbatch(tmp_path, "whole"), *cluster.flags(tmp_path / "whole", *flags)])
    assert whole[0] == 0, (tmp_path / "whole.log").read_text()
    job = cluster.start("node1", [*sbatch(tmp_path, "killed"), *cluster.flags(tmp_path / "killed", *flags)])
    wait_for_steps(tmp_path / "killed", 5)
    (rank,) = cluster.ranks_on("node2")
    os.kill(rank, signal.SIGKILL)
    code, _ = wait(job, 300)
    log = (tmp_path / "killed.log").read_text()
    assert code == 0, log
    assert "exit code 76: queued again, restart 1 of" in log and "resume      after step" in log, log
    assert without_measured(metrics(tmp_path / "killed")) == without_measured(metrics(tmp_path / "whole"))


def test_before_its_time_is_up_a_job_saves_and_is_queued_again(cluster, tmp_path):
    """The signal of --signal, sent by hand: a limit of Slurm's is a minute at least."""
    job = cluster.start("node1", [*sbatch(tmp_path, "out"), *cluster.flags(tmp_path / "out", "--max_steps", 2000)],
                        MAX_RESTARTS="0")  # fmt: skip
    wait_for_steps(tmp_path / "out", 2)
    _, number = cluster.run("node1", ["squeue", "--noheader", "--format", "%i"])
    assert cluster.run("node1", ["scancel", "--signal", "USR1", number.strip()])[0] == 0
    code, _ = wait(job, LIMIT)
    log = (tmp_path / "out.log").read_text()
    assert code == STOPPED and "exit code 75 after 0 restarts" in log, log
    assert list((tmp_path / "out").glob("checkpoints/*/complete.json"))


def test_a_diverged_job_keeps_its_code_and_is_not_queued_again(cluster, tmp_path):
    """The nodes never leave at the same instant, and none may be killed for being the later one."""
    flags = ("--max_steps", 20, "--learning_rate", 1e30, "--gradient_clipping", 0, "--warmup_ratio", 0)
    job = cluster.start("node1", [*sbatch(tmp_path, "out"), *cluster.flags(tmp_path / "out", *flags)])
    code, _ = wait(job, 180)
    log = (tmp_path / "out.log").read_text()
    assert code == 3 and "not finite" in log and "queued again" not in log, log


def test_a_finished_run_is_not_run_again(cluster, tmp_path):
    flags = cluster.flags(tmp_path / "out", "--resume", "auto")
    first, second = (cluster.run("node1", [sys.executable, "launchers/train.py", *flags]) for _ in range(2))
    assert first[0] == 0 and "holds this run" not in first[1], first[1]
    assert second[0] == 0 and "holds this run, finished" in second[1], second[1]


def sbatch(folder, name):
    return ["sbatch", "--wait", "--nodes", 2, "--output", folder / f"{name}.log", "launchers/slurm.sbatch"]
