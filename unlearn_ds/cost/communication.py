"""Bytes and calls of collectives in an optimizer step."""

from __future__ import annotations

from typing import NamedTuple

from unlearn_ds.cost.gathers import gathers
from unlearn_ds.cost.setup import Setup
from unlearn_ds.cost.shapes import Shape


class Volume(NamedTuple):
    """One kind of traffic of an optimizer step, the same on every rank.

    num_bytes: of the whole tensors, before they are cut or after they are joined; a rank sends and receives
    (ranks - 1) / ranks of it, for an all-reduce twice. group: "world" or "node". calls: how many collectives.
    """

    what: str
    operation: str
    num_bytes: int
    group: str = "world"
    calls: int = 0


def communication(shape: Shape, setup: Setup) -> tuple[Volume, ...]:
    """Traffic of a step with a complete trace, from the second step on; one rank exchanges nothing."""
    if setup.world_size < 2:
        return ()
    volumes = _sharded(shape, setup) if setup.stage == 3 else _whole(shape, setup)
    volumes += _reference(shape, setup)
    return tuple(volume for volume in volumes if volume.num_bytes)


def total(volumes: tuple[Volume, ...], operation: str = "", group: str = "") -> int:
    """Bytes of the volumes of one operation and group; of all without."""
    return sum(v.num_bytes for v in volumes if operation in ("", v.operation) and group in ("", v.group))


def _whole(shape: Shape, setup: Setup) -> list[Volume]:
    """Stages 0 to 2: gradients are summed, divided optimizers hand out what they have updated.

    DeepSpeed sums buckets by all-reduce at every stage (``use_multi_rank_bucket_allreduce``) and keeps its part: a
    reduce-scatter would move half. Stages 0 and 1 sum once a step, stage 2 once a micro-batch.
    """
    trained, width = setup.trained(shape), setup.bytes_per_weight
    sums = setup.accumulation if setup.stage == 2 else 1
    gradient_width = setup.communication_bytes or width
    calls = sums * max(1, trained // max(1, setup.reduce_bucket))
    volumes = [Volume("gradients", "all_reduce", sums * trained * gradient_width, calls=calls)]
    if setup.stage:
        volumes.append(Volume("updated weights", "all_gather", trained * width, calls=1))
    return volumes


def _sharded(shape: Shape, setup: Setup) -> list[Volume]:
    trained, width, steps = setup.trained(shape), setup.bytes_per_weight, setup.accumulation
    found = gathers(shape, setup)
    first, again = found.forward, found.backward
    calls_first, calls_again = found.calls
    if setup.hpz > 1:
        # The second copy is made when a step first gathers a weight, and thrown away by the update.
        once = gathers(shape, setup._replace(max_reuse=10 * shape.total))
        inside = (steps * (first + again) - once.forward) * width
        volumes = [
            Volume("weights, first forward", "all_gather", once.forward * width, calls=sum(once.calls)),
            Volume(
                "weights, from the copy of the node", "all_gather", inside, "node",
                steps * sum(found.calls) - sum(once.calls),
            ),
        ]  # fmt: skip
    else:
        volumes = [
            Volume("weights, forward", "all_gather", steps * first * width, calls=steps * calls_first),
            Volume("weights, backward", "all_gather", steps * again * width, calls=steps * calls_again),
        ]
    gradients = steps * trained * (setup.communication_bytes or width)
    calls = steps * max(1, trained // max(1, setup.reduce_bucket))
    volumes.append(Volume("gradients", "reduce_scatter", gradients, calls=calls))
    volumes.append(Volume("adapters", "all_gather", steps * setup.num_adapter * width, calls=steps))
    small = sum(numel < setup.persistence for numel in shape.weights)
    volumes.append(Volume("small weights, updated", "all_gather", setup.persistent(shape) * width, calls=small))
    return volumes


def _reference(shape: Shape, setup: Setup) -> list[Volume]:
    """Gathers of the frozen model's body: its LM head lies whole on each rank, and a cache needs no model."""
    if setup.reference not in ("resident", "offload", "nvme"):
        return []
    persistence = 10 * shape.hidden_size
    body = shape.outer if shape.tied else shape.outer[:-1]
    numel = sum(n for n in body + shape.num_layers * shape.layer if n >= persistence)
    calls = setup.accumulation * sum(n >= persistence for n in body + shape.num_layers * shape.layer)
    return [
        Volume(
            "weights of the reference", "all_gather", setup.accumulation * numel * setup.bytes_per_weight, calls=calls
        )
    ]
