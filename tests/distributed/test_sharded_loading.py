"""Architectures through the engine on two ranks: loaded sharded, trained a step, exported, loaded by transformers."""

from __future__ import annotations

import json
import os
import socket

import pytest
import real_tokenizers
import torch
from architectures import CONFIGS, make_rows, padded_nll, save
from transformers import AutoModelForCausalLM

from unlearn_ds import build, dist, ds_json, engine, export
from unlearn_ds.arguments import parse
from unlearn_ds.data.packing import Placed, pack, pack_scored
from unlearn_ds.model import load_tokenizer
from unlearn_ds.types import Term

pytestmark = [pytest.mark.dist, pytest.mark.slow]
WORLD = 2
FORMATS = {
    "opt_350m": "bin", "gpt2": "safetensors", "llama": "sharded", "mistral_window": "safetensors",
    "qwen3": "sharded", "gemma2": "safetensors", "gemma3": "bin", "gpt_neox": "safetensors", "phi3": "safetensors",
}  # fmt: skip
"""Architecture -> file format it is loaded from."""
GENERATION = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def prompts():
    """Left-padded prompts [B, L] and their mask."""
    rows = [row.prompt_ids for row in make_rows()]
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(p)) + list(p) for p in rows]
    return torch.tensor(ids), torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in rows])


def measure(policy):
    """NLL of each answer token and greedy answers of the weights as they are, in step on all ranks."""
    ids, mask = prompts()
    with policy.evaluation_model("never") as (model, synced), torch.no_grad():
        nll = -model(pack_scored(make_rows()))[0]
        with model.generating() as causal_lm:
            answers = causal_lm.generate(ids, attention_mask=mask, synced_gpus=synced, **GENERATION)
    return {"nll": nll.tolist(), "answers": answers[:, ids.shape[1] :].tolist()}


def train_and_export(name, folder, device):
    """One step of ascent on a model loaded from ``folder``; what it said before, after, and as a whole copy."""
    config = parse({"model": str(folder / name), "learning_rate": 1e-2, "max_steps": 1, "warmup_ratio": 0.0})
    values = ds_json.load("zero3_fp32")
    policy = build.policy(config, config.model.path, values, device)
    parts = [(parameter.ds_tensor.numel(), parameter.ds_numel) for parameter in policy.model.parameters()]
    before = measure(policy)
    batch = pack([Placed(row, 0, -0.1) for row in make_rows()], [Term("forget", "forget", "ce", -1.0)])
    policy.backward(policy.loss(batch, None).loss)
    result = policy.step()
    after = measure(policy)
    with policy.evaluation_model("always") as (whole, _), torch.no_grad():
        copied = (-whole(pack_scored(make_rows()))[0]).tolist()
    export.whole_model(policy, folder / f"{name}-exported", load_tokenizer(str(folder / "tokenizer")), "# Card\n")
    policy.close()
    return {"parts": parts, "grad_norm": result.grad_norm, "before": before, "after": after, "copied": copied}


def worker(rank, folder, port):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    torch.set_num_threads(1)
    device = engine.start(parse({}).engine)
    found = {name: train_and_export(name, folder, device) for name in FORMATS}
    if dist.is_main():
        (folder / "found.json").write_text(json.dumps(found))
    dist.shutdown()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    real_tokenizers.build("opt", folder / "tokenizer")
    for name, file_format in FORMATS.items():
        save(CONFIGS[name](), folder / name, file_format)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (folder, port), nprocs=WORLD)
    return folder, json.loads((folder / "found.json").read_text())


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def said(model):
    ids, mask = prompts()
    nll = torch.cat(padded_nll(model, make_rows()))
    return nll.tolist(), model.generate(ids, attention_mask=mask, **GENERATION)[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_loaded_in_parts_is_the_one_that_was_saved(trained, name):
    folder, found = trained
    assert all(2 * part - whole in (0, 1) for part, whole in found[name]["parts"]) and found[name]["parts"]
    nll, answers = said(plain(folder / name))
    assert found[name]["before"]["nll"] == pytest.approx(nll, rel=1e-4, abs=1e-5)
    assert found[name]["before"]["answers"] == answers


@pytest.mark.parametrize("name", FORMATS)
def test_an_exported_model_says_what_the_engine_said(trained, name):
    folder, found = trained
    before, after = found[name]["before"], found[name]["after"]
    assert found[name]["grad_norm"] > 0
    assert sum(after["nll"]) > sum(before["nll"]) + 1  # the ascent has done something
    nll, answers = said(plain(folder / f"{name}-exported"))
    assert after["nll"] == pytest.approx(nll, rel=1e-4, abs=1e-5) == found[name]["copied"]
    assert after["answers"] == answers


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_keeps_names_shapes_and_ties(trained, name):
    folder, _ = trained
    original, exported = plain(folder / name), plain(folder / f"{name}-exported")
    assert {n: p.shape for n, p in original.named_parameters()} == {n: p.shape for n, p in exported.named_parameters()}
    assert exported.config.tie_word_embeddings == original.config.tie_word_embeddings
    assert (folder / f"{name}-exported" / "README.md").read_text() == "# Card\n"


def test_an_exported_tokenizer_is_the_one_of_the_model(trained):
    folder, _ = trained
    one, two = (load_tokenizer(str(folder / place)) for place in ("tokenizer", "llama-exported"))
    assert one("### Question: Where?")["input_ids"] == two("### Question: Where?")["input_ids"]
