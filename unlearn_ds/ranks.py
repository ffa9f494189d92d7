"""The rank that a launcher has given this process, and how it reaches the others. Needs no torch.

``deepspeed`` and ``torchrun`` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. ``srun`` and ``mpirun``
have variables of their own, which ``adopt`` translates before anything reads those five.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

from unlearn_ds.config import UsageError

STATUS = "UNLEARN_DS_STATUS"
"""Folder in which a rank leaves its process id, and at its end its exit code: launchers hide both."""


class _Launcher(NamedTuple):
    name: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


# SLURM_NTASKS stands in a batch script too, which is no rank: the names of a step are set by srun alone.
_LAUNCHERS = (
    _Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    _Launcher("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
              "OMPI_COMM_WORLD_LOCAL_SIZE"),
    _Launcher("MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)  # fmt: skip


def adopt(variables: MutableMapping[str, str] = os.environ) -> str | None:
    """Set RANK and its like from what ``srun`` or ``mpirun`` has set; returns the launcher's name, None for any other.

    Raises ``UsageError`` where there are several ranks and nothing says where the first one is.
    """
    if "RANK" in variables:
        return None
    found = next((one for one in _LAUNCHERS if one.rank in variables and one.world_size in variables), None)
    if found is None:
        return None
    local_ranks = variables[found.local_world_size]
    if found.name == "srun":
        local_ranks = str(tasks_of_node(local_ranks, int(variables.get("SLURM_NODEID", "0"))))
    variables.update(
        RANK=variables[found.rank], WORLD_SIZE=variables[found.world_size], LOCAL_RANK=variables[found.local_rank],
        LOCAL_WORLD_SIZE=local_ranks, LOCAL_SIZE=local_ranks,
    )  # fmt: skip
    if found.name == "srun":
        variables.setdefault("MASTER_ADDR", _first_host_of_slurm(variables))
        # Ranks cannot agree on a free port before they have met; jobs that share a node have other numbers.
        variables.setdefault("MASTER_PORT", str(20000 + int(variables.get("SLURM_JOB_ID", "0")) % 10000))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in variables]
    if missing:
        raise UsageError(
            f"started by {found.name} with {' and '.join(missing)} unset: give every rank the host of rank 0 and a "
            "free port there (mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ...), or start it by launchers/mpi.sh."
        )
    return found.name


def tasks_of_node(counts: str, node: int) -> int:
    """Number of tasks on a node in Slurm's notation: ``2(x3),1`` is 2 on each of three nodes and 1 on the fourth."""
    expanded: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UsageError(f"SLURM_STEP_TASKS_PER_NODE: {counts!r} is not a list of task counts.")
        expanded += [int(match[1])] * int(match[2] or 1)
    return expanded[node]


def _first_host_of_slurm(variables: MutableMapping[str, str]) -> str:
    nodes = variables.get("SLURM_STEP_NODELIST", "")
    if not re.search(r"[\[,]", nodes):
        return nodes
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=30)
    if listed.returncode or not listed.stdout.strip():
        raise UsageError(f"scontrol show hostnames {nodes}: {listed.stderr.strip()}; set MASTER_ADDR.")
    return listed.stdout.split()[0]


def several_nodes(variables: MutableMapping[str, str] = os.environ) -> bool:
    """True where the launcher has started ranks on other machines too."""
    ranks = int(variables.get("WORLD_SIZE", "1"))
    return int(variables.get("LOCAL_WORLD_SIZE") or variables.get("LOCAL_SIZE") or ranks) < ranks


def choose_interface(variables: MutableMapping[str, str] = os.environ) -> str | None:
    """Let gloo use the network that reaches the first node; returns its name, None where nothing was to choose.

    gloo looks its own host name up, which many systems resolve to 127.0.0.1: ranks of other nodes then wait for
    minutes before they fail.
    """
    if not several_nodes(variables) or "GLOO_SOCKET_IFNAME" in variables:
        return None
    name = interface_to(variables["MASTER_ADDR"], int(variables["MASTER_PORT"]))
    if name is not None:
        variables["GLOO_SOCKET_IFNAME"] = name
    return name


def interface_to(host: str, port: int) -> str | None:
    """Name of the interface whose address this machine speaks to ``host`` from; on the host itself the one that has
    its address. None where no interface has it. Raises ``UsageError`` for a host that cannot be resolved."""
    import psutil

    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # a datagram socket: nothing is sent
            own = probe.getsockname()[0]
    except OSError as error:
        raise UsageError(f"MASTER_ADDR: {host} cannot be reached from {socket.gethostname()}: {error}") from None
    addresses = psutil.net_if_addrs()
    return next((name for name, found in addresses.items() if own in {entry.address for entry in found}), None)


def note_start() -> None:
    """Leave the process id where the supervisor of this node looks for it.

    Launchers of a supervisor ignore SIGTERM, and so at first do their ranks: it ends them until there is something to
    save."""
    if STATUS in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _note("pid", str(os.getpid()))


def note_joined() -> None:
    """Tell the supervisor of this node that the ranks have met: from here on there may be something to save."""
    _note("joined", "1")


def note_exit(code: int) -> None:
    """Leave the exit code where the supervisor of this node looks for it."""
    _note("code", str(code))


def _note(kind: str, text: str) -> None:
    folder = os.environ.get(STATUS)
    if folder and Path(folder).is_dir():  # a rank of another machine may have been handed the variable
        (Path(folder) / f"{kind}-{os.environ.get('LOCAL_RANK', '0')}").write_text(text)
