"""One process that takes steps on a random model and reports the memory they took; run as a script by tests.

On a CPU: resident size above that of a process which has run another, tiny model before, so that libraries, thread
pools and autograd are counted out. On a GPU: what the allocator handed out.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from unlearn_ds import build, ds_json, engine
from unlearn_ds.arguments import parse
from unlearn_ds.build import load_model
from unlearn_ds.data.packing import Placed, kl_part, pack
from unlearn_ds.reference import LiveReference
from unlearn_ds.types import EncodedRow, Term

TERMS = [Term("forget", "forget", "ce", -1.0), Term("retain", "retain", "kl", 1.0)]

WITHOUT_KL = [Term("forget", "forget", "ce", -1.0), Term("mismatch", "mismatch", "ce", 1.0)]


def rows(num_rows: int, length: int, vocab: int) -> list[EncodedRow]:
    """Rows of one length, the second half of each an answer."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (num_rows, length), generator=draw).tolist()
    return [EncodedRow(tuple(row[: length // 2]), tuple(row[length // 2 :])) for row in ids]


def resident(field: str) -> int:
    """Bytes of VmRSS or, since the last reset, of its peak VmHWM."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) * 1024


def settle() -> None:
    """Give freed memory back and forget earlier peaks."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def take_steps(folder: Path, job: dict[str, Any], device: torch.device) -> dict[str, int]:
    """Bytes before the model, with it, and at the peak of its steps."""
    settle()
    before = resident("VmRSS") if device.type == "cpu" else torch.cuda.memory_allocated()
    config = parse({"model": str(folder), "warmup_ratio": 0.0, "learning_rate": 1e-5, **job["flags"]})
    values = ds_json.load(config.engine.ds_config)
    policy = build.policy(config, str(folder), values, device)
    reference_values = ds_json.for_reference(values, config.engine.reference, policy.model.config.hidden_size)
    frozen = load_model(config, str(folder), reference_values, device, policy.model.attention_name)
    head = policy.full_weight(policy.model.causal_lm.get_output_embeddings().weight)
    reference = LiveReference(engine.ReferenceEngine(frozen, reference_values).hidden_rows, head)
    settle()
    built = resident("VmRSS") if device.type == "cpu" else torch.cuda.memory_allocated()
    placed = rows(job["num_rows"], job["length"], policy.model.config.vocab_size)
    batch = pack(
        [Placed(row, n % 2, (-0.1, 0.2)[n % 2]) for n, row in sorted(enumerate(placed), key=lambda x: x[0] % 2)], TERMS
    )
    batch = batch.to(device)
    assert kl_part(batch).num_tokens < batch.num_tokens
    for _ in range(job["steps"]):
        policy.backward(policy.loss(batch, reference.rows(batch)).loss)
        policy.step()
    peak = resident("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated()
    policy.close()
    return {"before": before, "built": built - before, "peak": peak - before, "tokens": batch.num_tokens}


def main(folder: Path, jobs: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Each job on a device that a tiny model has warmed up."""
    device = engine.start(parse({}).engine)
    found = []
    for n, job in enumerate(
        [
            {
                **jobs[0],
                "model": {**jobs[0]["model"], "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64},
            },
            *jobs,
        ]
    ):
        path = folder / str(n)
        architecture = AutoConfig.for_model(**job["model"])
        with torch.device(device):
            AutoModelForCausalLM.from_config(
                architecture, dtype=torch.bfloat16 if job.get("bf16") else None
            ).save_pretrained(path)
        found.append(take_steps(path, job, device))
    return found[1:]


if __name__ == "__main__":
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": sys.argv[1],
    }
    torch.set_num_threads(1)
    print("found", json.dumps(main(Path(sys.argv[2]), json.loads(sys.argv[3]))))
