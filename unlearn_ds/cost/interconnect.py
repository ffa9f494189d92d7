"""Bandwidths of clusters, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class NodeKind(NamedTuple):
    """A kind of node: device (as in devices.py), its memory in GiB, and bandwidths a GPU in bytes/s and one direction.

    nvlink: within a node. network: between nodes. host: between a GPU and host memory. The data sheets' values; of
    those ``BUS_EFFICIENCY`` arrives in collectives.
    """

    device: str
    memory_gib: int
    gpus_per_node: int
    nvlink: float
    network: float
    host: float


CLUSTERS: Mapping[str, NodeKind] = {
    # DGX A100: NVLink 3, 600 GB/s both ways a GPU; eight 200 Gb/s InfiniBand cards a node; PCIe 4.0 x16.
    "a100": NodeKind("A100", 80, 8, 300e9, 25e9, 25e9),
    # p4d.24xlarge and clusters like it: 400 Gb/s a node for eight GPUs.
    "a100-400g": NodeKind("A100", 40, 8, 300e9, 6.25e9, 25e9),
    # DGX H100: NVLink 4, 900 GB/s both ways a GPU; eight 400 Gb/s InfiniBand cards a node; PCIe 5.0 x16.
    "h100": NodeKind("H100", 80, 8, 450e9, 50e9, 50e9),
    # A node with a single 400 Gb/s card or Ethernet port for eight GPUs.
    "h100-400g": NodeKind("H100", 80, 8, 450e9, 6.25e9, 50e9),
}

BUS_EFFICIENCY = 0.8
"""Share of a link that large collectives reach: nccl-tests' bus bandwidth of all-gather and all-reduce is 230 to 240
GB/s of 300 on DGX A100 and 360 to 370 of 450 on DGX H100, and about 90 % of InfiniBand; 0.8 for both."""

LATENCY = 30e-6
"""Seconds of a collective beside its bytes, a launch and a round over a node; a ring over more nodes takes
``HOP_LATENCY`` for each of them."""
HOP_LATENCY = 5e-6
