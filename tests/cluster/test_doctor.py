"""What the doctor finds on real hosts, asked by a launcher: named, within its time, and no run starts."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.dist]
LONGEST = 30


def refused(cluster, out, *nodes, port=None, more=(), **variables):
    """What hostfile.sh says of a run that must not start."""
    hostfile = cluster.hostfile(*(nodes or ("node1", "node2")))
    command = ["bash", "launchers/hostfile.sh", hostfile, *cluster.flags(out, *more)]
    ports = {"MASTER_PORT": port} if port else {}
    code, output = cluster.run("node1", command, UNLEARN_DS_DOCTOR="on", **ports, **variables)
    assert code == 2, output
    assert not (out / "config.json").exists()
    (seconds,) = re.findall(r"node\(s\) in ([\d.]+) s", output)
    assert float(seconds) < LONGEST
    return " ".join(output.split())


def on(cluster, node, script):
    code, output = cluster.run(node, ["bash", "-euc", script])
    assert code == 0, output
    return output


def test_a_healthy_cluster_is_fine(cluster, tmp_path):
    command = [sys.executable, "-m", "unlearn_ds.doctor", "--hostfile", cluster.hostfile("node1", "node2", "node3")]
    code, output = cluster.run("node1", [*command, *cluster.flags(tmp_path / "out")])
    assert code == 0 and "0 problem(s)" in output, output


def test_ranks_of_slurm_examine_their_nodes(cluster, tmp_path):
    command = ["srun", "--nodes", 2, "--ntasks-per-node", 1, sys.executable, "-m", "unlearn_ds.doctor"]
    code, output = cluster.run("node1", [*command, *cluster.flags(tmp_path / "out")])
    assert code == 0 and "2 node(s)" in output, output


def test_a_stopped_sshd(cluster, tmp_path):
    os.kill(int((cluster.folder / "sshd2.pid").read_text()), signal.SIGTERM)
    try:
        said = refused(cluster, tmp_path / "out")
    finally:
        on(cluster, "node2", f"/usr/sbin/sshd -f {cluster.folder}/sshd2.conf")
    assert re.search(r"node2.{0,80}refused", said), said


@pytest.fixture
def unplugged(cluster):
    """node3 with its network down, for one test."""
    on(cluster, "node3", "ip link set eth0 down")
    yield
    on(cluster, "node3", "ip link set eth0 up")


def test_an_unreachable_host(cluster, tmp_path, unplugged):
    said = refused(cluster, tmp_path / "out", "node1", "node3")
    assert re.search(r"node3.{0,120}(no route|time|unreachable|answer)", said, re.IGNORECASE), said


def test_another_version_on_one_node(cluster, tmp_path):
    """The metadata of one package, mounted over in the view that node2 has of the disk."""
    (path,) = (file for file in metadata.files("safetensors") if file.name == "METADATA")
    real, other = Path(path.locate()), tmp_path / "METADATA"
    version = metadata.version("safetensors")
    other.write_text(real.read_text().replace(f"Version: {version}", "Version: 0.0.1", 1))
    on(cluster, "node2", f"mount --bind {other} {real}")
    try:
        said = refused(cluster, tmp_path / "out")
    finally:
        on(cluster, "node2", f"umount {real}")
    assert "safetensors" in said and "0.0.1" in said and version in said and "node2" in said, said


def test_a_full_disk(cluster):
    small = cluster.folder / "small"
    on(cluster, "node1", f"head -c 7M /dev/zero > {small}/full")
    try:
        said = refused(cluster, small / "out", more=("--save_every", 2))
    finally:
        on(cluster, "node1", f"rm {small}/full")
    assert re.search(rf"fail free disk.{{0,200}}{small}", said), said


def test_a_busy_port(cluster, tmp_path):
    port = cluster.free_port()
    busy = cluster.start("node1", [sys.executable, "-c", LISTEN, port])
    assert busy.stdout.readline() == "up\n"
    try:
        said = refused(cluster, tmp_path / "out", port=port)
    finally:
        busy.kill()
        busy.communicate()
    assert re.search(rf"node1.{{0,200}}{port}", said), said


def test_a_stale_lock(cluster, tmp_path):
    hours_ago = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() - 7200))
    ops = cluster.folder / "own" / "ops"
    on(cluster, "node2", f"mkdir -p {ops}/fused && touch -d '{hours_ago}' {ops}/fused/lock")
    try:
        said = refused(cluster, tmp_path / "out", TORCH_EXTENSIONS_DIR=str(ops))
    finally:
        on(cluster, "node2", f"rm -r {ops}")
    assert re.search(rf"node2.{{0,200}}{ops}/fused/lock", said), said


LISTEN = """
import socket, sys, time
server = socket.socket()
server.bind(("", int(sys.argv[1])))
server.listen()
print("up", flush=True)
time.sleep(600)
"""
