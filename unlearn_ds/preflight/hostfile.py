"""DeepSpeed's hostfile, its filters, and the environment that its runner hands on to the nodes.

Read here as DeepSpeed 0.19.8 reads them (launcher/runner.py), with the mistakes told that it answers with a traceback
or not at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from unlearn_ds.config import UsageError
from unlearn_ds.preflight.findings import Finding, Subject, fail, listed, ok, on_cpu, skipped, warn

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")

HANDED_ON = ("MLFLOW", "PYTHON", "MV2", "UCX")
"""Beginnings of the variables that DeepSpeed's runner hands on; on GPUs also NCCL."""
NEEDED = (
    "GLOO_", "NCCL_", "TP_SOCKET_IFNAME", "OMP_NUM_THREADS", "DS_ACCELERATOR", "HF_", "UNLEARN_DS_", "XDG_CACHE_HOME",
    "TORCH_", "TRITON_CACHE_DIR", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "HTTPS_PROXY", "https_proxy", "TMPDIR", "PATH", "LD_LIBRARY_PATH",
)  # fmt: skip
"""Beginnings of further variables that change a run or decide whether it starts."""
FORWARDED = "UNLEARN_DS_FORWARDED"
"""Names, and beginnings that end in _, of the variables that another launcher than DeepSpeed's runner hands on."""


def read(path: str) -> dict[str, int]:
    """Host -> slots of a hostfile, in its order; ``UsageError`` names the line that cannot be read."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"--hostfile: no such file: {path}")
    hosts: dict[str, int] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.match(text)
        if not match:
            raise UsageError(f"--hostfile: line {number} of {path} must read 'HOST slots=N'; it reads '{text}'.")
        if match[1] in hosts:
            raise UsageError(f"--hostfile: line {number} of {path} names {match[1]} twice.")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UsageError(f"--hostfile: {path} names no host.")
    return hosts


def chosen(hosts: Mapping[str, int], include: str | None, exclude: str | None) -> dict[str, int]:
    """Host -> slots that are left by ``--include`` or ``--exclude`` (``host@host:0,1``)."""
    if include and exclude:
        raise UsageError("--include and --exclude exclude each other; give one.")
    named = dict(_filter(part, hosts) for part in (include or exclude or "").split("@") if part)
    if include:
        left = {host: len(named[host] or range(hosts[host])) for host in hosts if host in named}
    else:
        gone = {host: len(slots or range(hosts[host])) for host, slots in named.items()}
        left = {host: slots - gone.get(host, 0) for host, slots in hosts.items()}
    left = {host: slots for host, slots in left.items() if slots > 0}
    if not left:
        raise UsageError("--include and --exclude leave no host.")
    return left


def _filter(part: str, hosts: Mapping[str, int]) -> tuple[str, list[str]]:
    """Host and slots of one part of a filter."""
    host, _, slots = part.strip().partition(":")
    if host not in hosts:
        raise UsageError(f"--include and --exclude take hosts of the hostfile; '{host}' is none of {listed([*hosts])}.")
    return host, [slot for slot in slots.split(",") if slot]


def environment_files() -> list[Path]:
    """The files of variables that the runner reads: in the home folder and here, or where ``DS_ENV_FILE`` says."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    found = [Path(folder).expanduser() / name for folder in ("~", ".")]
    return [path for number, path in enumerate(found) if path.is_file() and path not in found[:number]]


def from_files() -> dict[str, str]:
    """What the well-formed lines of these files set."""
    lines = [line for path in environment_files() for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: value for name, equals, value in (line.partition("=") for line in lines) if equals and _plain(name)}


def environment_file(subject: Subject) -> Finding:
    """Lines that stop DeepSpeed's runner: it splits each at "=", blank lines and comments too."""
    files = environment_files()
    if not files or os.environ.get(FORWARDED):
        return skipped("no .deepspeed_env" if not files else "this launcher does not read .deepspeed_env")
    bad = [
        f"{path}:{number} ({line or 'blank'})"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if not _plain(line.partition("=")[0]) or "=" not in line
    ]
    if bad:
        return fail(
            f"not NAME=value: {listed(bad)}; the deepspeed runner stops at such a line with a ValueError",
            "remove these lines, blank ones and comments too",
        )
    return ok(f"{listed([str(path) for path in files])}: {len(from_files())} variables")


def _plain(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z_]\w*", name) is not None


def exported(subject: Subject) -> Finding:
    """Variables set here that would not reach the other nodes over DeepSpeed's ssh."""
    if not subject.several_nodes:
        return skipped("one node")
    missing = sorted(name for name in os.environ if name.startswith(NEEDED) and not _reaches(name))
    if missing:
        return warn(
            f"set here, and not handed on by the deepspeed runner: {listed(missing, most=6)}",
            "start by launchers/hostfile.sh, or write each that matters as NAME=value into .deepspeed_env",
        )
    return ok("what is set here reaches the nodes")


def _reaches(name: str) -> bool:
    patterns = os.environ.get(FORWARDED, "").split()
    if patterns:
        return name in patterns or name.startswith(tuple(p for p in patterns if p.endswith("_")))
    return name.startswith(HANDED_ON if on_cpu() else (*HANDED_ON, "NCCL")) or name in from_files()


def handed_over() -> dict[str, str]:
    """The environment that the examination of a node is given: all that a run may be given, from here or a file."""
    here = {name: value for name, value in os.environ.items() if name.startswith((*HANDED_ON, *NEEDED))}
    return here | from_files()
