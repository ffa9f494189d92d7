"""NVIDIA devices, as ``nvidia-smi`` and the files of the torch package tell about them. torch itself is asked last."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import NamedTuple

from unlearn_ds.preflight.findings import Finding, Subject, fail, listed, ok, on_cpu, skipped, warn
from unlearn_ds.versions import installed

SECONDS = 8.0
"""After which ``nvidia-smi`` is taken for hanging, as it does when a device has fallen off the bus."""
BUSY = 2**30
"""Bytes in use on a device that belong to somebody else's process."""

_QUERY = ("index", "name", "driver_version", "memory.total", "memory.used")
_HEALTH = {
    "ecc.errors.uncorrected.volatile.total": "uncorrectable memory errors",
    "remapped_rows.failure": "failed row remapping",
    "remapped_rows.pending": "row remapping that waits for a reset",
    "retired_pages.pending": "page retirement that waits for a reset",
    "clocks_throttle_reasons.hw_slowdown": "hardware slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown": "thermal slowdown",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "power brake",
}
"""Fields of ``nvidia-smi --query-gpu`` and what a value other than 0, No or Not Active means."""
_SLOW = tuple(field for field in _HEALTH if field.startswith("clocks"))
_FINE = ("0", "no", "not active", "[n/a]", "n/a", "[not supported]", "")


class Device(NamedTuple):
    index: str
    name: str
    driver: str
    memory_bytes: int
    used_bytes: int


def devices() -> list[Device]:
    """The devices of this node; raises ``OSError`` or ``subprocess.SubprocessError`` where nvidia-smi cannot tell."""
    return [
        Device(index, name, driver, _bytes(total), _bytes(used)) for index, name, driver, total, used in _query(_QUERY)
    ]


def _bytes(mebibytes: str) -> int:
    """0 for "[N/A]": devices that share the host's memory have none of their own to tell of."""
    return int(mebibytes) * 2**20 if mebibytes.isdigit() else 0


def _query(fields: tuple[str, ...]) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise OSError((done.stdout + done.stderr).strip().splitlines()[-1] if done.stdout + done.stderr else "no text")
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def facts(subject: Subject) -> dict[str, str]:
    """What must be the same on every node: number and model of the devices, driver, CUDA and NCCL."""
    about = {"CUDA of torch": torch_cuda() or "none", "NCCL": _nccl()}
    if on_cpu() or not shutil.which("nvidia-smi"):
        return about | {"GPUs": "none"}
    try:
        found = devices()
    except (OSError, ValueError, subprocess.SubprocessError):  # told by ``usable``
        return about | {"GPUs": "unknown"}
    models = sorted({device.name for device in found})
    drivers = sorted({device.driver for device in found})
    return about | {"GPUs": f"{len(found)} x {' and '.join(models)}", "driver": " and ".join(drivers)}


def _nccl() -> str:
    found = [version for version in (installed(f"nvidia-nccl-cu{n}") for n in (13, 12, 11)) if version != "none"]
    return found[0] if found else "none"


def torch_cuda() -> str | None:
    """CUDA version that torch was built with, read from the package's file; None for a CPU build."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "cuda":
            return node.value.value if isinstance(node.value, ast.Constant) else None
    return None


def usable(subject: Subject) -> Finding:
    """As many devices as ranks, each with its memory free."""
    if on_cpu():
        return skipped("no GPU, or DS_ACCELERATOR=cpu: the run computes on the CPU")
    try:
        found = devices()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return fail(f"nvidia-smi does not answer: {error}", "restart the driver or the node; see dmesg for NVRM lines")
    if len(found) < max(1, subject.ranks):
        return fail(
            f"{len(found)} GPU(s) for {subject.ranks} ranks",
            "write the true number of slots into the hostfile, or bring the missing device back (nvidia-smi, dmesg)",
        )
    busy = [f"GPU {d.index} ({d.used_bytes / 2**30:.1f} GiB)" for d in found if d.used_bytes > BUSY]
    if busy:
        return warn(f"memory in use by other processes: {listed(busy)}", "end them (nvidia-smi lists their pids)")
    return ok(f"{len(found)} x {found[0].name}, {found[0].memory_bytes / 2**30:.0f} GiB each, unused")


def health(subject: Subject) -> Finding:
    """Uncorrectable memory errors, remapped rows, throttling, and Xid errors in the kernel's log."""
    if on_cpu():
        return skipped("no GPU, or DS_ACCELERATOR=cpu")
    try:
        rows = _query(("index", *_HEALTH))
    except (OSError, subprocess.SubprocessError) as error:
        return skipped(f"n/a: this nvidia-smi cannot tell ({error})")
    sick, slow = [], []
    for index, *values in rows:
        for (field, meaning), value in zip(_HEALTH.items(), values, strict=True):
            if value.lower() not in _FINE:
                (slow if field in _SLOW else sick).append(f"GPU {index}: {meaning} ({value})")
    errors = xid_errors()
    if sick:
        return fail(listed(sick), "take the node out (--exclude) and reset the device: nvidia-smi --gpu-reset -i N")
    if errors:
        return warn(f"Xid in the kernel's log: {errors[-1]}", "look the number up in NVIDIA's Xid list; reset the GPU")
    if slow:
        return warn(listed(slow), "check cooling and power of the node: it will hold all others back")
    return ok(f"{len(rows)} device(s) without errors or throttling")


def xid_errors() -> list[str]:
    """Xid lines of the kernel's log, oldest first; none where this user may not read it."""
    if not shutil.which("dmesg"):
        return []
    done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=SECONDS)
    return [line.strip() for line in done.stdout.splitlines() if re.search(r"NVRM: Xid", line)]


def torch_sees(subject: Subject) -> Finding:
    """Whether torch can use the devices: asked in a process of its own, which may hang or crash."""
    if on_cpu():
        return skipped("no GPU, or DS_ACCELERATOR=cpu")
    if torch_cuda() is None:
        return fail(
            "this node has GPUs and its torch is built for CPUs",
            "install a torch for CUDA, or set DS_ACCELERATOR=cpu to compute on the CPU",
        )
    code = "import torch; torch.zeros(1, device='cuda'); print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=15, env=os.environ)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no text"]
        return fail(f"torch cannot use the GPUs: {last[0]}", "the driver must be as new as torch's CUDA asks for")
    count = int(done.stdout.split()[-1])
    if count < subject.ranks:
        return fail(f"torch sees {count} GPU(s) for {subject.ranks} ranks", "check CUDA_VISIBLE_DEVICES on this node")
    return ok(f"torch sees {count} GPU(s), CUDA {torch_cuda()}")
