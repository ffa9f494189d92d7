"""What a check is given and what it says, and how a table of checks is gone through."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from unlearn_ds import ds_json
from unlearn_ds.config import RunConfig, UsageError
from unlearn_ds.registry import resolve

STATUSES = ("ok", "skipped", "warn", "fail")
"""From harmless to what would stop a run."""


class Finding(NamedTuple):
    """What one check saw on one node, and what to do about it. A check itself leaves its name and the node open."""

    status: str
    seen: str
    do: str = ""
    check: str = ""
    node: str = ""


def ok(seen: str) -> Finding:
    return Finding("ok", seen)


def skipped(why: str) -> Finding:
    """For what this node does not have or this run does not need."""
    return Finding("skipped", why)


def warn(seen: str, do: str) -> Finding:
    """For what may slow a run down or end it later."""
    return Finding("warn", seen, do)


def fail(seen: str, do: str) -> Finding:
    """For what would stop a run."""
    return Finding("fail", seen, do)


class Subject(NamedTuple):
    """What the checks of a node are about: a run, and this node's part in it.

    nodes: names of all nodes, this one's at ``index``. ranks: of the run on this node; 0 where nobody has said.
    port: which the main rank will listen on; None where the launcher has taken it already, or none is known.
    """

    config: RunConfig
    nodes: tuple[str, ...] = ()
    index: int = 0
    ranks: int = 0
    master: str | None = None
    port: int | None = None

    @property
    def node(self) -> str:
        return self.nodes[self.index] if self.nodes else socket.gethostname()

    @property
    def several_nodes(self) -> bool:
        return len(self.nodes) > 1

    @property
    def ds_values(self) -> dict[str, Any]:
        """The DeepSpeed configuration; "auto" stands for ZeRO-3 in bf16, which holds at least as much as in fp32."""
        name = self.config.engine.ds_config
        return ds_json.load("zero3" if name == "auto" else name)

    @property
    def bytes_per_weight(self) -> int:
        return 2 if ds_json.is_bf16(self.ds_values) else 4

    def offloads(self) -> list[str]:
        """What this run keeps outside the device: sections of the DeepSpeed configuration, and the reference."""
        zero = self.ds_values.get("zero_optimization", {})
        named = ("offload_param", "offload_optimizer")
        found = [name for name in named if zero.get(name, {}).get("device", "none") != "none"]
        return found + [f"--reference {self.config.engine.reference}"] * (
            self.config.engine.reference in ("offload", "nvme")
        )


def of_this_rank(config: RunConfig) -> Subject:
    """The subject of this process, as the launcher's variables tell of it; one rank on one node without them.

    Where a doctor is started once a node, ``GPUS_PER_NODE`` says how many ranks the run will have there.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)
    index = rank // local
    names = tuple(socket.gethostname() if n == index else f"node {n}" for n in range(-(-world // local)))
    # torchrun's agent listens on the port already, and the main rank joins its store.
    theirs = rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    number = None if theirs else os.environ.get("MASTER_PORT")
    master = os.environ.get("MASTER_ADDR")
    given = os.environ.get("GPUS_PER_NODE", "")
    ranks = max(local, int(given) if given.isdigit() else 0)
    return Subject(config, names, index, ranks, master, int(number) if number else None)


Check = Callable[[Subject], Finding]


def go_through(
    table: Mapping[str, str], subject: Subject, before: Callable[[str], None] = lambda name: None
) -> list[Finding]:
    """The findings of every check of a table, in its order. ``before`` hears each name before the check begins.

    A check that cannot look is a warning of its own: it must not hide what the others see.
    """
    found = []
    for name, target in table.items():
        before(name)
        check: Check = resolve("check", name, {name: target})
        found.append(_tried(check, subject)._replace(check=name, node=subject.node))
    return found


def _tried(check: Check, subject: Subject) -> Finding:
    try:
        return check(subject)
    except UsageError as error:
        return fail(str(error), "mend the flag or the file that it names")
    except (OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
        return warn(f"could not be looked at: {type(error).__name__}: {error}", "look at it by hand")


def worst(findings: Sequence[Finding]) -> str:
    """The worst status among findings; "ok" without any."""
    return max((finding.status for finding in findings), key=STATUSES.index, default="ok")


def on_cpu() -> bool:
    """True where a run of this node computes on the CPU: no NVIDIA driver, or told so by ``DS_ACCELERATOR``."""
    has_driver = os.path.exists("/dev/nvidiactl") or shutil.which("nvidia-smi") is not None
    return os.environ.get("DS_ACCELERATOR") == "cpu" or not has_driver


def size(num_bytes: float) -> str:
    """Bytes for people: 0.4 MiB, 12.3 GiB."""
    unit = "GiB" if num_bytes >= 2**30 else "MiB"
    return f"{num_bytes / (2**30 if unit == 'GiB' else 2**20):,.1f} {unit}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """Names for a sentence: the first few, and how many more."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
