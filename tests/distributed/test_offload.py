"""States kept outside the device give the losses of states kept on it, for each configuration that ships."""

from __future__ import annotations

import json
import os
import socket

import pytest
import torch
from architectures import CONFIGS, make_rows, save
from collectives import Counter

from unlearn_ds import build, dist, ds_json, engine, sizing
from unlearn_ds.arguments import parse
from unlearn_ds.cost.communication import communication, total
from unlearn_ds.data.packing import Placed, pack
from unlearn_ds.sizing import Machine
from unlearn_ds.types import Term

pytestmark = [pytest.mark.dist, pytest.mark.slow]
WORLD, STEPS = 2, 5
TERMS = [Term("forget", "forget", "ce", -1.0), Term("mismatch", "mismatch", "ce", 1.0)]
PAIRS = {
    "zero2_offload": "zero2", "zero3_offload": "zero3", "zero3_offload_params": "zero3", "zero3_hpz": "zero3",
    "zero3_gloo": "zero3",
}  # fmt: skip
"""Configuration -> the one whose losses it has to give."""


def config_of(folder, **flags):
    """A run with accumulation, clipping and weight decay."""
    return parse({
        "model": str(folder / "llama"), "learning_rate": 1e-2, "max_steps": STEPS, "warmup_ratio": 0.0,
        "weight_decay": 0.1, "gradient_clipping": 0.5, "gradient_accumulation_steps": 2, "reference": "cached", **flags,
    })  # fmt: skip


def losses(name, folder, device, counter, **flags):
    """Loss and gradient norm of a few steps in fp32, and what the last step sends."""
    config = config_of(folder, **flags)
    values = {key: value for key, value in ds_json.load(name).items() if key not in ("bf16", "communication_data_type")}
    policy, found = build.policy(config, config.model.path, values, device), []
    rows = make_rows()
    for _ in range(STEPS):
        counter.reset()
        for half in (rows[::2], rows[1::2]):
            placed = [Placed(row, n % 2, (-0.1, 0.2)[n % 2]) for n, row in enumerate(half[:: dist.rank() + 1])]
            output = policy.loss(pack(placed, TERMS), None)
            policy.backward(output.loss)
            result = policy.step()
        found.append([float(output.loss), result.grad_norm])
    counted = counter.taken()
    policy.close()
    return {"losses": found, "counted": counted}


def worker(rank, folder, port):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    from deepspeed.ops.op_builder import AsyncIOBuilder

    torch.set_num_threads(1)
    counter = Counter()
    device = engine.start(parse({}).engine)
    found = {name: losses(name, folder, device, counter) for name in sorted({*PAIRS, *PAIRS.values()})}
    if AsyncIOBuilder().is_compatible():
        found["zero3_nvme"] = losses("zero3_nvme", folder, device, counter, **{"engine.nvme_path": str(folder)})
    if dist.is_main():
        (folder / "found.json").write_text(json.dumps(found))
    dist.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    save(CONFIGS["llama"](), folder / "llama")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (folder, port), nprocs=WORLD)
    return folder, json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def found(run):
    return run[1]


def test_the_steps_change_the_loss_and_are_clipped(found):
    losses, norms = zip(*found["zero3"]["losses"], strict=True)
    assert abs(losses[-1] - losses[0]) > 1e-2 and max(norms) > 0.5


@pytest.mark.parametrize("name", [*PAIRS, "zero3_nvme"])
def test_a_configuration_at_scale_gives_the_losses_of_the_plain_one(found, name):
    if name not in found:
        pytest.skip("DeepSpeed's async_io needs libaio and its headers")
    expected = found[PAIRS.get(name, "zero3")]["losses"]
    assert found[name]["losses"] == [pytest.approx(step, rel=1e-5, abs=1e-7) for step in expected]


@pytest.mark.parametrize("name", ["zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_offload_params"])
def test_two_ranks_send_what_the_cost_model_says(run, name):
    folder, found = run
    config = config_of(folder, ds_config=name)
    shape, _ = sizing.shape_of(config)
    setup = sizing.setup_of(config, shape, 0, Machine(1, WORLD, None, None))._replace(bytes_per_weight=4)
    counted = {key.split("@")[0]: num_bytes for key, (num_bytes, _) in found[name]["counted"].items() if num_bytes > 64}
    volumes = communication(shape, setup)
    assert total(volumes) == pytest.approx(sum(counted.values()), rel=0.02)
    assert total(volumes, "all_gather") == pytest.approx(counted["all_gather_into_tensor"], rel=0.02)
