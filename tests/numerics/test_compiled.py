"""What the Triton kernels become on GPUs that are not here: compiled ahead of time, nothing runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "ahead_of_time.py"
CAPABILITIES = (80, 86, 89, 90, 100)
KERNELS = {
    "cross_entropy": 8, "cross_entropy_capped_smoothed": 8, "forward_kl": 16, "forward_kl_capped": 16, "statistics": 4,
    "scale": 4,
}  # fmt: skip
"""Kernel -> loads of 16 bytes a thread: 4 for each stream of logits and each sweep over it."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict]:
    environment = {
        **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": str(SCRIPT.parents[1]),
    }
    command = [sys.executable, str(SCRIPT), *map(str, CAPABILITIES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {(line["kernel"], line["capability"]): line for line in found}


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_spilled_and_loads_are_wide(compiled, kernel, capability):
    line = compiled[kernel, capability]
    assert line["stack"] == line["STL"] == line["LDL"] == 0, line
    assert line["LDG.128"] >= KERNELS[kernel], line
    assert line["STG"] > 0, line
    if kernel != "scale":
        # Sums over a row go through shared memory. 16 warps of 128 registers fill a multiprocessor.
        assert line["MUFU.EX2"] > 0 and line["BAR"] > 0 and line["registers"] <= 128, line
