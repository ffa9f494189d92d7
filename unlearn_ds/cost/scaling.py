"""Step time of a preset from one node to many: compute, traffic inside and between nodes, and what hides what."""

from __future__ import annotations

from typing import NamedTuple

from unlearn_ds.cost import devices
from unlearn_ds.cost.communication import Volume, communication
from unlearn_ds.cost.interconnect import BUS_EFFICIENCY, HOP_LATENCY, LATENCY, NodeKind
from unlearn_ds.cost.setup import Setup
from unlearn_ds.cost.shapes import Shape

ACHIEVABLE = {"A100": 0.55, "H100": 0.42}
"""Share of the peak that forward and backward of 7B to 70B models reach where traffic does not count: model-FLOPs
utilisation of llm-foundry's published runs on 8 to 64 GPUs, 7B 64 and 70B 53 % on A100, 7B 46 and 70B 43 % on H100."""

OVERLAP = 0.8
"""Share of compute beside which traffic runs. An assumption: the first gather of a pass has nothing to hide behind, and
kernels of both share multiprocessors."""

FORWARD = ("weights, forward", "weights, first forward")
"""Traffic that the forward pass waits for; all other traffic is the backward pass's or the update's."""


class StepTime(NamedTuple):
    """Seconds of an optimizer step on each of ``gpus``, and tokens of all of them.

    compute: without traffic. network, nvlink: all traffic, as if alone. exposed: what compute does not hide.
    """

    gpus: int
    compute: float
    network: float
    nvlink: float
    exposed: float
    tokens: int

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        return self.compute / self.seconds

    @property
    def limit(self) -> str:
        """What the step waits for."""
        if self.exposed < 0.05 * self.compute:
            return "compute"
        return "network" if self.network >= self.nvlink else "nvlink"


def predict(shape: Shape, setup: Setup, cluster: NodeKind) -> StepTime:
    """Seconds of a step under ``setup`` on GPUs of ``cluster``; ``KeyError`` for a device without known peak."""
    peak = devices.peak_flops(cluster.device)
    if peak is None:
        raise KeyError(f"no peak is known for {cluster.device}")
    forward, backward = compute_seconds(shape, setup, peak * ACHIEVABLE[cluster.device])
    volumes = communication(shape, setup)
    alone = [traffic_seconds(volume, setup, cluster) for volume in volumes]
    first = [max(pair) for v, pair in zip(volumes, alone, strict=True) if v.what in FORWARD or "reference" in v.what]
    rest = [
        max(pair) for v, pair in zip(volumes, alone, strict=True) if not (v.what in FORWARD or "reference" in v.what)
    ]
    exposed = max(0.0, sum(first) - OVERLAP * forward) + max(0.0, sum(rest) - OVERLAP * backward)
    tokens = setup.num_tokens * setup.accumulation * setup.world_size
    return StepTime(
        setup.world_size, forward + backward, sum(n for n, _ in alone), sum(v for _, v in alone), exposed, tokens
    )


def compute_seconds(shape: Shape, setup: Setup, flops_per_second: float) -> tuple[float, float]:
    """Seconds of forward, the reference's included, and of backward: 2 and 4 FLOPs a parameter and token, or with
    activation checkpointing 2 and 6; with adapters frozen weights need no gradient of their own. The LM head meets
    response tokens, here half of all."""
    met = shape.num_layers * shape.matrices * setup.num_tokens + shape.head * setup.num_tokens // 2
    forward = 2.0 * met
    if setup.reference is not None and setup.reference != "cached":
        forward += 2.0 * shape.num_layers * shape.matrices * setup.num_kl_tokens
    backward = (2.0 if setup.num_adapter else 4.0) * met + 2.0 * met * setup.checkpointing
    return forward * setup.accumulation / flops_per_second, backward * setup.accumulation / flops_per_second


def traffic_seconds(volume: Volume, setup: Setup, cluster: NodeKind) -> tuple[float, float]:
    """Seconds on the network and on NVLink, which run at once.

    Of tensors of ``num_bytes`` that all ranks of n nodes join or sum, each node takes in (n - 1) / n over all of its
    cards together, and each rank (ranks - 1) / ranks over NVLink. An all-reduce is a reduce-scatter and an all-gather.
    """
    inside = min(setup.ranks_per_node, setup.world_size)
    nodes = 1 if volume.group == "node" else max(1, setup.world_size // inside)
    ranks = inside * nodes
    passes = 2 if volume.operation == "all_reduce" else 1
    waiting = volume.calls * (LATENCY + HOP_LATENCY * (nodes - 1))
    nvlink = passes * volume.num_bytes * (ranks - 1) / ranks / (cluster.nvlink * BUS_EFFICIENCY)
    network = passes * volume.num_bytes * (nodes - 1) / nodes / (cluster.network * inside * BUS_EFFICIENCY)
    return (network + waiting if nodes > 1 else 0.0), nvlink + (waiting if nodes == 1 else 0.0)
