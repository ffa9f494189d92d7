"""The same losses by us and by others: what ``loss.py`` and ``errors.py`` compare.

An implementation is a row of ``IMPLEMENTATIONS``: a mean cross-entropy and a mean KL(reference || policy) of rows of
hidden states, either of which may be missing. Ours is one call for all terms and stands apart.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from packaging.requirements import Requirement

Loss = Callable[..., torch.Tensor]


class Implementation(NamedTuple):
    """cross_entropy(hidden, weight, targets), kl(hidden, weight, reference hidden, reference weight).

    package: what has to be installed, apart by spaces; its version is written down. all_tokens: makes logits of prompt
    tokens too, term by term as published. weighted: a cross-entropy with a weight for each row, where there is one:
    then forget and mismatch are one call."""

    cross_entropy: Loss | None
    kl: Loss | None
    package: str = "torch"
    needs_gpu: bool = False
    all_tokens: bool = False
    weighted: Loss | None = None


def torch_cross_entropy(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.t()).float(), targets)


def torch_weighted(hidden, weight, targets, weights_N):
    return (F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none") * weights_N).sum()


def torch_kl(hidden, weight, reference_hidden, reference_weight):
    logp = F.log_softmax((hidden @ weight.t()).float(), -1)
    with torch.no_grad():
        logq = F.log_softmax((reference_hidden @ reference_weight.t()).float(), -1)
    return F.kl_div(logp, logq, log_target=True, reduction="batchmean")


def torch_linear_cross_entropy(hidden, weight, targets):
    return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def liger_cross_entropy(hidden, weight, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets)


def liger_jsd(hidden, weight, reference_hidden, reference_weight):
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    return LigerFusedLinearJSDFunction.apply(hidden, weight, reference_hidden, reference_weight, None, 0.0)


def liger_chunked_kl(hidden, weight, reference_hidden, reference_weight):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    compiled = hidden.device.type == "cuda"
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)
    none = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    return loss(hidden, weight, reference_hidden, reference_weight, none)


def cut_cross_entropy(hidden, weight, targets):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets)


def trl_cross_entropy(hidden, weight, targets):
    return trl_weighted(hidden, weight, targets, 1 / len(targets))


def trl_weighted(hidden, weight, targets, weights_N):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logp_N = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_VOCABULARY_CHUNK)[0]
    return -(logp_N * weights_N).sum()


def trl_kl(hidden, weight, reference_hidden, reference_weight):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    function = ChunkedDivergenceFunction.apply
    return function(hidden, weight, None, reference_hidden, reference_weight, None, 0.0)[0].mean()


TRL_VOCABULARY_CHUNK = 32768
"""As its trainers call it."""
IMPLEMENTATIONS = {
    "torch, all tokens": Implementation(torch_cross_entropy, torch_kl, all_tokens=True),
    "torch": Implementation(torch_cross_entropy, torch_kl, weighted=torch_weighted),
    "torch linear_cross_entropy": Implementation(torch_linear_cross_entropy, None),
    "liger": Implementation(liger_cross_entropy, liger_jsd, "liger-kernel", needs_gpu=True),
    "liger chunked": Implementation(None, liger_chunked_kl, "liger-kernel"),
    "cut-cross-entropy": Implementation(cut_cross_entropy, None, "cut-cross-entropy", needs_gpu=True),
    "trl": Implementation(trl_cross_entropy, trl_kl, "trl>=1.16", weighted=trl_weighted),
}
COMBINATIONS = {
    "torch linear_cross_entropy + trl": ("torch linear_cross_entropy", "trl"),
    "cut-cross-entropy + trl": ("cut-cross-entropy", "trl"),
    "cut-cross-entropy + liger chunked": ("cut-cross-entropy", "liger chunked"),
}
"""Pairs for the step of all three terms, where no rival has both losses at its best."""
OURS = "unlearn_ds"


def find(name: str) -> Implementation:
    """An implementation or a combination by name."""
    if name in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[name]
    one, two = (IMPLEMENTATIONS[part] for part in COMBINATIONS[name])
    packages = f"{one.package} {two.package}"
    return Implementation(one.cross_entropy, two.kl, packages, one.needs_gpu or two.needs_gpu)


def available(device: str, term: str) -> list[str]:
    """Names that can compute ``term`` ("ce", "kl" or "three") here, ours first."""
    found = [OURS]
    for name in (*IMPLEMENTATIONS, *COMBINATIONS):
        implementation = find(name)
        able = {
            "ce": implementation.cross_entropy, "kl": implementation.kl,
            "three": implementation.cross_entropy and implementation.kl,
        }  # fmt: skip
        has_torch = "linear_cross_entropy" not in name or hasattr(F, "linear_cross_entropy")
        there = has_torch and all(version(package) for package in implementation.package.split())
        of_one_term = name in COMBINATIONS and term != "three"
        if able[term] and there and not of_one_term and (device == "cuda" or not implementation.needs_gpu):
            found.append(name)
    return found


def missing() -> list[str]:
    """Packages of implementations that are not installed, or not at a version that has what is compared."""
    return [
        package for package in dict.fromkeys(row.package for row in IMPLEMENTATIONS.values()) if not version(package)
    ]


@functools.cache
def version(package: str) -> str | None:
    """Installed version of a package, such as ``trl>=1.16``; None without it and where another version is installed."""
    wanted = Requirement(package)
    try:
        there = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return there if wanted.specifier.contains(there) else None
