"""Several hosts on this machine (tests/cluster/up.sh), and a tiny run that launchers start there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import REPOSITORY, ds_config, environment, write_data

NUM_NODES, NUM_STEPS = 3, 4
FREE_PORT = "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"


class Cluster:
    """Hosts node1, node2 and node3, which share the disk but for ``folder``/own."""

    def __init__(self, folder: Path, cache: Path, model: Path, subnet: int):
        self.folder, self.cache, self.model, self.subnet = folder, cache, model, subnet
        self.forget, self.retain = write_data(cache)
        self.zero3 = ds_config(cache, 3)

    def hostfile(self, *nodes: str) -> Path:
        """A DeepSpeed hostfile of one rank a node, with what users write into such files."""
        path = self.cache / f"hosts-{'-'.join(nodes)}"
        path.write_text("# one rank a node\n\n" + "".join(f"{node} slots=1  # CPU\n" for node in nodes))
        return path

    def flags(self, out: Path, *more: Any) -> list[str]:
        """Flags of a run of a few steps without evaluation."""
        common: list[Any] = [
            "--scenario", "hallucination", "--model", self.model, "--forget_data", self.forget,
            "--retain_data", self.retain, "--ds_config", self.zero3, "--batch_size", 2, "--max_steps", NUM_STEPS,
            "--learning_rate", 1e-3, "--eval.enabled", "false", "--checkpoint.export", "false",
            "--log.tensorboard", "false", "--log.progress", "false", "--output_dir", out,
        ]  # fmt: skip
        return [str(word) for word in (*common, *more)]

    def environment(self, **variables: str) -> dict[str, str]:
        """What a shell on a node has set. The doctor, which has tests of its own, is off."""
        slurm = {"SLURM_CONF": str(self.folder / "slurm" / "slurm.conf"), "PYTHON": sys.executable}
        return {**environment(self.cache), **slurm, "UNLEARN_DS_DOCTOR": "off", "GPUS_PER_NODE": "1", **variables}

    def start(self, node: str, command: Sequence[Any], **variables: str) -> subprocess.Popen[str]:
        """Start a command on a node, in the folder of the project; stderr goes to stdout."""
        return subprocess.Popen(
            [str(self.folder / "enter"), node, *map(str, command)], cwd=REPOSITORY, text=True,
            env=self.environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, node: str, command: Sequence[Any], timeout: int = 180, **variables: str) -> tuple[int, str]:
        """Exit code and output of a command on a node."""
        return wait(self.start(node, command, **variables), timeout)

    def free_port(self, node: str = "node1") -> str:
        """A port that is free on a node."""
        code, output = self.run(node, [sys.executable, "-c", FREE_PORT])
        assert code == 0, output
        return output.strip()

    def ranks_on(self, node: str) -> list[int]:
        """Processes of ranks on a node, as numbers of this machine."""
        network = os.readlink(f"/proc/{(self.folder / f'{node}.pid').read_text().strip()}/ns/net")
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_rank(pid, network)]


def is_rank(pid: int, network: str) -> bool:
    """True for a process in that network whose script is train.py; launchers have it further on in their arguments."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        scripts = [word for word in line[1:] if not word.startswith("-")]
        return os.readlink(f"/proc/{pid}/ns/net") == network and scripts[0].endswith("launchers/train.py")
    except (OSError, IndexError):  # it has ended meanwhile
        return False


def wait(process: subprocess.Popen[str], timeout: int = 180) -> tuple[int, str]:
    """Exit code and output of a process; one that takes longer is killed."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def wait_for_steps(out: Path, steps: int, timeout: int = 120) -> None:
    """Return once a run has written the line of so many steps."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= steps:
            return
        time.sleep(0.1)
    raise TimeoutError(f"{out} has not reached step {steps}")
