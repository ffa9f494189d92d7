"""Run a launcher on this node, hand stop signals on to its ranks, and leave with the exit code of the run.

``python launchers/supervise.py COMMAND [ARGUMENT ...]``, where the command is ``torchrun ... launchers/train.py`` or
``deepspeed --no_ssh ... launchers/train.py``. Both hide what a rank had to say: torchrun ends with 1 whatever its ranks
ended with, and either one answers a signal by killing them, so that nothing is saved. With ``--ranks_elsewhere`` the
command is ``mpirun``, whose ranks are on other machines too: it gets the signal itself, and hands SIGUSR1 on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from unlearn_ds import ranks
from unlearn_ds.exit_codes import DIVERGED, FAILED, FINISHED, LOST, STOPPED, USAGE

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_SECONDS = 0.5
PATIENCE = 5.0
"""Seconds after a first signal from which on another one ends everything at once."""
PID_FILE = "UNLEARN_DS_PID_FILE"
"""Where the number of this process is written, for a launcher on another machine that wants to signal it."""


def exit_code(command: int, codes: Sequence[int], num_started: int) -> int:
    """The exit code of the ranks of a node, from that of their launcher and from what each rank has left behind.

    A mistake of the user's or a divergence is every rank's and decides; an error of a single rank comes before the
    others' loss of it; a rank that left nothing was killed.
    """
    if command == FINISHED and list(codes) == [FINISHED] * num_started:
        return FINISHED
    for code in (USAGE, DIVERGED, FAILED):
        if code in codes:
            return code
    if num_started == 0:  # the launcher itself failed
        return known(command)
    if STOPPED in codes and len(codes) == num_started and LOST not in codes:
        return STOPPED
    return LOST


def known(command: int) -> int:
    """The exit code of a launcher that hands on its ranks': one that no run ends with is a killed rank's."""
    return command if command in (FINISHED, FAILED, USAGE, DIVERGED, STOPPED) else LOST


def read(folder: Path, kind: str) -> list[int]:
    """The numbers that ranks have left in ``folder``; one that is just being written is left out."""
    texts = [path.read_text() for path in folder.glob(f"{kind}-*")]
    return [int(text) for text in texts if text]


def signal_ranks(folder: Path) -> None:
    """Ask each rank of this node to save and leave."""
    for pid in read(folder, "pid"):
        try:
            os.kill(pid, signal.SIGUSR1)
        except ProcessLookupError:
            continue  # it has just ended


def supervise(command: Sequence[str], ranks_elsewhere: bool) -> int:
    """Run ``command`` to its end and return the exit code of the run."""
    asked: list[float] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: asked.append(time.monotonic()))
    # Launchers die of SIGUSR1, and torchrun of the SIGTERM that it is told to leave alone. Children inherit that a
    # signal is ignored; ranks, and launchers that want one, set a handler.
    noted = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGUSR1, signal.SIGTERM)}
    with tempfile.TemporaryDirectory(prefix="unlearn_ds-") as name:
        folder, environment = Path(name), dict(os.environ)
        if not ranks_elsewhere:
            environment[ranks.STATUS] = name
        # A session of its own: Ctrl-C reaches this process alone, and the launcher stays to wait for its ranks.
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        for number, handler in noted.items():
            signal.signal(number, handler)
        returned = wait(child, asked, None if ranks_elsewhere else folder)
        if ranks_elsewhere:
            return known(returned)
        if asked and not read(folder, "joined") and not read(folder, "code"):
            print("end         before the ranks had met: stopped by a signal, nothing to save", flush=True)
            return STOPPED
        return exit_code(returned, read(folder, "code"), len(read(folder, "pid")))


def wait(child: subprocess.Popen[bytes], asked: Sequence[float], folder: Path | None) -> int:
    """Wait for a launcher, handing on what it or its ranks were ``asked``; returns its exit code.

    asked: times of signals so far. folder: where ranks of this node leave their numbers; None where they are elsewhere.
    """
    handed_on = False
    while True:
        try:
            return child.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if not asked:
                continue
        if asked[-1] - asked[0] > PATIENCE:
            kill_tree(child.pid)
        elif folder is None:
            if not handed_on:
                child.send_signal(signal.SIGUSR1)
            handed_on = True
        elif read(folder, "joined"):
            # Again and again: a rank that has just met the others ignores it.
            signal_ranks(folder)
        else:  # it waits for other nodes, and there is nothing to save
            kill_tree(child.pid)


def kill_tree(pid: int) -> None:
    """End a process and all that it has started."""
    try:
        parent = psutil.Process(pid)
        tree = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def run(command: Sequence[str], ranks_elsewhere: bool) -> int:
    """``supervise``, and a last line where launchers speak of signals and process numbers only."""
    code = supervise(command, ranks_elsewhere)
    if code == LOST:
        print("error: a rank was lost. Run again with --resume auto.", file=sys.stderr)
    return code


def main(arguments: Sequence[str]) -> int:
    ranks_elsewhere = arguments[:1] == ["--ranks_elsewhere"]
    command = arguments[1:] if ranks_elsewhere else arguments
    if not command:
        print("usage: python launchers/supervise.py [--ranks_elsewhere] COMMAND [ARGUMENT ...]", file=sys.stderr)
        return USAGE
    pid_file = os.environ.pop(PID_FILE, None)
    if pid_file is None:
        return run(command, ranks_elsewhere)
    Path(pid_file).write_text(str(os.getpid()))
    try:
        return run(command, ranks_elsewhere)
    finally:
        Path(pid_file).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
