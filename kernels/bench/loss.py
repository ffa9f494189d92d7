"""Time and memory of the loss stage, forward and backward, against plain torch and other libraries.

    python kernels/bench/loss.py [--device cpu|cuda] [--head llama2-7b|llama3-8b|smollm2] [--rows N] [--tokens N]
                                 [--terms ce kl three] [--dtype fp32|bf16] [--rounds 3] [--output FILE.csv]

Hidden states of ``--tokens`` tokens, of which ``--rows`` are response tokens; "three" takes a quarter of these for
forget, a half for mismatch and a quarter for retain. Each implementation runs in processes of its own, in turn, round
by round; ratios are those of one round. extra_bytes: peak beyond hidden states and heads, gradients included. error:
relative error of the head's gradient against float64 on the first 128 rows. floor: seconds of the products alone,
at the rate of a large product on this GPU. On a CPU nothing of others is compiled by torch.compile. A plot goes beside
the CSV.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from rivals import COMBINATIONS, IMPLEMENTATIONS, OURS, Implementation, available, find, missing, version

HEADS = {"llama2-7b": (32000, 4096), "llama3-8b": (128256, 4096), "smollm2": (49152, 576)}
TERMS = ("ce", "kl", "three")
WARM_UP, COUNTED, TRUTH_ROWS = {"cpu": 1, "cuda": 3}, {"cpu": 3, "cuda": 20}, 128
COLUMNS = (
    "implementation", "term", "device", "head", "rows", "tokens", "dtype", "seconds", "extra_bytes", "error",
    "loss_error", "ratio", "floor", "hardware", "versions", "commit",
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
    parser.add_argument("--only", nargs="+", choices=(OURS, *IMPLEMENTATIONS, *COMBINATIONS), metavar="NAME",
                        help=f"default: all that are installed, of {', '.join((OURS, *IMPLEMENTATIONS))}")  # fmt: skip
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--output", help="CSV file; a plot of the same name is put beside it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(json.loads(options.one))))
        return
    if options.device == "cuda" and not has_gpu:
        parser.error("--device cuda: torch finds no GPU here")
    if missing():
        print(f"not compared, not installed (pip install, into an environment of their own): {', '.join(missing())}")
    options.rate = product_rate() if options.device == "cuda" else None
    if options.rate:
        print(f"products of bf16 matrices of 8192 x 8192 here: {options.rate / 1e12:.0f} TFLOP/s")
    lines = []
    for rows, term in itertools.product(options.rows, options.terms):
        lines += compare(options, rows, term)
        if options.output and lines:
            write(Path(options.output), lines)  # what is measured is kept if the rest is not
    if not lines:
        raise SystemExit("error: nothing could be measured")


def at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number above 0; got '{text}'")
    return int(text)


def compare(options: argparse.Namespace, rows: int, term: str) -> list[dict[str, Any]]:
    """Every implementation of a term, round by round; prints and returns a line each."""
    names = [name for name in available(options.device, term) if not options.only or name in options.only]
    settings = {"term": term, "device": options.device, "head": options.head, "rows": rows, "dtype": options.dtype}
    settings["tokens"] = options.tokens or 4 * rows
    # A CPU's peak memory and time need processes with different allocators; a GPU's do not.
    together = ["memory", "seconds"] if options.device == "cuda" else ["memory"]
    held = {name: run(settings | {"implementation": name, "measure": together}) for name in names}
    found = {name: result for name, result in held.items() if result is not None}
    seconds: dict[str, list[float]] = {name: [r.pop("seconds")] if "seconds" in r else [] for name, r in found.items()}
    for _ in range(options.rounds - len(together) + 1):
        for name in list(seconds):
            result = run(settings | {"implementation": name, "measure": ["seconds"]})
            if result is None:
                del seconds[name]
            else:
                seconds[name].append(result["seconds"])
    lines = []
    for name, values in seconds.items():
        pairs = zip(values, seconds.get(OURS, ()), strict=OURS in seconds)
        line = settings | found[name] | {
            "implementation": name, "seconds": statistics.median(values), **origin(options, name),
            "ratio": statistics.median([theirs / ours for theirs, ours in pairs] or [math.nan]),
            "floor": floor(settings) / options.rate if options.rate else None,
        }  # fmt: skip
        lines.append(line)
        floors = f"  {line['seconds'] / line['floor']:.2f} x the floor" if line["floor"] else ""
        print(
            f"{term:<6} {rows:>6} rows  {name:<34} {line['seconds']:9.4f} s {line['ratio']:7.2f} x "
            f"{line['extra_bytes'] / 2**20:9.0f} MiB  error {line['error']:.1e}{floors}",
            flush=True,
        )
    return lines


def run(settings: dict[str, Any]) -> dict[str, Any] | None:
    """One implementation in a process of its own; None, with the reason printed, when it fails."""
    command = [sys.executable, __file__, "--one", json.dumps(settings)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    if settings["measure"] == ["seconds"]:
        # As a run sets it (engine.py): freed memory is kept. Peak memory is measured without, or it would be hidden.
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
        print(f"{settings['term']:<6} {settings['rows']:>6} rows  {settings['implementation']:<34} failed: {reason}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def origin(options: argparse.Namespace, name: str) -> dict[str, str]:
    """Hardware, versions and commit."""
    packages = ["torch", "triton"] if name == OURS else find(name).package.split()
    packages = dict.fromkeys(["torch", *packages])
    versions = " ".join(f"{Requirement(package).name} {version(package)}" for package in packages)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    return {"hardware": f"{hardware}, {os.cpu_count()} cores", "versions": versions, "commit": commit}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Errors and peak memory of one implementation, its seconds, or both."""
    vocab, width = HEADS[settings["head"]]
    found = {}
    if "memory" in settings["measure"]:
        truth_rows = min(settings["rows"], TRUTH_ROWS)
        small = problem(settings | {"rows": truth_rows, "tokens": truth_rows}, vocab, width)
        loss, gradient = evaluate(settings["implementation"], small)
        exact_loss, exact_gradient = truth(small)
        found["error"] = float((gradient.double() - exact_gradient).norm() / exact_gradient.norm())
        found["loss_error"] = float((loss.double() - exact_loss).abs() / exact_loss.abs())
        del small, gradient, exact_gradient
        given = problem(settings, vocab, width)
        found["extra_bytes"] = peak_beyond(settings["device"], lambda: evaluate(settings["implementation"], given))
        del given
    if "seconds" in settings["measure"]:
        given = problem(settings, vocab, width)
        found["seconds"] = seconds_of(settings["device"], lambda: evaluate(settings["implementation"], given))
    return found


