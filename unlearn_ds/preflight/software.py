"""Versions on this node: of Python, of what a run stands on, and of this code."""

from __future__ import annotations

import platform

from unlearn_ds import versions
from unlearn_ds.preflight.findings import Finding, Subject, fail, ok

PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "peft", "safetensors", "tokenizers", "numpy")


def facts(subject: Subject) -> dict[str, str]:
    """What must be the same on every node."""
    return {
        "python": platform.python_version(), **{name: versions.installed(name) for name in PACKAGES},
        "unlearn_ds": versions.__version__, "commit": versions.commit() or "none", "code": versions.code_digest(),
    }  # fmt: skip


def installed(subject: Subject) -> Finding:
    """Whether the packages are there at all."""
    missing = [name for name in PACKAGES if versions.installed(name) == "none"]
    if missing:
        return fail(f"not installed here: {', '.join(missing)}", "pip install -c constraints.txt -e . on this node")
    shown = ("torch", "transformers", "deepspeed")
    return ok(
        f"Python {platform.python_version()}, {', '.join(f'{name} {versions.installed(name)}' for name in shown)}, "
        f"commit {versions.commit() or 'none'}"
    )
