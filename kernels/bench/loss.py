"""Time and memory of the loss stage, forward and backward, against plain torch and other libraries.

    python kernels/bench/loss.py [--device cpu|cuda] [--head llama2-7b|llama3-8b|smollm2] [--rows N] [--tokens N]
                                 [--terms ce kl three] [--dtype fp32|bf16] [--rounds 3] [--output FILE.csv]

Hidden states of ``--tokens`` tokens, of which ``--rows`` are response tokens; "three" takes a quarter of these for
forget, a half for mismatch and a quarter for retain. Each implementation runs in a process of its own, in turn, round
by round; ratios are those of one round. extra_bytes: peak beyond hidden states and heads, gradients included. error:
relative error of the head's gradient against float64 on the first 128 rows. A plot goes beside the CSV.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rivals import OURS, available, find, version

HEADS = {"llama2-7b": (32000, 4096), "llama3-8b": (128256, 4096), "smollm2": (49152, 576)}
TERMS = ("ce", "kl", "three")
COUNTED, TRUTH_ROWS = 3, 128
COLUMNS = (
    "implementation", "term", "device", "head", "rows", "tokens", "dtype", "seconds", "extra_bytes", "error",
    "loss_error", "ratio", "hardware", "versions", "commit",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if has_gpu else "cpu")
    parser.add_argument("--head", choices=HEADS, default="smollm2")
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 2048, 8192], help="response tokens")
    parser.add_argument("--tokens", type=int, help="all tokens, prompts included; default: four times the rows")
    parser.add_argument("--terms", nargs="+", choices=TERMS, default=TERMS)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16" if has_gpu else "fp32")
    parser.add_argument("--only", nargs="+", help="names of implementations; default: all that are installed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="CSV file; a plot of the same name is put beside it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(json.loads(options.one))))
        return
    lines = [line for rows in options.rows for term in options.terms for line in compare(options, rows, term)]
    if options.output:
        write(Path(options.output), lines)


def compare(options: argparse.Namespace, rows: int, term: str) -> list[dict[str, Any]]:
    """Every implementation of a term, round by round; prints and returns a line each."""
    names = [name for name in available(options.device, term) if not options.only or name in options.only]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    settings = {"term": term, "device": options.device, "head": options.head, "rows": rows, "dtype": options.dtype}
    settings["tokens"] = options.tokens or 4 * rows
    for _ in range(options.rounds):
        for name in list(found):
            result = run(settings | {"implementation": name})
            if result is None:
                del found[name]
            else:
                found[name].append(result)
    lines = []
    for name, results in found.items():
        pairs = zip(results, found.get(OURS, results), strict=True)
        line = settings | {
            "implementation": name,
            "seconds": statistics.median(result["seconds"] for result in results),
            "extra_bytes": max(result["extra_bytes"] for result in results),
            "error": results[0]["error"], "loss_error": results[0]["loss_error"],
            "ratio": statistics.median(theirs["seconds"] / ours["seconds"] for theirs, ours in pairs),
            **origin(name),
        }  # fmt: skip
        lines.append(line)
        print(
            f"{term:<6} {rows:>6} rows  {name:<34} {line['seconds']:9.4f} s {line['ratio']:7.2f} x "
            f"{line['extra_bytes'] / 2**20:9.0f} MiB  error {line['error']:.1e}",
            flush=True,
        )
    return lines


def run(settings: dict[str, Any]) -> dict[str, Any] | None:
    """One implementation in a process of its own; None, with the reason printed, when it fails."""
    command = [sys.executable, __file__, "--one", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
        print(f"{settings['term']:<6} {settings['rows']:>6} rows  {settings['implementation']:<34} failed: {reason}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def origin(name: str) -> dict[str, str]:
    """Hardware, versions and commit."""
    packages = ["torch", "triton"] if name == OURS else find(name).package.split()
    versions = " ".join(f"{package} {version(package)}" for package in dict.fromkeys(["torch", *packages]))
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"hardware": f"{hardware}, {os.cpu_count()} cores", "versions": versions, "commit": commit}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds, peak memory and errors of one implementation."""
    vocab, width = HEADS[settings["head"]]
    truth_rows = min(settings["rows"], TRUTH_ROWS)
    small = problem(settings | {"rows": truth_rows, "tokens": truth_rows}, vocab, width)
    loss, gradient = evaluate(settings["implementation"], small)
    exact_loss, exact_gradient = truth(small)
    errors = {
        "error": float((gradient.double() - exact_gradient).norm() / exact_gradient.norm()),
        "loss_error": float((loss.double() - exact_loss).abs() / exact_loss.abs()),
    }
    del small, gradient, exact_gradient
    given = problem(settings, vocab, width)
    extra_bytes = peak_beyond(lambda: evaluate(settings["implementation"], given))
    seconds = []
    for _ in range(COUNTED):
        synchronize(settings["device"])
        began = time.perf_counter()
        evaluate(settings["implementation"], given)
        synchronize(settings["device"])
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds), "extra_bytes": extra_bytes, **errors}


