"""What the reference modes hold, counted in processes that build policy and reference as a run does."""

from __future__ import annotations

import gc
import json
import os
import socket
from pathlib import Path

import pytest
import torch
from harness import ds_config, write_data
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.dist
BLOCK, STEPS = 2**20, 10


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory, random_llama_dir):
    """Weights of one MiB and more, which is what DeepSpeed takes to disk, and small ones beside them."""
    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(random_llama_dir).save_pretrained(folder)
    return folder


def built(rank, port, folder, model, flags):
    """One process: build policy and reference, take ten steps, and write down what is there."""
    os.environ |= {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu", "UNLEARN_DS_CACHE": f"{folder}/cache",
    }  # fmt: skip
    from unlearn_ds import arguments, build, dist, ds_json, engine
    from unlearn_ds.data.encode import Encoder
    from unlearn_ds.model import load_tokenizer
    from unlearn_ds.registry import SCENARIOS, resolve

    device = engine.start(engine.EngineConfig())
    config = arguments.parse({
        "model": model, "forget_data": f"{folder}/forget.jsonl", "retain_data": f"{folder}/retain.jsonl",
        "batch_size": 4, "learning_rate": 1e-3, "warmup_ratio": 0, **flags,
    })  # fmt: skip
    values = ds_json.load(ds_config(Path(folder), 3))
    build.check_offload(config, values)
    data = resolve("scenario", "hallucination", SCENARIOS).load(config, encoder := Encoder(load_tokenizer(model)))
    batches = build.loader(config, encoder, data, data.forget["train"])
    policy = build.policy(config, model, values, device)
    before = {n: policy.full_weight(p) for n, p in policy.model.causal_lm.named_parameters()}
    reference = build.reference(config, model, values, policy, batches)
    held = num_bytes_of_tensors() - sum(weight.nbytes for weight in before.values())
    kl, losses = [], []
    for step in range(STEPS):
        (batch,) = batches.micro_batches(step)
        output = policy.loss(batch, reference.rows(batch))
        policy.backward(output.loss)
        policy.step()
        losses.append(float(output.loss))
        kl.append(output.loss_N[-batch.num_kl_rows :].tolist())
    after = {n: policy.full_weight(p) for n, p in policy.model.causal_lm.named_parameters()}
    changed = [name for name, weight in after.items() if not torch.equal(weight, before[name])]
    files = [path.stat().st_size for path in Path(folder).rglob("*.swp")]
    found = {"held": held, "kl": kl, "losses": losses, "changed": changed, "all": list(before), "files": files}
    Path(folder, "found.json").write_text(json.dumps(found))
    dist.shutdown()


def num_bytes_of_tensors():
    """Bytes of every storage that a live tensor of this process refers to."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.device.type == "cpu"]
    # The partition of a sharded parameter is an attribute of it that the collector does not list by itself.
    tensors += [t.ds_tensor for t in tensors if "ds_tensor" in vars(t) and t.ds_tensor is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.fixture
def found(tmp_path, wide_model):
    def of(**flags):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        write_data(folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        flags = {name: str(folder) if value is Path else value for name, value in flags.items()}
        torch.multiprocessing.spawn(built, (port, str(folder), str(wide_model), flags), nprocs=1)
        assert not list(folder.rglob("*.swp"))  # a run cleans up after itself
        return json.loads((folder / "found.json").read_text())

    return of


def num_bytes(folder):
    return (folder / "model.safetensors").stat().st_size


def test_the_adapter_reference_holds_no_second_model_and_trains_adapters_only(found, wide_model):
    """The published code keeps a second whole model with LoRA as well (D20)."""
    adapter, resident = found(lora_rank=2), found(lora_rank=2, reference="resident")
    assert num_bytes(wide_model) < adapter["held"] < 1.3 * num_bytes(wide_model)
    assert resident["held"] > adapter["held"] + 0.95 * num_bytes(wide_model)
    assert adapter["kl"][0] == [0.0] * len(adapter["kl"][0])
    assert adapter["kl"][1] == pytest.approx(resident["kl"][1], rel=1e-4, abs=1e-7)
    for result in (adapter, resident):
        assert result["changed"] and all(".lora_" in name for name in result["changed"])
        assert [name for name in result["all"] if ".lora_B." in name] == [
            name for name in result["changed"] if ".lora_B." in name
        ]


def test_the_reference_on_disk_is_read_from_there_and_gives_the_same_losses(found, wide_model):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed's async_io needs libaio and its headers")
    offload = found(reference="offload")
    disk = found(reference="nvme", **{"engine.nvme_path": Path})
    model = LlamaForCausalLM.from_pretrained(wide_model)
    large = sorted(p.nbytes for p in model.parameters() if p.nbytes >= BLOCK)
    assert len(large) > 8 and sorted(disk["files"]) == large and offload["files"] == []
    assert disk["losses"] == pytest.approx(offload["losses"], rel=1e-5)
    assert disk["kl"] == [pytest.approx(kl, rel=1e-5, abs=1e-7) for kl in offload["kl"]]
    assert max(disk["kl"][0]) == 0 and max(disk["kl"][-1]) > 1e-3
