"""The memory plan against what steps on random models take: resident size on a CPU, the allocator's peak on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import memory_run
import pytest
import torch

from unlearn_ds import sizing, workspace
from unlearn_ds.cost import shapes
from unlearn_ds.cost.memory import memory_plan
from unlearn_ds.sizing import Machine

SCRIPT = Path(memory_run.__file__)
SMALL = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 5,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
"""20M parameters. Rows are longer than attention on a CPU keeps scores of (``attention.SHORT``)."""
LARGE = {
    "1b": {**SMALL, "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
    "7b": dict(shapes.PUBLIC["meta-llama/Llama-2-7b-hf"]),
}


def job(ds_config, checkpointing, reference, model=SMALL, rows=1, length=264, bf16=False):
    flags = {"ds_config": ds_config, "activation_checkpointing": checkpointing, "reference": reference}
    return {"model": model, "flags": flags, "rows": rows, "length": length, "steps": 2, "bf16": bf16}


def planned(job, device_bytes=None):
    """The plan of a job on one rank."""
    shape, config = shapes.of_values(job["model"]), memory_run.config_of(job, "model")
    setup = sizing.setup_of(config, shape, 0, Machine(1, 1, device_bytes, None))
    if not job["bf16"]:
        setup = setup._replace(bytes_per_weight=4, workspace_bytes=workspace.num_bytes(0, "cpu", is_bf16=False))
    return memory_plan(shape, setup)


def measured(jobs):
    command = [sys.executable, "-W", "ignore", SCRIPT, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("found "))
    return json.loads(line.removeprefix("found "))


@pytest.mark.dist
@pytest.mark.slow
def test_the_plan_is_what_a_process_takes():
    """Within 10 %: for 20M parameters in fp32 the plan was 0.5 to 5.4 % above the measured, at stages 2 and 3, with
    kept activations and with checkpointing. On a CPU what is offloaded lies in the same memory, so device and host are
    added up."""
    jobs = [job("zero3", False, "resident"), job("zero2", True, "offload")]
    for one, found in zip(jobs, measured(jobs), strict=True):
        plan = planned(one)
        assert plan.peak("device") + plan.peak("host") == pytest.approx(found["peak"], rel=0.1), one["flags"]
        assert found["built"] > 3 * 4 * shapes.of_values(SMALL).total  # weights, gradients, reference


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("size", "ds_config", "checkpointing", "reference"),
    [
        ("1b", "zero3", False, "resident"), ("1b", "zero2", True, "offload"), ("7b", "zero3_offload", True, "offload"),
        ("7b", "zero2_offload", True, "resident"),
    ],
)  # fmt: skip
def test_the_plan_is_what_a_gpu_takes(size, ds_config, checkpointing, reference):
    """Within 10 % of the allocator's peak, which knows nothing of the CUDA context."""
    one = job(ds_config, checkpointing, reference, LARGE[size], rows=4, length=512, bf16=True)
    (found,) = measured([one])
    plan = planned(one, torch.cuda.get_device_properties(0).total_memory)
    assert plan.peak() - plan.of("CUDA context") == pytest.approx(found["peak"], rel=0.1)
