"""One optimizer step of this project against the published algorithm done plainly, paired, each in its own process.

    python kernels/bench/step.py [--forget 8] [--num_mismatch 5] [--pairs 3] [--plain fp32] [--ours bf16]
                                 [--plain_memory default|kept]
                                 [--against plain|apart] [--scenario NAME --forget_data FILE --retain_data FILE]
                                 [--reference offload|cached] [--activation_checkpointing] [--output FILE.csv]

Plain: three right-padded forwards (forget, K mismatch answers, retain) with logits of every position in fp32, a KL as
the published code writes it, a resident copy as reference, torch's AdamW, in fp32 as published. Ours: the engine, the
packed batch and the fused loss as a run uses them, ZeRO-3 with the reference offloaded, or cached on disk (made before
the first step: not counted). Apart: ours without shared prompts. Same rows, same model, same machine; the embedded
sample unless files are given. On a CPU the engine has the C library keep freed memory, which a plain script has not:
``--plain_memory kept`` lends it that, so that only the algorithms are compared. Reported: forget rows a
second and peak memory of the process, and their ratios pair by pair.
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
import time

import torch
import torch.nn.functional as F

WARM_UP, COUNTED = 2, 3
SIDES = ("ours", "plain", "apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--which", choices=SIDES, help="run one side alone and print its result as JSON")
    parser.add_argument("--against", choices=("plain", "apart"), default="plain", help="the other side")
    parser.add_argument("--scenario", default="hallucination", help="whose data is read and how")
    parser.add_argument("--forget_data", help="file of rows to forget; default: the embedded sample")
    parser.add_argument("--retain_data", help="file of rows to retain; default: the embedded sample")
    parser.add_argument("--forget", type=int, default=8, help="forget rows a step; as many retain rows")
    parser.add_argument("--num_mismatch", type=int, default=5, help="mismatch answers for each forget row")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of processes")
    parser.add_argument("--plain", choices=("fp32", "bf16"), default="fp32", help="precision of the plain side")
    parser.add_argument("--plain_memory", choices=("default", "kept"), default="default",
                        help="whether the plain side is lent our settings of the C library's memory")  # fmt: skip
    parser.add_argument("--ours", choices=("fp32", "bf16"), default="bf16", help="precision of our side")
    parser.add_argument("--reference", choices=("offload", "resident", "cached"), default="offload", help="of our side")
    parser.add_argument("--activation_checkpointing", action="store_true", help="of our side")
    parser.add_argument("--output", help="CSV file for the results")
    options = parser.parse_args()
    if options.which:
        seconds = plain(options) if options.which == "plain" else ours(options, options.which == "ours")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        print(json.dumps({"seconds": seconds, "rows_per_second": options.forget / seconds, "peak_bytes": peak}))
        return
    compare(options)


def compare(options: argparse.Namespace) -> None:
    """Run the two sides in turn and print the ratios of each pair."""
    lines = []
    for pair in range(options.pairs):
        ours_result, plain_result = (side(which, options) for which in ("ours", options.against))
        faster = ours_result["rows_per_second"] / plain_result["rows_per_second"]
        smaller = ours_result["peak_bytes"] / plain_result["peak_bytes"]
        lines.append({"pair": pair, "rows_per_second_ratio": round(faster, 3), "peak_memory_ratio": round(smaller, 3),
                      **{f"ours_{k}": v for k, v in ours_result.items()},
                      **{f"{options.against}_{k}": v for k, v in plain_result.items()}})  # fmt: skip
        gib = [result["peak_bytes"] / 2**30 for result in (ours_result, plain_result)]
        print(
            f"pair {pair}: {faster:.2f} x rows a second ({ours_result['seconds']:.2f} s a step, "
            f"{options.against} {plain_result['seconds']:.2f} s), {smaller:.2f} x the peak memory ({gib[0]:.2f} GiB, "
            f"{options.against} {gib[1]:.2f})",
            flush=True,
        )
    rows, memory = (
        statistics.median(line[k] for line in lines) for k in ("rows_per_second_ratio", "peak_memory_ratio")
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    print(f"median of {len(lines)} pairs: {rows:.2f} x rows a second, {memory:.2f} x peak memory; torch "
          f"{torch.__version__}, {device}, {options.forget} forget rows, K={options.num_mismatch}, "
          f"ours {options.ours}, reference {options.reference}"
          f"{' with activation checkpointing' * options.activation_checkpointing}, "
          f"against {options.against}"
          f"{f' {options.plain}, memory {options.plain_memory}' if options.against == 'plain' else ''}")  # fmt: skip
    if options.output:
        with open(options.output, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


def side(which: str, options: argparse.Namespace) -> dict[str, float]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--which", which, "--forget", str(options.forget),
               "--num_mismatch", str(options.num_mismatch), "--plain", options.plain,
               "--plain_memory", options.plain_memory, "--ours", options.ours,
               "--reference", options.reference]  # fmt: skip
    command += ["--activation_checkpointing"] * options.activation_checkpointing
    for name in ("scenario", "forget_data", "retain_data"):
        command += [f"--{name}", getattr(options, name)] if getattr(options, name) else []
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def sample_rows(options: argparse.Namespace, share_prompts: bool = False):
    """Configuration, path of the model, and loader of the rows."""
    from unlearn_ds import arguments, build, embedded, model
    from unlearn_ds.data.encode import Encoder
    from unlearn_ds.registry import SCENARIOS, resolve

    config = arguments.parse({
        "batch_size": options.forget, "retain_batch_size": options.forget, "num_mismatch": options.num_mismatch,
        "forget_bound": 0.0, "max_steps": 100,
        "eps_forget": 0.5, "eps_mismatch": 1.0, "eps_retain": 1.0, "learning_rate": 2e-6, "gradient_clipping": 0.0,
        "activation_checkpointing": options.activation_checkpointing, "share_prompts": share_prompts,
        "scenario": options.scenario, "reference": options.reference,
        **{name: getattr(options, name) for name in ("forget_data", "retain_data") if getattr(options, name)},
    })  # fmt: skip
    path = embedded.locate(config.model.path)
    encoder = Encoder(model.load_tokenizer(path), config.data.template, config.data.system_prompt)
    data = resolve("scenario", config.scenario, SCENARIOS).load(config, encoder)
    return config, path, build.loader(config, encoder, data, data.forget["train"])


def timed(step) -> float:
    """Median seconds of a step after warm-up."""
    seconds = []
    for n in range(WARM_UP + COUNTED):
        began = time.perf_counter()
        step(n)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:])


def ours(options: argparse.Namespace, share_prompts: bool) -> float:
    from unlearn_ds import log

    log.quiet()
    from unlearn_ds import build, ds_json, engine

    device = engine.start(engine.EngineConfig())
    config, path, loader = sample_rows(options, share_prompts)
    values = ds_json.load("zero3" if options.ours == "bf16" else "zero3_fp32")
    policy = build.policy(config, path, values, device)
    reference = build.reference(config, path, values, policy, loader)

    def step(n: int) -> None:
        for batch in loader.micro_batches(n):
            batch = batch.to(device)
            policy.backward(policy.loss(batch, reference.rows(batch)).loss)
            policy.step()

    return timed(step)


def plain(options: argparse.Namespace) -> float:
    """The published step in plain PyTorch and transformers."""
    from transformers import AutoModelForCausalLM

    from unlearn_ds import machine

    if options.plain_memory == "kept" and not torch.cuda.is_available():
        machine.keep_freed_memory()
    config, path, loader = sample_rows(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if options.plain == "fp32" else torch.bfloat16
    model, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-6)

    def answer_loss(rows) -> torch.Tensor:
        ids, mask, labels = (x.to(device) for x in padded(rows))
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
        losses = [
            F.cross_entropy(sequence[:-1], target[1:], ignore_index=-100)
            for sequence, target in zip(logits, labels, strict=True)
        ]
        return torch.stack(losses).mean()

    def kl(rows) -> torch.Tensor:
        ids, mask, _ = (x.to(device) for x in padded(rows))
        with torch.no_grad():
            p_reference = F.softmax(reference(input_ids=ids, attention_mask=mask).logits.float(), -1)
        p = F.softmax(model(input_ids=ids, attention_mask=mask).logits.float(), -1)
        return -(p_reference * torch.log(p + 1e-12)).sum(-1).mean()

    def step(n: int) -> None:
        rows = {term.name: [] for term in loader.terms}
        for unit in (unit for part in loader.global_batch(n) for unit in part):
            for term, row in unit:
                rows[loader.terms[term].name].append(row)
        loss = -0.5 * answer_loss(rows["forget"]) + answer_loss(rows["mismatch"]) + kl(rows["retain"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step)


def padded(rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, attention mask and labels [B, L] of right-padded rows; labels of prompt and padding are -100."""
    longest = max(map(len, rows))
    ids = [[*r.prompt_ids, *r.answer_ids] + [0] * (longest - len(r)) for r in rows]
    labels = [[-100] * len(r.prompt_ids) + list(r.answer_ids) + [-100] * (longest - len(r)) for r in rows]
    mask = [[1] * len(r) + [0] * (longest - len(r)) for r in rows]
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


if __name__ == "__main__":
    main()
