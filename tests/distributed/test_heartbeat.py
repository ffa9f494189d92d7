"""What becomes of the ranks that are left when one is killed, frozen, fails, or comes to its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from harness import REPOSITORY

pytestmark = [pytest.mark.dist]
SECONDS, LONGEST = 2, 15

# Between the collectives a rank has work of its own, in which no error of the network would reach it.
RANK = """
import datetime, os, sys, time
import torch.distributed as dist
from unlearn_ds.config import UsageError
from unlearn_ds.heartbeat import Heartbeat
dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
what, me = sys.argv[1], int(os.environ["RANK"])
with Heartbeat(int(sys.argv[2])):
    os.write(1, b"up" + os.linesep.encode())
    if what == "usage of all" or (what == "usage of one" and me == 1):
        raise UsageError("a wrong flag for gloo")
    if what == "error" and me == 1:
        raise KeyError("no such row")
    if what == "network" and me == 1:
        raise RuntimeError("NCCL communicator was aborted")
    if what == "collective" and me != 1:
        dist.barrier()
    if what == "work" or (what in ("error", "network", "collective", "usage of one")):
        time.sleep(60)
    if what == "later" and me == 1:
        time.sleep(4)
"""


@pytest.fixture
def start():
    """Start ranks that do ``what``; they are killed at the end of the test."""
    processes = []

    def start_ranks(what, num_ranks=2, seconds=SECONDS):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(num_ranks):
            environment = {
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "PYTHONPATH": str(REPOSITORY),
            }  # fmt: skip
            processes.append(subprocess.Popen(
                [sys.executable, "-c", RANK, what, str(seconds)], env=environment, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            ))  # fmt: skip
        assert [process.stdout.readline() for process in processes] == ["up\n"] * num_ranks
        return processes

    yield start_ranks
    for process in processes:
        process.kill()
        process.communicate()


def ends(process):
    """Exit code and error output of a rank that is to end soon."""
    _, error = process.communicate(timeout=LONGEST)
    return process.returncode, error


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_killed_rank_is_named_and_the_others_leave(start, lost):
    processes = start("work", num_ranks=3)
    processes[lost].kill()
    for rank in {0, 1, 2} - {lost}:
        code, error = ends(processes[rank])
        assert code == 76 and f"rank {lost} " in error and "--resume auto" in error, error


def test_a_frozen_rank_is_lost_and_leaves_when_it_goes_on(start):
    """As after a stop of the whole machine: its connections are open, and nobody would notice."""
    processes = start("collective", num_ranks=3)
    processes[1].send_signal(signal.SIGSTOP)
    for rank in (0, 2):
        code, error = ends(processes[rank])
        assert code == 76 and f"rank 1 on {socket.gethostname()} has given no sign for {SECONDS} s" in error
    processes[1].send_signal(signal.SIGCONT)
    assert ends(processes[1])[0] == 76


def test_an_error_of_one_rank_is_told_to_the_others(start):
    processes = start("error", seconds=20)
    began = time.monotonic()
    code, error = ends(processes[0])
    assert code == 1 and "rank 1 on" in error and "KeyError: 'no such row'" in error and "--resume" not in error
    assert time.monotonic() - began < 15
    code, error = ends(processes[1])
    assert code == 1 and "Traceback" in error


def test_a_rank_whose_network_failed_though_all_others_live_is_lost(start):
    processes = start("network")
    code, error = ends(processes[0])
    assert code == 76 and "NCCL communicator was aborted" in error


def test_a_frozen_first_rank_whose_store_does_not_answer_is_lost(start):
    """As when its node is cut off: no connection breaks."""
    processes = start("work")
    processes[0].send_signal(signal.SIGSTOP)
    code, error = ends(processes[1])
    assert code == 76 and "rank 0" in error


def test_a_mistake_that_one_rank_finds_is_a_mistake_on_all(start):
    processes = start("usage of one")
    code, error = ends(processes[0])
    assert code == 2 and "a wrong flag" in error and "--resume" not in error


def test_ranks_that_find_the_same_mistake_end_by_themselves(start):
    for process in start("usage of all"):
        code, error = ends(process)
        assert code == 1 and "UsageError: a wrong flag for gloo" in error and "left" not in error


def test_ranks_that_finish_at_different_times_are_not_lost(start):
    assert [ends(process) for process in start("later")] == [(0, ""), (0, "")]


def test_without_seconds_nobody_watches(start):
    processes = start("work", seconds=0)
    processes[1].kill()
    with pytest.raises(subprocess.TimeoutExpired):
        processes[0].communicate(timeout=3)
