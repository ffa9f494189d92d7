"""The memory plan of a run, and what each home of the reference holds."""

from __future__ import annotations

from typing import NamedTuple

from unlearn_ds.cost.gathers import gathers
from unlearn_ds.cost.setup import Setup
from unlearn_ds.cost.shapes import Shape

CONTEXT_BYTES = 2**30 * 6 // 10
"""CUDA's context and its libraries' handles on a device (0.5 to 0.9 GB were reported with torch 2)."""
NCCL_BYTES = 2**30
"""Channels and buffers of NCCL with several communicators (1 to 2 GB); nothing for one rank."""
REFERENCE_BUFFERS = 5
"""Largest weights that wait in locked host memory on their way from the disk (``ds_configs/reference/nvme.json``)."""
USABLE = 0.92
"""Share of a device's memory that a plan may fill: the allocator's blocks do not close up."""


class Line(NamedTuple):
    """One use of memory of a rank. where: "device", "host" or "disk". when: "always", during the "step" (forward and
    backward) and of it only in the "loss" or in the "backward" of a layer, the "update" of the weights, a "checkpoint",
    or "evaluation" where a whole copy fits."""

    what: str
    num_bytes: int
    where: str = "device"
    when: str = "always"


class Plan(NamedTuple):
    """What one rank holds."""

    lines: tuple[Line, ...]

    def sum(self, where: str, when: str) -> int:
        return sum(line.num_bytes for line in self.lines if (line.where, line.when) == (where, when))

    def peak(self, where: str = "device") -> int:
        """Bytes at the fullest moment of a step: what always lies there, and the fullest of loss, backward, update."""
        training = self.sum(where, "step") + max(self.sum(where, "loss"), self.sum(where, "backward"))
        return self.sum(where, "always") + max(training, self.sum(where, "update"))

    def of(self, what: str) -> int:
        """Bytes of the lines whose name begins with ``what``."""
        return sum(line.num_bytes for line in self.lines if line.what.startswith(what))


def memory_plan(shape: Shape, setup: Setup) -> Plan:
    """What a rank holds of the model ``shape`` under ``setup``; tests compare the sum with measured peaks.

    ZeRO divides optimizer states from stage 1, gradients from 2, weights from 3 (arXiv 1910.02054). With adapters only
    these have gradients and optimizer states, and the LM head, being frozen, serves the reference too.
    """
    lines = [*_states(shape, setup), *_reference(shape, setup), *_step(shape, setup), *_update(shape, setup)]
    lines += _files(shape, setup)
    if setup.on_gpu:
        lines.append(Line("CUDA context and NCCL", CONTEXT_BYTES + NCCL_BYTES * (setup.world_size > 1)))
    return Plan(tuple(line for line in lines if line.num_bytes))


def _home(offload: str) -> str:
    return {"none": "device", "cpu": "host", "nvme": "disk"}[offload]


