"""``launchers/supervise.py``: real launchers and ranks, imitated by a few lines of Python each."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest
from harness import REPOSITORY

SCRIPT = REPOSITORY / "launchers" / "supervise.py"
RANK = """
import os, signal, sys, time
from unlearn_ds import ranks
os.environ["LOCAL_RANK"] = sys.argv[1]
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
ranks.note_start()
if sys.argv[2] != "alone":
    ranks.note_joined()
os.write(1, b"up" + os.linesep.encode())  # in one piece: ranks share the pipe
while sys.argv[2] in ("wait", "alone") and not asked:
    time.sleep(0.02)
code = 75 if asked else int(sys.argv[2])
if code < 0:
    os.kill(os.getpid(), -code)
ranks.note_exit(code)
sys.exit(code)
"""
# Like torchrun, it ends with 1 whatever its ranks end with.
LAUNCHER = """
import subprocess, sys
children = [subprocess.Popen([sys.executable, "-c", sys.argv[1], str(n), code]) for n, code in enumerate(sys.argv[2:])]
sys.exit(1 if any([child.wait() for child in children]) else 0)
"""

_spec = importlib.util.spec_from_file_location("supervise", SCRIPT)
supervise = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(supervise)


def start(*command, **variables):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def launch(*codes, **variables):
    return start(sys.executable, "-c", LAUNCHER, RANK, *codes, **variables)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        (("0", "0"), 0), (("2", "2"), 2), (("3", "3"), 3), (("75", "75"), 75), (("76", "76"), 76),
        (("1", "76"), 1), (("-9", "76"), 76), (("-9", "75"), 76), (("75", "76"), 76), (("0", "-15"), 76),
    ],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_ranks(codes, expected):
    process = launch(*codes)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == expected, output


@pytest.mark.parametrize(("command", "expected"), [(("false",), 1), (("sh", "-c", "kill -9 $$"), 76), ((), 2)])
def test_a_launcher_that_starts_no_rank_decides_itself(command, expected):
    process = start(*command)
    process.communicate(timeout=60)
    assert process.returncode == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_and_not_the_launcher(number):
    process = launch("wait", "wait")
    assert [process.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_ranks_that_are_elsewhere_are_signalled_through_their_launcher():
    process = start("--ranks_elsewhere", sys.executable, "-c", RANK, "0", "wait")
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_a_launcher_that_ends_well_though_its_ranks_have_not_is_not_believed():
    """DeepSpeed's runner does when the process that started the ranks was killed."""
    quiet = LAUNCHER.replace("sys.exit(1 if any(", "sys.exit(0 if any(")
    process = start(sys.executable, "-c", quiet, RANK, "-9")
    process.communicate(timeout=60)
    assert process.returncode == 76


DEAF = RANK.replace("asked.append(1)", "None")
"""A rank that no handler interrupts."""


@pytest.mark.parametrize(
    "command",
    [("-c", "import time; print('up', flush=True); time.sleep(60)"), ("-c", LAUNCHER, DEAF, "alone")],
    ids=["before it starts ranks", "while they join the others"],
)
def test_a_signal_to_a_node_that_waits_for_others_ends_it(command):
    process = start(sys.executable, *command)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 75 and "before the ranks had met" in said


def test_a_second_signal_ends_ranks_that_do_not_listen():
    """Ranks that hang never come to the end of a step."""
    process = start(sys.executable, "-c", LAUNCHER, DEAF, "wait")
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(supervise.PATIENCE + 1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 76


def test_its_number_can_be_found_while_it_runs(tmp_path):
    path = tmp_path / "pid"
    process = launch("wait", UNLEARN_DS_PID_FILE=str(path))
    assert process.stdout.readline() == "up\n" and int(path.read_text()) == process.pid
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 75 and not path.exists()


def test_a_code_that_no_run_ends_with_is_a_killed_rank():
    assert [supervise.known(code) for code in (0, 1, 2, 3, 75, 76, 137, 247, -9)] == [0, 1, 2, 3, 75, 76, 76, 76, 76]
