"""Runs of a launcher's script as processes forked from one that has imported the libraries already.

Apart from that a run is what a user starts: the same script, words, environment and exit code. Tests of the start
itself take ``subprocess``. Several ranks are processes with the variables that a launcher sets.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_FIXED = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
"""Variables that libraries read when they are imported."""


class Forked:
    """A run of ``script``; has what tests use of ``subprocess.Popen``. Standard error goes to standard output."""

    def __init__(self, script: Path, words: Sequence[str], environment: Mapping[str, str], ranks: int):
        self.args = [str(script), *words]
        descriptor, name = tempfile.mkstemp(prefix="run-")
        os.close(descriptor)
        self._output = Path(name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._processes = []
        for rank in range(max(1, ranks)):
            of_rank = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            } if ranks else {}  # fmt: skip
            process = _server().Process(
                target=_run, args=(str(script), list(words), {**environment, **_FIXED, **of_rank}, os.getcwd(), name)
            )
            process.start()
            self._processes.append(process)

    @property
    def returncode(self) -> int | None:
        codes = [process.exitcode for process in self._processes]
        return next((code for code in codes if code), None if None in codes else 0)

    def poll(self) -> int | None:
        return None if any(process.is_alive() for process in self._processes) else self.returncode

    def send_signal(self, number: int) -> None:
        for process in self._processes:
            os.kill(process.pid, number)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Wait for all ranks; like a launcher, end the others when one has failed."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout, self._output.read_bytes())
            if self.returncode:
                self.send_signal_to_rest(deadline)
            time.sleep(0.02)
        text = self._output.read_text(errors="replace")
        self._output.unlink()
        return text, None

    def send_signal_to_rest(self, deadline: float) -> None:
        """Kill the ranks that still run when they have not ended a few seconds after the first failure."""
        until = min(deadline, time.monotonic() + 10)
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        self.kill()


def _server() -> Any:
    """The context whose processes are forked from the server; the first process starts that."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    here = os.path.dirname(__file__)
    # The server looks for what it imports along PYTHONPATH alone.
    wanted = {"PYTHONPATH": os.pathsep.join([str(Path(here).parent), here]), **_FIXED}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    from multiprocessing import forkserver

    forkserver.ensure_running()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return context


def _run(script: str, words: list[str], environment: dict[str, str], folder: str, output: str) -> None:
    """In the forked process: become a run."""
    log = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [script, *words]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")
