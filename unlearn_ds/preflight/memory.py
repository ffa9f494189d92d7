"""Shared memory, limits of the process, and what this node has to hold a run in."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from unlearn_ds.machine import host_bytes
from unlearn_ds.preflight import gpu
from unlearn_ds.preflight.findings import Finding, Subject, fail, listed, ok, on_cpu, size, skipped, warn

SHARED_FOLDER = Path("/dev/shm")
BUFFER = 66 * 2**20
"""Bytes of shared memory a CPU rank: DeepSpeed's all-reduce buffer (0.19.8)."""
NCCL_SHARED = 2**29
"""Bytes of shared memory below which NCCL runs out where GPUs cannot reach each other's memory. Containers give 64 MiB
unless told otherwise."""
LEAST_FILES = 1024
PINNED = 2**30


def shared_memory(subject: Subject) -> Finding:
    """Room in /dev/shm for what ranks of one node exchange there."""
    ranks = subject.ranks or 1
    return judged_shared(SHARED_FOLDER, ranks * BUFFER if on_cpu() else 0, NCCL_SHARED if ranks > 1 else 0)


def judged_shared(folder: Path, needed: int, wanted: int) -> Finding:
    """needed, wanted: bytes without which a run dies of SIGBUS, and with which it never has to look back."""
    if not folder.is_dir():
        return fail(f"{folder} is not there", "mount -t tmpfs -o size=8g tmpfs /dev/shm (docker: --ipc=host)")
    there = os.statvfs(folder)
    total, left = there.f_blocks * there.f_frsize, there.f_bavail * there.f_frsize
    text = f"{folder}: {size(left)} free of {size(total)}"
    do = "start the container with --ipc=host or --shm-size=8g, or mount -o remount,size=8g /dev/shm"
    if left < needed:
        return fail(f"{text}; this node's ranks need {size(needed)}", do)
    if left < wanted:
        return warn(f"{text}; several ranks on a node should have {size(wanted)}", do)
    return ok(text)


def open_files(subject: Subject) -> Finding:
    """Limit of open files: sockets to every other rank, weight files, checkpoints."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    ranks = (subject.ranks or 1) * max(1, len(subject.nodes))
    least = max(LEAST_FILES, 16 * ranks)
    if soft != resource.RLIM_INFINITY and soft < least:
        return warn(f"ulimit -n is {soft}", f"ulimit -n 65536 (nofile in /etc/security/limits.conf); {least} is least")
    return ok(f"{'unlimited' if soft == resource.RLIM_INFINITY else soft} open files")


def locked_memory(subject: Subject) -> Finding:
    """Limit of locked memory, where something is offloaded to host memory and pinned there."""
    reasons = subject.offloads()
    nvme = subject.config.engine.reference == "nvme"
    if not reasons or (on_cpu() and not nvme):
        return skipped("nothing is pinned in host memory")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= PINNED:
        return ok("unlimited" if soft == resource.RLIM_INFINITY else size(soft))
    return warn(
        f"ulimit -l is {size(soft)}, and {listed(reasons)} pins host memory",
        "ulimit -l unlimited (memlock in /etc/security/limits.conf; Slurm: PropagateResourceLimitsExcept=MEMLOCK)",
    )


def machine_facts(subject: Subject) -> dict[str, str]:
    """Bytes that the memory plan is compared with: of the host, as far as this process may use it, and of a device."""
    devices = [] if on_cpu() else gpu.devices()
    least = min((device.memory_bytes for device in devices), default=0)
    return {"host bytes": str(host_bytes(free=True)), "device bytes": str(least), "ranks": str(subject.ranks or 1)}