def seconds_of(device: str, call: Callable[[], Any]) -> float:
    """Median seconds of a call after warm-up."""
    seconds = []
    for _ in range(WARM_UP[device] + COUNTED[device]):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP[device] :])


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
    from unlearn_ds import ops, workspace
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
        workspace_bytes=workspace.num_bytes(0, device.type, given["hidden"].dtype == torch.bfloat16),
        kernel=kernel,
    )
    hidden = given["hidden"].index_select(0, places)
    return ops.masked_loss(hidden, given["weight"], batch, reference, options).loss


def theirs(name: str, given: dict[str, Any]) -> torch.Tensor:
    implementation, parts, weight = find(name), given["parts"], given["weight"]
    if implementation.all_tokens:
        return all_tokens(implementation, given)
    cut = len(parts["forget"])
    loss = given["hidden"].new_zeros((), dtype=torch.float32)
    if cut and len(parts["mismatch"]) and implementation.weighted:
        hidden = given["hidden"].index_select(0, torch.cat([parts["forget"], parts["mismatch"]]))
        targets = given["targets"][: len(hidden)]
        weights = torch.full_like(targets, 1 / (len(hidden) - cut), dtype=torch.float32)
        weights[:cut] = given["weights"]["forget"] / cut
        loss = implementation.weighted(hidden, weight, targets, weights)
    else:
        for term, targets in zip(parts, given["targets"].split([len(p) for p in parts.values()]), strict=True):
            if term != "retain" and len(targets):
                hidden = given["hidden"].index_select(0, parts[term])
                loss = loss + given["weights"][term] * implementation.cross_entropy(hidden, weight, targets)
    if len(parts["retain"]):
        hidden, reference = (given[k].index_select(0, parts["retain"]) for k in ("hidden", "reference_hidden"))
        loss = loss + implementation.kl(hidden, weight, reference, given["reference_weight"])
    return loss


def all_tokens(implementation: Implementation, given: dict[str, Any]) -> torch.Tensor:
    """Term by term, each with its share of all tokens: prompts go through the head too, and are masked afterwards."""
    loss = given["hidden"].new_zeros((), dtype=torch.float32)
    start = first = 0
    for term, places in given["parts"].items():
        share = len(given["hidden"]) * len(places) // len(given["targets"])
        rows, start = slice(start, start + share), start + share
        targets, first = given["targets"][first : first + len(places)], first + len(places)
        if term == "retain" and share:
            reference = given["reference_hidden"][rows]
            value = implementation.kl(given["hidden"][rows], given["weight"], reference, given["reference_weight"])
        elif share:
            where = torch.linspace(0, share - 1, len(places), device=targets.device).long()
            labels = targets.new_full((share,), -100).index_copy(0, where, targets)
            value = implementation.cross_entropy(given["hidden"][rows], given["weight"], labels)
        loss = loss + given["weights"][term] * value if share else loss
    return loss


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


def floor(settings: dict[str, Any]) -> float:
    """FLOPs of the products that losses and gradients cannot do without: three of a cross-entropy row with the head,
    four of a KL row, whose reference is not differentiated."""
    vocab, width = HEADS[settings["head"]]
    num_kl = {"ce": 0, "kl": settings["rows"], "three": settings["rows"] // 4}[settings["term"]]
    return (6 * (settings["rows"] - num_kl) + 8 * num_kl) * vocab * width


def product_rate(size: int = 8192) -> float:
    """FLOP/s of a large square product of random bf16 matrices on this GPU: the median."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of("cuda", lambda: torch.mm(a, b))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_beyond(device: str, call: Callable[[], Any]) -> int:
    """Bytes that a call takes at its peak beyond what is there: of the allocator on a GPU, else resident pages."""
    if device == "cuda":
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
