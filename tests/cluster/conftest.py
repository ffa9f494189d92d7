"""A cluster of three hosts, and what the same run gives on one of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import metrics
from hosts import NUM_NODES, Cluster

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Cluster]:
    """Three nodes with sshd and Slurm; skips, with the reason, where they cannot be made."""
    missing = [name for name in ("unshare", "nsenter", "apt-get") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"hosts on one machine need root and Linux's namespaces (missing: {missing})")
    packages = subprocess.run(["bash", HERE / "packages.sh"], capture_output=True, text=True)
    if packages.returncode:
        pytest.skip(packages.stderr.strip())
    probe = ["unshare", "--net", "--uts", "--mount", "ip", "link", "add", "probe", "type", "bridge"]
    tried = subprocess.run(probe, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no namespaces with bridges on this machine: {tried.stderr.strip()}")
    # Test processes that run side by side have a network each.
    subnet = 64 + os.getpid() % 128
    # Not pytest's folder: the path of a Unix socket may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="cluster-"))
    up = subprocess.run(
        ["bash", HERE / "up.sh", folder, str(NUM_NODES), str(subnet)], capture_output=True, text=True, timeout=120
    )
    assert up.returncode == 0, up.stderr
    yield Cluster(folder, tmp_path_factory.mktemp("cluster"), tiny_model_dir, subnet)
    subprocess.run(["bash", HERE / "down.sh", folder], check=True, timeout=60)


@pytest.fixture(scope="session")
def one_node(cluster: Cluster) -> dict[int, list[dict[str, Any]]]:
    """Metrics of the same run with 2 and with 3 ranks on one node, started by the ``deepspeed`` launcher."""
    found = {}
    for num_ranks in (2, 3):
        out = cluster.cache / f"one-node-{num_ranks}"
        code, output = cluster.run("node1", [
            Path(sys.executable).parent / "deepspeed", "--quiet", "--num_accelerators", num_ranks,
            "launchers/train.py", *cluster.flags(out),
        ])  # fmt: skip
        assert code == 0, output
        found[num_ranks] = metrics(out)
    return found
