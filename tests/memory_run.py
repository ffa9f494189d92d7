"""Take steps on random models and report the memory they took, each in a process of its own; a script for tests.

On a CPU: resident size above that of a process which has run a tiny model before, so that libraries and autograd are
counted out. On a GPU: what the allocator has handed out.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import re
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from unlearn_ds import build, ds_json, engine
from unlearn_ds.arguments import parse
from unlearn_ds.config import RunConfig
from unlearn_ds.data.packing import Placed, pack
from unlearn_ds.reference import LiveReference
from unlearn_ds.types import EncodedRow, Term

TERMS = [Term("forget", "forget", "ce", -1.0), Term("retain", "retain", "kl", 1.0)]
WITHOUT_KL = [Term("forget", "forget", "ce", -1.0), Term("mismatch", "mismatch", "ce", 1.0)]
TINY = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 128}


def rows(num_rows: int, length: int, vocab: int) -> list[EncodedRow]:
    """Rows of one length, the second half of each an answer."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (num_rows, length), generator=draw).tolist()
    return [EncodedRow(tuple(row[: length // 2]), tuple(row[length // 2 :])) for row in ids]


def config_of(job: dict[str, Any], path: str) -> RunConfig:
    """The run of a job, for the plan and for the steps: as many forget rows as retain rows, all of one length."""
    flags = {"warmup_ratio": 0.0, "learning_rate": 1e-5, "eps_mismatch": 0.0, **job["flags"]}
    return parse({"model": path, "data.max_length": job["length"], "batch_size": job["rows"], **flags})


def held(device: torch.device, peak: bool = False) -> int:
    """Bytes held now, or the most since ``settle``."""
    if device.type != "cpu":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


def settle(device: torch.device) -> None:
    """Give freed memory back and forget earlier peaks."""
    if device.type != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    libc = ctypes.CDLL(None)
    # Blocks of 64 KiB and more go back to the kernel when they are freed, so that what is resident is what is held:
    # engine.start keeps them for speed.
    libc.mallopt(ctypes.c_int(-3), ctypes.c_int(2**16))
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def take_steps(folder: Path, job: dict[str, Any], device: torch.device) -> dict[str, int]:
    """Bytes that a model adds before its first step, and at the peak of its steps."""
    architecture = AutoConfig.for_model(**job["model"])
    with torch.device(device):
        whole = AutoModelForCausalLM.from_config(architecture, dtype=torch.bfloat16 if job["bf16"] else torch.float32)
    whole.save_pretrained(folder)
    del whole
    settle(device)
    before, config = held(device), config_of(job, str(folder))
    values = ds_json.load(config.engine.ds_config)
    if not job["bf16"]:
        values.pop("bf16", None)
    policy = build.policy(config, str(folder), values, device)
    reference_values = ds_json.for_reference(values, config.engine.reference, policy.model.config.hidden_size)
    frozen = build.load_model(config, str(folder), reference_values, device, policy.model.attention_name)
    head = policy.full_weight(policy.model.causal_lm.get_output_embeddings().weight)
    reference = LiveReference(engine.ReferenceEngine(frozen, reference_values).hidden_rows, head)
    batch = rows(2 * job["rows"], job["length"], policy.model.config.vocab_size)
    placed = [Placed(row, n // job["rows"], (-0.1, 0.2)[n // job["rows"]]) for n, row in enumerate(batch)]
    packed = pack(placed, TERMS).to(device)
    settle(device)
    built = held(device)
    for _ in range(job["steps"]):
        policy.backward(policy.loss(packed, reference.rows(packed)).loss)
        policy.step()
    return {"built": built - before, "peak": held(device, peak=True) - before}


def measure(job: dict[str, Any], port: int, path: Path) -> None:
    """One process: a tiny model to warm up, then the job."""
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    device = engine.start(parse({}).engine)
    with tempfile.TemporaryDirectory() as folder:
        take_steps(Path(folder, "tiny"), {**job, "model": {**job["model"], **TINY}, "length": 32}, device)
        path.write_text(json.dumps(take_steps(Path(folder, "model"), job, device)))


def main(jobs: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Jobs one after another. Processes are forked, so that they need not import all of this again; before that no
    tensor has been made and no thread started."""
    found = []
    for job in jobs:
        with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            process = multiprocessing.get_context("fork").Process(
                target=measure, args=(job, probe.getsockname()[1], Path(folder, "found.json"))
            )
            probe.close()
            process.start()
            process.join()
            found.append(json.loads(Path(folder, "found.json").read_text()))
    return found


if __name__ == "__main__":
    print("found", json.dumps(main(json.loads(sys.argv[1]))))