def _states(shape: Shape, setup: Setup) -> list[Line]:
    width, trained = setup.bytes_per_weight, setup.trained(shape)
    whole = (shape.total + setup.num_adapter) * width
    on_device = "device" if setup.offload_optimizer == "none" else "host"
    # From stage 1 on DeepSpeed keeps a flat master copy, in fp32 too. At stage 3 gradients have a buffer at the start;
    # below it they come into being as backward frees activations, unless an earlier micro-batch has left them.
    master = setup.mixed or setup.stage > 0
    kept = setup.stage == 3 or setup.accumulation > 1 or on_device == "host"
    lines = [
        Line("weights", whole // setup.divided(3), _home(setup.offload_param)),
        Line("small weights, whole on each rank", setup.persistent(shape) * width),
        Line("gradients", trained * width // setup.divided(2), on_device, "always" if kept else "update"),
        Line(
            "optimizer: fp32 master and two moments" if master else "optimizer: two moments",
            trained * (12 if master else 8) // setup.divided(1), _home(setup.offload_optimizer),
        ),
    ]  # fmt: skip
    if setup.hpz > 1:
        lines.append(Line("weights, second copy within a node", whole // setup.hpz))
    if setup.offload_optimizer == "cpu":
        lines.append(Line("gradients in fp32", trained * 4 // setup.divided(1), "host"))
    if setup.offload_optimizer == "nvme":
        # Master weights, two moments and the gradient of one sub-group wait in pinned buffers.
        lines.append(Line("buffers of the disk", 16 * min(setup.sub_group, trained // setup.divided(1)), "host"))
        lines.append(Line("gradients in fp32", trained * 4 // setup.divided(1), "host"))
    return lines


def _reference(shape: Shape, setup: Setup) -> list[Line]:
    if setup.reference is None:
        return []
    where = {"resident": "device", "offload": "host", "nvme": "disk"}.get(setup.reference)
    lines, ranks = [], max(1, setup.world_size)
    if where:
        lines.append(Line("reference", shape.total * setup.bytes_per_weight // ranks, where))
    if where == "disk":
        largest = -(-shape.largest // ranks)
        lines.append(Line("reference, on its way", REFERENCE_BUFFERS * largest * setup.bytes_per_weight, "host"))
    if setup.reference != "adapter" and not setup.num_adapter:
        lines.append(Line("LM head of the reference", shape.head * setup.bytes_per_weight))
    return lines


def bytes_of_layer(shape: Shape, bytes_per_weight: int) -> int:
    """Bytes that one layer keeps for backward of each token: inputs of its products, norms and activation function.

    transformers' norms compute in fp32: an RMS norm keeps its input and its output so, and in mixed precision both
    exist in the compute precision too. Attention keeps queries, keys and values, with heads of keys repeated, and its
    output. Korthikanti et al. (arXiv 2205.05198) count 34 bytes x hidden for two-byte GELU layers with dropout.
    """
    hidden, inner, width = shape.hidden_size, shape.intermediate_size, bytes_per_weight
    query = shape.num_heads * shape.head_dim
    if shape.gated:
        norms = 2 * (4 * hidden + width * hidden) + (2 * width * hidden if width == 4 else 0)
        mlp = 4 * inner * width
    else:
        norms = 2 * 2 * width * hidden
        mlp = 2 * inner * width
    attention = (4 * query + hidden) * width
    return norms + mlp + attention


def _step(shape: Shape, setup: Setup) -> list[Line]:
    width, tokens = setup.bytes_per_weight, setup.num_tokens
    layer, hidden = bytes_of_layer(shape, width) * tokens, shape.hidden_size * tokens
    kept = shape.num_layers * (hidden * width if setup.checkpointing else layer)
    lines = [Line("activations", kept, when="step")]
    # What is recomputed of a layer comes after the loss, and so do gradients of its widest parts.
    working = layer * setup.checkpointing + (3 * shape.intermediate_size + 2 * shape.hidden_size) * tokens * width
    lines.append(Line("activations of one layer", working, when="backward"))
    head = shape.head * (width + 4 * setup.mixed) * (not setup.num_adapter)
    lines.append(Line("loss workspace", setup.workspace_bytes + 4 * hidden, when="loss"))
    lines.append(Line("gradient of the LM head", head, when="step"))
    if setup.stage == 3 and setup.world_size > 1:
        # Prefetched ones among them: they are there long before their module, up to ``max_live``.
        lines.append(Line("live gathered weights", gathers(shape, setup).most * width, when="step"))
    bucket = max(setup.reduce_bucket, shape.largest if not setup.num_adapter else 0)
    copies = 1 + 1 / max(1, setup.world_size) if setup.stage == 3 else 1
    lines.append(Line("bucket: reduce", int(bucket * copies) * width + setup.reduce_bucket * width, when="step"))
    return lines


def _update(shape: Shape, setup: Setup) -> list[Line]:
    trained, lines = setup.trained(shape), []
    if (setup.mixed or setup.stage in (1, 2)) and setup.offload_optimizer == "none":
        share = trained // setup.divided(1)
        lines.append(
            Line("gradients in fp32", 4 * min(share, setup.sub_group) if setup.stage == 3 else 4 * share, when="update")
        )
    if setup.stage in (1, 2):
        lines.append(Line("bucket: all-gather", setup.gather_bucket * setup.bytes_per_weight, when="update"))
    return lines


def _files(shape: Shape, setup: Setup) -> list[Line]:
    width, trained = setup.bytes_per_weight, setup.trained(shape)
    states = 12 * trained  # in fp32 the weights themselves take the place of the master copy
    weights = 0 if setup.stage == 3 else (setup.num_adapter or shape.total) * width
    return [
        Line("a checkpoint, all ranks together", states + weights, "disk", "checkpoint"),
        Line("the exported model", shape.total * width, "disk", "checkpoint"),
        Line("whole copy", shape.total * width * (setup.stage == 3 or setup.num_adapter > 0), when="evaluation"),
    ]


class ReferenceMode(NamedTuple):
    """A home of the frozen reference: bytes that one device, its host and the disk hold for it, bytes on the disk for
    each retain token, and when it is the right one."""

    device: int
    host: int
    disk: int
    disk_per_token: int
    right_when: str


RIGHT_WHEN = {
    "adapter": "LoRA, always: the policy with its adapters off",
    "cached": "full training for more than one pass over retain rows that stay the same; any disk all nodes share",
    "resident": "new retain rows all the time, and device memory to spare",
    "offload": "new retain rows all the time, and only host memory to spare",
    "nvme": "neither device nor host memory to spare: the slowest",
}


def reference_modes(shape: Shape, setup: Setup) -> dict[str, ReferenceMode]:
    """What each mode that the run could have holds on one rank, the reference's LM head included."""
    modes = {}
    for name, right_when in RIGHT_WHEN.items():
        if name == "adapter" and not setup.num_adapter:
            continue
        lines = _reference(shape, setup._replace(reference=name))
        held = [sum(line.num_bytes for line in lines if line.where == place) for place in ("device", "host", "disk")]
        per_token = shape.hidden_size * setup.bytes_per_weight if name == "cached" else 0
        modes[name] = ReferenceMode(*held, per_token, right_when)
    return modes
