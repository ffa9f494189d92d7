"""The five homes of the frozen reference on the same rows, one after another, each in a process of its own.

    python kernels/bench/reference_modes.py [--model FOLDER] [--rank 16] [--steps 6] [--forget 8] [--num_mismatch 5]
                                            [--modes resident,offload,nvme,cached,adapter] [--nvme_path FOLDER]
                                            [--ds_config zero3] [--activation_checkpointing] [--output FILE.csv]

Every mode is run with all weights trained and with LoRA, ``adapter`` with LoRA only. Reported: parameters trained, peak
memory of the process (of the device where there is one), median seconds of a step after warm-up, and the largest
difference of a step's KL to ``resident`` with the same parameters trained. Rows are those of the embedded sample. The
cached reference is computed before the first step, into a cache of its own; that time stands in a column.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from tqdm import tqdm

WARM_UP = 2
MODES = ("resident", "offload", "nvme", "cached", "adapter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--which", help="run MODE,RANK alone and print its result as JSON")
    parser.add_argument("--model", help="folder or hub id; default: the embedded model")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps, warm-up included")
    parser.add_argument("--forget", type=int, default=8, help="forget rows a step; as many retain rows")
    parser.add_argument("--num_mismatch", type=int, default=5, help="mismatch answers for each forget row")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="constant; large enough for a KL to compare")
    parser.add_argument("--modes", default=",".join(MODES), help="which modes; resident is what others compare with")
    parser.add_argument("--nvme_path", help="folder on a local disk; default: the system's folder of temporary files")
    parser.add_argument("--ds_config", default="zero3", help="name or path of a DeepSpeed JSON")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--output", help="CSV file for the results")
    options = parser.parse_args()
    if options.steps <= WARM_UP:
        parser.error(f"--steps must be above {WARM_UP}, the warm-up")
    unknown = set(options.modes.split(",")) - set(MODES)
    if unknown:
        parser.error(f"unknown modes: {', '.join(sorted(unknown))}")
    if options.which:
        mode, rank = options.which.split(",")
        print(json.dumps(measure(options, mode, int(rank))))
        return
    compare(options)


def compare(options: argparse.Namespace) -> None:
    """Run every mode and print one table."""
    wanted = options.modes.split(",")
    runs = [
        (mode, rank) for rank in (0, options.rank) for mode in MODES if mode in wanted and (rank or mode != "adapter")
    ]
    lines, resident = [], {}
    with tqdm(runs, unit="run", leave=False) as progress:
        progress.write(
            f"{'mode':<10}{'trained':>10}{'parameters':>14}{'peak GiB':>10}{'s/step':>9}{'s before':>10}  "
            "largest KL diff"
        )
        for mode, rank in progress:
            trained = f"LoRA {rank}" if rank else "full"
            progress.set_description(f"{mode}, {trained}")
            result = alone(options, mode, rank)
            if "error" in result:
                progress.write(f"{mode:<10}{trained:>10}  {result['error']}")
                continue
            if mode == "resident":
                resident[rank] = result["kl"]
            pairs = zip(result["kl"], resident.get(rank, ()), strict=rank in resident)
            result["largest_kl_difference"] = max((abs(a - b) for a, b in pairs), default=None)
            lines.append(result)
            progress.write(row(result))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    print(f"median of {options.steps - WARM_UP} steps after {WARM_UP}; torch {torch.__version__}, {device}, "
          f"{options.forget} forget rows, K={options.num_mismatch}, {options.ds_config}"
          f"{', activation checkpointing' * options.activation_checkpointing}; the last KL of resident: "
          + ", ".join(f"{x['kl'][-1]:.3g} ({x['trained']})" for x in lines if x["mode"] == "resident"))  # fmt: skip
    if options.output and lines:
        with open(options.output, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


def row(result: dict) -> str:
    difference = result["largest_kl_difference"]
    return (
        f"{result['mode']:<10}{result['trained']:>10}{result['parameters']:>14,}{result['peak_bytes'] / 2**30:>10.2f}"
        f"{result['seconds']:>9.3f}{result['seconds_before']:>10.1f}  "
        f"{'-' if difference is None else f'{difference:.2g}'}"
    )


def alone(options: argparse.Namespace, mode: str, rank: int) -> dict:
    """One mode in a process of its own, with an empty cache of references."""
    command = [sys.executable, __file__, "--which", f"{mode},{rank}"]
    for name in ("model", "steps", "forget", "num_mismatch", "learning_rate", "nvme_path", "ds_config"):
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    command += ["--activation_checkpointing"] * options.activation_checkpointing
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(options: argparse.Namespace, mode: str, rank: int) -> dict:
    """Take the steps and return what they took; ``error`` where the machine lacks what the mode needs."""
    from unlearn_ds import log

    log.quiet()
    from unlearn_ds import arguments, build, ds_json, embedded, engine, model
    from unlearn_ds.checks import check
    from unlearn_ds.config import UsageError
    from unlearn_ds.data.encode import Encoder
    from unlearn_ds.registry import SCENARIOS, resolve

    device = engine.start(engine.EngineConfig())
    flags = {
        "batch_size": options.forget, "retain_batch_size": options.forget, "num_mismatch": options.num_mismatch,
        "eps_forget": 0.5, "eps_mismatch": 1.0, "eps_retain": 1.0, "forget_bound": 0.0, "max_steps": options.steps,
        "learning_rate": options.learning_rate, "schedule": "constant", "warmup_ratio": 0.0,
        "activation_checkpointing": options.activation_checkpointing, "ds_config": options.ds_config,
        "reference": mode, "lora_rank": rank,
    }  # fmt: skip
    if options.model:
        flags["model"] = options.model
    if mode == "nvme":
        flags["engine.nvme_path"] = options.nvme_path or tempfile.gettempdir()
    config = arguments.parse(flags)
    check(config)
    values = ds_json.load(config.engine.ds_config)
    try:
        build.check_offload(config, values)
    except UsageError as error:
        return {"error": str(error)}
    path = embedded.locate(config.model.path)
    encoder = Encoder(model.load_tokenizer(path), config.data.template, config.data.system_prompt)
    data = resolve("scenario", config.scenario, SCENARIOS).load(config, encoder)
    batches = build.loader(config, encoder, data, data.forget["train"])
    policy = build.policy(config, path, values, device)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["UNLEARN_DS_CACHE"] = cache
        began = time.perf_counter()
        reference = build.reference(config, path, values, policy, batches)
        before = time.perf_counter() - began
        seconds, kl = [], []
        for step in range(options.steps):
            began, values_of_step = time.perf_counter(), []
            for batch in batches.micro_batches(step):
                batch = batch.to(device)
                output = policy.loss(batch, reference.rows(batch))
                policy.backward(output.loss)
                policy.step()
                values_of_step.append(float(output.loss_N[-batch.num_kl_rows :].double().mean()))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            kl.append(statistics.mean(values_of_step))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    parameters = sum(p.ds_numel if ds_json.stage(values) == 3 else p.numel() for p in trained)
    return {
        "mode": mode, "trained": f"LoRA {rank}" if rank else "full", "parameters": parameters, "peak_bytes": peak,
        "seconds": statistics.median(seconds[WARM_UP:]), "seconds_before": before, "kl": kl,
    }  # fmt: skip


if __name__ == "__main__":
    main()
