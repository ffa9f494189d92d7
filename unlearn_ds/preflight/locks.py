"""Stale locks of compiled ops, and what compiling them needs.

torch takes ``FOLDER/OP/lock`` while it builds an op and waits for it without a limit and without a word. It is removed
on a clean end only, so after a build that was killed every later run of this user hangs.
"""

from __future__ import annotations

import ast
import os
import shutil
import time
from importlib import util
from pathlib import Path

from unlearn_ds.local_files import extensions_folder
from unlearn_ds.preflight.findings import Finding, Subject, fail, listed, ok, on_cpu, warn

PATIENCE = 900.0
"""Seconds after which a lock that nothing has been written beside is stale where its owner cannot be looked up. The
longest single file of DeepSpeed's ops takes about three minutes to compile on a slow core."""

OWN_FILE_SYSTEMS = ("overlay", "tmpfs")
"""Of a container itself: no process outside it writes there."""
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO in linux/proc_ns.h

NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "beegfs", "gpfs", "cifs", "smb3", "fuse.", "9p", "ceph", "wekafs")


def stale(subject: Subject) -> Finding:
    """Locks under the folder of compiled ops whose build is nobody's any more."""
    return judged(extensions_folder())


def judged(folder: Path, patience: float = PATIENCE) -> Finding:
    """The finding of one folder of compiled ops. patience: see ``PATIENCE``."""
    # torch makes one folder an op, and one above it for each version unless TORCH_EXTENSIONS_DIR is set.
    locks = [lock for pattern in ("*/lock", "*/*/lock") for lock in folder.glob(pattern)]
    dead, unsure, alive = [], [], []
    for lock in locks:
        state = state_of(lock, patience)
        {"stale": dead, "unknown": unsure, "held": alive, "gone": []}[state].append(lock)
    if dead:
        shown = listed([f"{lock} ({_age(lock)} old)" for lock in dead])
        return fail(
            f"compile lock of a build that nobody runs: {shown}; every run would wait for it without end",
            "rm " + " ".join(map(str, dead)),
        )
    if unsure:
        return warn(
            f"compile lock whose owner cannot be seen from here: {listed([f'{x} ({_age(x)} old)' for x in unsure])}",
            "if no other node or container is building, rm " + " ".join(map(str, unsure)),
        )
    if alive:
        return ok(f"being built now: {listed([lock.parent.name for lock in alive])}; a run would wait for it")
    return ok(f"no stale lock under {folder}")


def state_of(lock: Path, patience: float = PATIENCE) -> str:
    """ "held" by a process here, "stale", "gone", or "unknown": perhaps held where this process cannot look.

    torch's holder keeps the lock's file open until it removes it, and children do not inherit it: on this machine an
    open file is the proof of life, however long a build takes. Another node's, another user's or another container's
    process cannot be seen; there the age of the newest file beside the lock decides.
    """
    try:
        found = lock.stat()
        newest = max(path.stat().st_mtime for path in lock.parent.iterdir())
    except (FileNotFoundError, ValueError):
        return "gone"
    if _is_open(found):
        return "held"
    if not lock.exists():
        return "gone"
    if _sees_owner(lock, found.st_uid) or time.time() - newest > patience:
        return "stale"
    return "unknown"


def _is_open(file: os.stat_result) -> bool:
    """Whether a process that may be looked at has this file open."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for descriptor in (process / "fd").iterdir():
                there = descriptor.stat()
                if (there.st_dev, there.st_ino) == (file.st_dev, file.st_ino):
                    return True
        except OSError:  # it has ended, or is another user's
            continue
    return False


def _sees_owner(lock: Path, user: int) -> bool:
    """Whether a process that held this lock could be seen from here."""
    kind, outermost = _file_system(lock), os.readlink("/proc/self/ns/pid") == _FIRST_PID_NAMESPACE
    local = not kind.startswith(NETWORK_FILE_SYSTEMS) and (outermost or kind in OWN_FILE_SYSTEMS)
    return local and os.geteuid() in (0, user)


def _file_system(path: Path) -> str:
    """Kind of the file system of a path: that of the deepest mount above it."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(point, kind) for _, point, kind, *_ in mounts if path.resolve().is_relative_to(point)]
    return max(above, key=lambda row: len(row[0]))[1]


def _age(lock: Path) -> str:
    seconds = time.time() - lock.stat().st_mtime
    return f"{seconds / 3600:.0f} h" if seconds > 7200 else f"{seconds / 60:.0f} min"


def compiler(subject: Subject) -> Finding:
    """A C++ compiler and ninja, where this run loads an op of DeepSpeed."""
    ops = (["deepspeed_shm_comm"] if on_cpu() else []) + (
        ["async_io"] if subject.config.engine.reference == "nvme" else []
    )
    if not ops:
        return ok("this run loads no op that has to be compiled")
    unbuilt = [op for op in ops if not _is_built(op)]
    cxx = os.environ.get("CXX", "c++")
    if not shutil.which("ninja") and not all(_is_preinstalled(op) for op in ops):
        return fail(
            "ninja is not on the PATH of this node, and torch asks for it even where an op has been built",
            "pip install ninja, and put the folder of this Python's programs on PATH (in .deepspeed_env for ssh)",
        )
    if unbuilt and not shutil.which(cxx):
        return fail(f"no C++ compiler ({cxx}) to build {listed(unbuilt)} with", "apt-get install g++, or set CXX")
    if unbuilt:
        return ok(f"ninja and {cxx} are there; {listed(unbuilt)} will be built at the first start, in a minute or two")
    return ok(f"built: {listed(ops)}")


def _is_built(op: str) -> bool:
    folder = extensions_folder()
    return _is_preinstalled(op) or any(
        path.is_file() for pattern in (f"{op}/{op}.so", f"*/{op}/{op}.so") for path in folder.glob(pattern)
    )


def _is_preinstalled(op: str) -> bool:
    """Whether DeepSpeed was installed with this op compiled, as its file says. Finding a package does not import it."""
    spec = util.find_spec("deepspeed")
    file = Path(spec.origin).with_name("git_version_info_installed.py") if spec and spec.origin else None
    if file is None or not file.is_file():
        return False
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["installed_ops"]:
            return bool(ast.literal_eval(node.value).get(op, False))
    return False
