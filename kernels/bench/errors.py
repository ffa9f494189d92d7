"""Errors of losses and gradients against float64, ours beside others: KL from 0 to 40, and cross-entropy.

    python kernels/bench/errors.py [--device cpu|cuda] [--rows 32] [--vocab 32000] [--output FILE.csv]

Policy and reference differ by noise on the hidden states, scaled until the mean KL is the wanted one; the truth is
computed in float64 from the same fp32 numbers. Errors are relative, of the mean loss and of the hidden states' gradient
in the norm, and absolute where the truth is 0. negative: whether the loss came out below 0. Without a GPU our Triton
kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

if "cpu" in sys.argv or not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, before the flags are

from loss import origin
from rivals import IMPLEMENTATIONS, OURS, available, version

from unlearn_ds import ops
from unlearn_ds.types import PackedBatch, ReferenceRows

WIDTH = 256
KL_TARGETS = (0.0, 1e-8, 1e-6, 1e-4, 1e-2, 1.0, 40.0)
COLUMNS = (
    "implementation", "term", "true_loss", "loss_error", "gradient_error", "negative", "device", "rows", "vocab",
    "hardware", "versions", "commit",
)  # fmt: skip


class Rows(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    reference: torch.Tensor | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--output", help="CSV file")
    options = parser.parse_args()
    torch.manual_seed(0)
    lines = []
    print(f"{'':<34}{'true loss':>10}{'loss':>10}{'gradient':>10}{'negative':>10}")
    for target in (*KL_TARGETS, None):
        rows = make_rows(options, target)
        term = "ce" if target is None else "kl"
        exact_N, exact_gradient = truth(rows)
        if target == 0.0:  # float64 has its own noise
            exact_N, exact_gradient = torch.zeros_like(exact_N), torch.zeros_like(exact_gradient)
        for name in implementations(options.device, term):
            loss, gradient = evaluate(name, rows)
            lines.append({
                "implementation": name, "term": term, "true_loss": float(exact_N.mean()),
                "loss_error": relative((loss - exact_N.mean()).abs(), exact_N.mean()),
                "gradient_error": relative((gradient - exact_gradient).norm(), exact_gradient.norm()),
                "negative": bool(loss < 0),
                "device": options.device, "rows": options.rows, "vocab": options.vocab,
                **origin(options, name.split(",")[0]),
            })  # fmt: skip
            line = lines[-1]
            print(
                f"{term} {name:<31}{line['true_loss']:>10.1e}{line['loss_error']:>10.1e}{line['gradient_error']:>10.1e}"
                f"{'yes' if line['negative'] else 'no':>10}",
                flush=True,
            )
    if options.output:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(lines)


def implementations(device: str, term: str) -> list[str]:
    ours = [f"{OURS}, torch rows", *([f"{OURS}, triton rows"] if version("triton") else [])]
    return ours + [name for name in available(device, term) if name != OURS and not IMPLEMENTATIONS[name].all_tokens]


def make_rows(options: argparse.Namespace, target: float | None) -> Rows:
    """Rows whose mean KL is ``target``; without one, rows of a cross-entropy."""
    draw = torch.Generator().manual_seed(1)
    confident = 8.0 if target and target > 10 else 1.0  # a KL of 40 needs tokens with a probability of e^-40
    hidden = torch.randn(options.rows, WIDTH, generator=draw) * confident
    weight = torch.randn(options.vocab, WIDTH, generator=draw) * 2 * WIDTH**-0.5
    targets = torch.randint(options.vocab, (options.rows,), generator=draw)
    rows = Rows(hidden.to(options.device), weight.to(options.device), targets.to(options.device))
    if target is None:
        return rows
    noise = torch.randn(options.rows, WIDTH, generator=draw).to(options.device)
    low, high = 0.0, 30.0
    for _ in range(40 if target else 0):
        middle = (low * high) ** 0.5 if low else high / 1000
        mean = truth(rows._replace(reference=hidden.to(options.device) + middle * noise))[0].mean()
        low, high = (middle, high) if mean < target else (low, middle)
        if abs(mean - target) < 0.02 * target:
            break
    return rows._replace(reference=rows.hidden + (middle if target else 0.0) * noise)


def truth(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row and the gradient of their mean with respect to the hidden states, in float64."""
    hidden, weight = rows.hidden.double().requires_grad_(), rows.weight.double()
    logp = torch.log_softmax(hidden @ weight.t(), 1)
    if rows.reference is None:
        loss_N = -logp.gather(1, rows.targets[:, None]).squeeze(1)
    else:
        logq = torch.log_softmax(rows.reference.double() @ weight.t(), 1)
        loss_N = (logq.exp() * (logq - logp)).sum(1)
    loss_N.mean().backward()
    return loss_N.detach(), hidden.grad


def evaluate(name: str, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss and the gradient of the hidden states."""
    hidden, weight = rows.hidden.clone().requires_grad_(), rows.weight.clone().requires_grad_()
    if name.startswith(OURS):
        loss = ours(name, rows, hidden, weight)
    else:
        arguments = (rows.targets,) if rows.reference is None else (rows.reference, rows.weight)
        function: Callable = IMPLEMENTATIONS[name].cross_entropy if rows.reference is None else IMPLEMENTATIONS[name].kl
        loss = function(hidden, weight, *arguments)
    loss.backward()
    return loss.detach().double(), hidden.grad.double()


def ours(name: str, rows: Rows, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    count, none = len(rows.targets), torch.empty(0, dtype=torch.long)
    num_kl = 0 if rows.reference is None else count
    coefficients = torch.full((count,), 1 / count, device=hidden.device)
    batch = PackedBatch(
        none, none, none, 0, none, rows.targets, coefficients, none, torch.empty(0), torch.empty(0), num_kl
    )
    reference = ReferenceRows(rows.reference, rows.weight) if num_kl else None
    options = ops.LossOptions(kernel=name.split()[1])
    return ops.masked_loss(hidden, weight, batch, reference, options).loss


def relative(error: torch.Tensor, size: torch.Tensor) -> float:
    """The error itself where the truth is 0."""
    return float(error / size) if size else float(error)


if __name__ == "__main__":
    main()
