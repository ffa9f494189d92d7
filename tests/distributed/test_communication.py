"""The traffic that the cost model predicts is what four ranks count, hpZ included."""

from __future__ import annotations

import json
import os
import socket

import memory_run
import pytest
import torch
from collectives import Counter
from transformers import LlamaConfig, LlamaForCausalLM

from unlearn_ds import build, dist, ds_json, engine, sizing
from unlearn_ds.arguments import parse
from unlearn_ds.cost.communication import communication, total
from unlearn_ds.data.packing import Placed, pack
from unlearn_ds.reference import LiveReference
from unlearn_ds.sizing import Machine

pytestmark = [pytest.mark.dist, pytest.mark.slow]
WORLD, STEPS = 4, 3
FAR = {"stage3_max_reuse_distance": 1000}
"""So that weights of a small model are let go between forward and backward, as those of a large one are."""
RUNS = {
    "gathered again": ("zero3", FAR, {}),
    "checkpointing": ("zero3", FAR, {"activation_checkpointing": True, "gradient_accumulation_steps": 2}),
    "reference": ("zero3", {**FAR, "stage3_prefetch_bucket_size": 0}, {"reference": "resident"}),
    "hpz": ("zero3_hpz", FAR, {"gradient_accumulation_steps": 2}),
    "adapters": ("zero3", {}, {"lora_rank": 4}),
    "zero2": ("zero2", {}, {"gradient_accumulation_steps": 2}),
    "zero0": ("zero0", {}, {"gradient_accumulation_steps": 2}),
}
"""Name -> configuration, changes to its ZeRO section, flags."""


def values_of(name, folder):
    """A configuration in fp32, written down where a flag can name it."""
    ds_config, zero, flags = RUNS[name]
    values = {key: value for key, value in ds_json.load(ds_config).items() if key != "bf16"}
    values["zero_optimization"] |= zero
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    flags = {
        "warmup_ratio": 0.0,
        "num_mismatch": 1,
        "reference": "adapter" if "lora_rank" in flags else "cached",
        **flags,
    }
    return values, parse({"model": str(folder / "model"), "ds_config": str(path), **flags})


def counted(name, folder, device, counter):
    """What rank 0 counts in the last of a few steps."""
    values, config = values_of(name, folder)
    policy = build.policy(config, config.model.path, values, device)
    reference = None
    if config.engine.reference == "resident":
        frozen_values = ds_json.for_reference(values, "resident", policy.model.config.hidden_size)
        frozen = build.load_model(config, config.model.path, frozen_values, device, policy.model.attention_name)
        head = policy.full_weight(policy.model.causal_lm.get_output_embeddings().weight)
        reference = LiveReference(engine.ReferenceEngine(frozen, frozen_values).hidden_rows, head)
    terms = memory_run.TERMS if reference else memory_run.WITHOUT_KL
    batch = pack([Placed(row, n // 2, (-0.1, 0.2)[n // 2]) for n, row in enumerate(memory_run.rows(4, 16, 97))], terms)
    for _ in range(STEPS):
        counter.reset()
        for _ in range(config.optim.gradient_accumulation_steps):
            policy.backward(policy.loss(batch, reference.rows(batch) if reference else None).loss)
            policy.step()
    found = counter.taken()
    policy.close()
    return found


def worker(rank, folder, port):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    torch.set_num_threads(1)
    counter = Counter()
    device = engine.start(parse({}).engine)
    found = {name: counted(name, folder, device, counter) for name in RUNS}
    if dist.is_main():
        (folder / "found.json").write_text(json.dumps(found))
    dist.shutdown()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("communication")
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (folder, port), nprocs=WORLD)
    return folder, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_bytes_and_calls_are_those_that_ranks_count(found, name):
    folder, counts = found
    _, config = values_of(name, folder)
    shape, num_adapter = sizing.shape_of(config)
    ranks = Machine(nodes=WORLD // 2, ranks_per_node=2, device_bytes=None, host_bytes=None)
    volumes = communication(shape, sizing.setup_of(config, shape, num_adapter, ranks))
    operations = {
        "all_gather": "all_gather_into_tensor",
        "reduce_scatter": "reduce_scatter_tensor",
        "all_reduce": "all_reduce",
    }
    for operation, function in operations.items():
        for group, size in (("world", WORLD), ("node", 2)):
            num_bytes, calls = counts[name].get(f"{function}@{size}", (0, 0))
            if num_bytes > 64:  # less is a norm, or whether it is finite
                assert total(volumes, operation, group) == pytest.approx(num_bytes, rel=0.02), (operation, group)
            else:
                assert total(volumes, operation, group) == 0
            if operation == "all_gather" and not num_adapter:
                predicted = sum(v.calls for v in volumes if (v.operation, v.group) == (operation, group))
                assert predicted == pytest.approx(calls, rel=0.02)
    assert total(volumes) > 0
