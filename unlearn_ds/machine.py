"""Memory of this machine, as much of it as the control group of this process may use. Needs no torch."""

from __future__ import annotations

from pathlib import Path


def host_bytes(free: bool = False) -> int:
    """Host memory in all, or what is available now."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    there = {words[0]: int(words[1]) * 1024 for words in lines}
    return min([there["MemAvailable:" if free else "MemTotal:"], *_group_limits()])


def _group_limits() -> list[int]:
    """Bytes that this process's control group and those above it allow; empty without any limit."""
    limits = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, name = Path("/sys/fs/cgroup") / controllers, "memory.limit_in_bytes" if controllers else "memory.max"
        # Inside a container the path may be one of the host, and the group of the container is the root.
        for folder in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
            if folder.is_relative_to(root) and (folder / name).is_file():
                limits.append((folder / name).read_text().strip())
    return [int(text) for text in limits if text.isdigit()]
