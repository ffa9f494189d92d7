"""The doctor among ranks that a launcher has started: two processes that take each other for other nodes."""

import os
import socket
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def told(tmp_path_factory, repository):
    """Exit code and output of both ranks; the second was given another seed."""
    folder = tmp_path_factory.mktemp("doctor")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        **os.environ, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(repository), "TORCH_EXTENSIONS_DIR": str(folder / "ops"),
    }  # fmt: skip
    flags = ["--model", "org/name", "--output_dir", "out"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "unlearn_ds.doctor", *flags, "--seed", str(rank)], cwd=folder, text=True,
            env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert not list(folder.glob(".doctor*"))
    return [rank.returncode for rank in ranks], outputs


def test_both_nodes_stand_in_one_table_and_every_rank_has_the_same_exit_code(told):
    codes, (first, second) = told
    assert codes == [2, 2], first
    assert second == ""
    host = socket.gethostname()
    different = [line for line in first.splitlines() if line.startswith("fail") and "same run" in line]
    assert len(different) == 1 and f"{host}#1" in different[0] and "--seed 1 (others 0)" in different[0]
    fine = [line.split() for line in first.splitlines() if line.startswith("ok")]
    assert {"clocks", "shared", "main"} <= {words[1] for words in fine}
    assert "2 node(s)" in first.splitlines()[-1]


def test_the_network_is_measured_up_to_the_largest_size(told):
    lines = told[1][0].splitlines()
    start = lines.index("all-reduce over gloo among 2 ranks:")
    rows = [line.split() for line in lines[start + 1 : -1]]
    assert [" ".join(row[:2]) for row in rows][0] == "1 KiB" and len(rows) >= 2
    for row in rows:
        num_bytes = float(row[0]) * {"KiB": 2**10, "MiB": 2**20}[row[1]]
        seconds, bus = float(row[2]) / 1e3, float(row[5]) * 1e9
        if seconds > 0.001:  # two ranks move the whole size over each link
            assert bus == pytest.approx(num_bytes / seconds, rel=0.05, abs=5e5)  # three decimals of GB/s
