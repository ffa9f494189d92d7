"""The same examination among ranks that a launcher has started, and what the network between them carries."""

from __future__ import annotations

import os
import time
from collections import Counter
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist

from unlearn_ds import dist, ranks
from unlearn_ds.preflight import disk
from unlearn_ds.preflight.findings import Finding, Subject, fail, ok, on_cpu
from unlearn_ds.preflight.node import Report

GROUP_SECONDS = 25
"""In which all ranks must have come together."""
MEASURE_SECONDS = 20.0
"""After which no larger size is begun."""
SIZES = {"cpu": [2**n for n in (10, 14, 18, 20, 22, 24, 26)], "cuda": [2**n for n in (10, 16, 20, 24, 26, 28, 30)]}
"""Bytes that are reduced, by type of device."""
NUM_TIMES = 5


class Measured(NamedTuple):
    """Bytes, seconds and bytes a second of all-reduces, the slowest rank's. ``bus``: what each rank's link carries,
    comparable among numbers of ranks: n ranks move 2 (n - 1) / n of the size over each link, as nccl-tests count."""

    backend: str
    world_size: int
    sizes: list[int]
    seconds: list[float]
    bus: list[float]


def join() -> Finding | None:
    """Form a group of all ranks on CPUs; the finding says why there is none."""
    try:
        ranks.choose_interface()
        torch_dist.init_process_group("gloo", timeout=timedelta(seconds=GROUP_SECONDS))
        dist.barrier()
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR', '(MASTER_ADDR is not set)')}:{os.environ.get('MASTER_PORT', '')}"
        return fail(
            f"{os.environ['WORLD_SIZE']} ranks have not come together at {place} within {GROUP_SECONDS} s: "
            + str(error).splitlines()[0],
            "look at the lines about interface and port of every node; set GLOO_SOCKET_IFNAME and MASTER_ADDR",
        )
    return None


def leave(code: int) -> int:
    """Leave together; returns the code that the main rank gave."""
    code = dist.gather_objects(code)[0]
    dist.shutdown()
    return code


def gather(subject: Subject, report: Report | None) -> tuple[Subject, list[Report]]:
    """The reports of all nodes on every rank, with clocks compared and output folders looked at.

    report: of the one rank of each node that has examined it, None of the others. The group must be there.
    """
    skews = _skews()
    mine = report._replace(skew=skews) if report else None
    there = [found for found in dist.gather_objects(mine) if found is not None]
    names, count = [found.node for found in there], Counter(found.node for found in there)
    unique = tuple(name if count[name] == 1 else f"{name}#{n}" for n, name in enumerate(names))
    index = sum(1 for found in dist.gather_objects(report is not None)[: dist.rank()] if found)
    sees = _tokens(subject._replace(nodes=unique, index=index), len(there), report is not None)
    seen = [found for found in dist.gather_objects(sees) if found is not None]
    reports, place = [], f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    for name, found, visible in zip(unique, there, seen, strict=True):
        findings = [finding._replace(node=name) for finding in found.findings]
        came = ok(f"{place} answers")  # or there would be no group
        reports.append(found._replace(node=name, findings=findings, sees=visible, reach=came))
    return subject._replace(nodes=unique, index=index), reports


def _skews() -> tuple[float, float]:
    """Seconds by which this rank's clock is ahead of the main rank's, and the most that this may be wrong."""
    readings = []
    for _ in range(3):
        dist.barrier()
        now, began = time.time(), time.monotonic()
        main = dist.gather_objects(now)[0]
        readings.append((now - main, time.monotonic() - began))
    return min(readings, key=lambda reading: reading[1])


def _tokens(subject: Subject, num_nodes: int, looks: bool) -> list[int] | None:
    """The nodes whose tokens this rank sees in its output folder; None from a rank that does not look."""
    name, token = dist.gather_objects(str(os.getpid()))[0], None
    if looks:
        try:
            token = disk.Token(subject, name)
        except OSError:  # told by the check of the output folder
            token = None
    try:
        dist.barrier()
        found = token.seen(range(num_nodes)) if token else None
        dist.barrier()
        return found
    finally:
        if token:
            token.close()


def measure_as_one_rank() -> dict[str, Any]:
    """Join the group that the environment names, measure and leave; ``{"error": ..., "do": ...}`` where that fails."""
    problem = join()
    if problem:
        return {"error": problem.seen, "do": problem.do}
    try:
        return bandwidth()._asdict()
    except RuntimeError as error:  # of gloo and NCCL: a peer that is gone, a link that is down
        return {"error": f"all-reduce failed: {str(error).splitlines()[0]}", "do": "set NCCL_DEBUG=INFO and look there"}
    finally:
        dist.shutdown()


def bandwidth() -> Measured:
    """All-reduce of growing sizes among all ranks: over NCCL where there are GPUs, else over gloo."""
    device = torch.device("cpu") if on_cpu() else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    backend, group = "gloo", None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend, group = "nccl", torch_dist.new_group(backend="nccl", timeout=timedelta(seconds=GROUP_SECONDS))
    sizes, seconds, began = [], [], time.monotonic()
    for num_bytes in SIZES[device.type]:
        values = torch.zeros(num_bytes // 4, device=device)
        taken = [_timed(values, group) for _ in range(NUM_TIMES + 1)][1:]  # the first connects and allocates
        told = dist.gather_objects((min(taken), time.monotonic() - began))
        # All ranks must agree on what took how long, or one would begin a size that another leaves out.
        longest, spent = (max(found) for found in zip(*told, strict=True))
        sizes.append(num_bytes)
        seconds.append(longest)
        if spent > MEASURE_SECONDS:
            break
    size = dist.world_size()
    bus = [2 * (size - 1) / size * moved / time_ for moved, time_ in zip(sizes, seconds, strict=True)]
    return Measured(backend, size, sizes, seconds, bus)


def _timed(values: torch.Tensor, group: torch_dist.ProcessGroup | None) -> float:
    began = time.monotonic()
    torch_dist.all_reduce(values, group=group)
    if values.is_cuda:
        torch.cuda.synchronize()
    return time.monotonic() - began
