"""Every launcher finishes a run over several hosts with the numbers of the same run on one host."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from harness import metrics
from hosts import NUM_STEPS, wait

pytestmark = [pytest.mark.slow, pytest.mark.dist]


def same_numbers(found, expected):
    """Losses and gradient norms of two runs in fp32, to 1e-5 relative."""
    assert [line["step"] for line in found] == list(range(1, NUM_STEPS + 1))
    for line, other in zip(found, expected, strict=True):
        for key in ("loss", "loss_forget", "loss_mismatch", "loss_retain", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=1e-5, abs=1e-9), key
        assert (line["tokens"], line["response_tokens"]) == (other["tokens"], other["response_tokens"])


def nodes(count):
    return [f"node{n}" for n in range(1, count + 1)]


@pytest.mark.parametrize("count", [2, 3])
def test_hostfile_over_ssh(cluster, one_node, tmp_path, count):
    code, output = cluster.run(
        "node1", ["bash", "launchers/hostfile.sh", cluster.hostfile(*nodes(count)), *cluster.flags(tmp_path / "out")]
    )
    assert code == 0, output
    same_numbers(metrics(tmp_path / "out"), one_node[count])


def test_the_deepspeed_launcher_itself(cluster, one_node, tmp_path):
    """As its users start it: without a script of ours, and so without what those add."""
    code, output = cluster.run("node1", [
        Path(sys.executable).parent / "deepspeed", "--quiet", "--hostfile", plain_hostfile(cluster),
        "--master_port", cluster.free_port(), "launchers/train.py", *cluster.flags(tmp_path / "out"),
    ], DS_ENV_FILE=str(deepspeed_env(cluster)))  # fmt: skip
    assert code == 0, output
    same_numbers(metrics(tmp_path / "out"), one_node[2])


def test_without_ssh(cluster, one_node, tmp_path):
    flags = cluster.flags(tmp_path / "out")
    hostfile, port = cluster.hostfile(*nodes(2)), cluster.free_port()
    processes = [
        cluster.start(node, ["bash", "launchers/no_ssh.sh", hostfile, *flags], MASTER_PORT=port) for node in nodes(2)
    ]
    assert [(code, output) for code, output in map(wait, processes) if code] == []
    same_numbers(metrics(tmp_path / "out"), one_node[2])


def test_torchrun(cluster, one_node, tmp_path):
    flags, port = cluster.flags(tmp_path / "out"), cluster.free_port()
    processes = [
        cluster.start(
            node, ["bash", "launchers/torchrun.sh", *flags],
            NNODES="2", NODE_RANK=str(rank), MASTER_ADDR="node1", MASTER_PORT=port,
        )
        for rank, node in enumerate(nodes(2))
    ]  # fmt: skip
    assert [(code, output) for code, output in map(wait, processes) if code] == []
    same_numbers(metrics(tmp_path / "out"), one_node[2])


def test_mpi(cluster, one_node, tmp_path):
    command = ["bash", "launchers/mpi.sh", cluster.hostfile(*nodes(2)), *cluster.flags(tmp_path / "out")]
    code, output = cluster.run("node1", command, MASTER_PORT=cluster.free_port())
    assert code == 0, output
    same_numbers(metrics(tmp_path / "out"), one_node[2])


def test_slurm(cluster, one_node, tmp_path):
    command = ["sbatch", "--wait", "--nodes", 2, "--output", tmp_path / "log", "launchers/slurm.sbatch"]
    code, _ = cluster.run("node1", [*command, *cluster.flags(tmp_path / "out")])
    assert code == 0, (tmp_path / "log").read_text()
    same_numbers(metrics(tmp_path / "out"), one_node[2])


def test_srun_alone(cluster, one_node, tmp_path):
    """A task a rank, without torchrun: the ranks read Slurm's variables."""
    command = ["srun", "--nodes", 2, "--ntasks-per-node", 1, sys.executable, "launchers/train.py"]
    code, output = cluster.run("node1", [*command, *cluster.flags(tmp_path / "out")])
    assert code == 0, output
    same_numbers(metrics(tmp_path / "out"), one_node[2])


def plain_hostfile(cluster):
    path = cluster.cache / "plain-hosts"
    path.write_text("node1 slots=1\nnode2 slots=1\n")
    return path


def deepspeed_env(cluster):
    """The variables of this test that DeepSpeed would not hand on, in its file."""
    environment = cluster.environment()
    names = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "UNLEARN_DS_CACHE", "TORCH_EXTENSIONS_DIR", "HF_HUB_OFFLINE", "PATH")
    path = cluster.cache / "deepspeed_env"
    path.write_text("".join(f"{name}={environment[name]}\n" for name in names if name in environment))
    return path
