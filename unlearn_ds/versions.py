"""What code and which packages a run is made of. Nothing here imports torch: versions are read, not asked for."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from unlearn_ds import __version__

HERE = Path(__file__).parent


def package_versions() -> dict[str, str]:
    """Versions of what decides the numbers of a run."""
    names = ("torch", "transformers", "datasets", "safetensors", "tokenizers", "numpy", "peft")
    return {"unlearn_ds": __version__, "python": platform.python_version(), **{n: metadata.version(n) for n in names}}


def installed(name: str) -> str:
    """Version of an installed package, "none" without it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def commit() -> str | None:
    """Git commit of the source, with a mark when it has local changes; None for an installed wheel."""
    run = {"cwd": HERE, "capture_output": True, "text": True, "timeout": 10}
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run)
        if head.returncode:
            return None
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], **run)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def code_digest(folder: Path = HERE) -> str:
    """Short hash of every source file of the package: two trees at one commit may hold different changes."""
    digest = hashlib.sha256()
    linked = [folder / "kernels", folder / "ds_configs"]  # links, which a glob does not follow
    files = [p for root in (folder, *linked) for suffix in ("py", "json") for p in root.rglob(f"*.{suffix}")]
    for path in sorted(set(files)):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