def problem(settings: dict[str, Any], vocab: int, width: int) -> dict[str, Any]:
    """Hidden states of all tokens, both heads, targets, and which rows belong to which term."""
    device, dtype = settings["device"], {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["dtype"]]
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=draw, device=device).mul_(scale).to(dtype)

    tokens, rows = settings["tokens"], settings["rows"]
    hidden, weight = normal(tokens, width), normal(vocab, width, scale=2 * width**-0.5)
    places = torch.linspace(0, tokens - 1, rows, device=device).long()
    cuts = {"ce": (rows, 0), "kl": (0, 0), "three": (rows // 4, rows - rows // 4 - rows // 4)}[settings["term"]]
    return {
        "hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(),
        "reference_hidden": (hidden + 0.1 * normal(tokens, width)).detach(),
        "reference_weight": weight.detach().clone(),
        "targets": torch.randint(vocab, (rows,), generator=draw, device=device),
        "parts": {
            "forget": places[: cuts[0]], "mismatch": places[cuts[0] : sum(cuts)], "retain": places[sum(cuts) :],
        },
        "weights": {"forget": -0.5 if settings["term"] == "three" else 1.0, "mismatch": 1.0, "retain": 1.0},
    }  # fmt: skip


def evaluate(name: str, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and the head's gradient, which is taken away again."""
    loss = ours(given) if name == OURS else theirs(name, given)
    loss.backward()
    gradient, given["weight"].grad, given["hidden"].grad = given["weight"].grad, None, None
    return loss.detach(), gradient


def ours(given: dict[str, Any]) -> torch.Tensor:
    from unlearn_ds import ops
    from unlearn_ds.types import PackedBatch, ReferenceRows

    parts, device = given["parts"], given["hidden"].device
    places = torch.cat(list(parts.values()))
    num_kl = len(parts["retain"])
    coefficients = [torch.full((len(p),), given["weights"][n] / max(1, len(p))) for n, p in parts.items()]
    none = torch.empty(0, dtype=torch.long)
    batch = PackedBatch(
        none, none, none, 0, places, given["targets"], torch.cat(coefficients).to(device), none,
        torch.empty(0), torch.empty(0), num_kl,
    )  # fmt: skip
    reference = None
    if num_kl:
        reference = ReferenceRows(given["reference_hidden"][parts["retain"]], given["reference_weight"])
    kernel, _ = ops.resolve_kernel("auto", device)
    options = ops.LossOptions(
        workspace_bytes=ops.workspace_bytes(0, device.type, given["hidden"].dtype == torch.bfloat16), kernel=kernel
    )
    hidden = given["hidden"].index_select(0, places)
    return ops.masked_loss(hidden, given["weight"], batch, reference, options).loss


def theirs(name: str, given: dict[str, Any]) -> torch.Tensor:
    implementation, parts, start = find(name), given["parts"], 0
    every_token = implementation.all_tokens
    loss = given["hidden"].new_zeros((), dtype=torch.float32)
    for term in ("forget", "mismatch"):
        places = parts[term]
        targets = given["targets"][start : start + len(places)]
        start += len(places)
        if len(places) and every_token:
            # The sequences of this term: its share of the tokens, all of which go through the head.
            share = len(given["hidden"]) * len(places) // len(given["targets"])
            labels = targets.new_full((share,), -100).index_put_((evenly(share, len(places), targets),), targets)
            first = int(places[0])
            hidden = torch.cat([given["hidden"][first:], given["hidden"][:first]])[:share]
            loss = loss + given["weights"][term] * implementation.cross_entropy(hidden, given["weight"], labels)
        elif len(places):
            hidden = given["hidden"].index_select(0, places)
            loss = loss + given["weights"][term] * implementation.cross_entropy(hidden, given["weight"], targets)
    places = parts["retain"]
    if len(places):
        if every_token:
            share = len(given["hidden"]) * len(places) // len(given["targets"])
            places = torch.arange(len(given["hidden"]) - share, len(given["hidden"]), device=places.device)
        hidden, reference = given["hidden"].index_select(0, places), given["reference_hidden"].index_select(0, places)
        loss = loss + implementation.kl(hidden, given["weight"], reference, given["reference_weight"])
    return loss


def evenly(size: int, count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0, size - 1, count, device=like.device).long()


def truth(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64, all logits at once: ``problem`` is small."""
    exact = {
        **given, **{k: given[k].detach().double() for k in ("hidden", "weight", "reference_hidden", "reference_weight")}
    }  # fmt: skip
    exact["hidden"].requires_grad_(), exact["weight"].requires_grad_()
    loss = exact["hidden"].new_zeros(())
    start = 0
    for term, places in exact["parts"].items():
        targets = exact["targets"][start : start + len(places)]
        start += len(places)
        if not len(places):
            continue
        logp = torch.log_softmax(exact["hidden"][places] @ exact["weight"].t(), -1)
        if term == "retain":
            logq = torch.log_softmax(exact["reference_hidden"][places] @ exact["reference_weight"].t(), -1)
            value = (logq.exp() * (logq - logp)).sum(-1).mean()
        else:
            value = -logp.gather(1, targets[:, None]).mean()
        loss = loss + exact["weights"][term] * value
    loss.backward()
    return loss.detach(), exact["weight"].grad


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_beyond(call) -> int:
    """Bytes that a call takes at its peak beyond what is there: of the allocator on a GPU, else resident pages."""
    if torch.cuda.is_available():
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """The CSV, and a plot of seconds and memory beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    import plot

    plot.loss(lines, path.with_suffix(".png"))
    print(f"{path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
