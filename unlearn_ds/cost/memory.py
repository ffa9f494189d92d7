"""The memory plan of a run, and what each home of the reference holds."""

from __future__ import annotations

from typing import NamedTuple

from unlearn_ds.cost.flops import ModelSize


def memory_plan(
    size: ModelSize, *, stage: int, world_size: int, bytes_per_weight: int, reference: str | None,
    num_tokens: int, checkpointing: bool, workspace_bytes: int, offload_param: bool = False,
    offload_optimizer: bool = False, num_adapter: int = 0,
) -> dict[str, int]:  # fmt: skip
    """Bytes on one device by use, before the first step. An estimate: allocators and libraries add to it.

    ZeRO divides optimizer states from stage 1, gradients from 2, weights from 3. With ``num_adapter`` parameters of
    LoRA adapters only these have gradients and optimizer states, and the LM head, being frozen, serves the reference
    too. An ``adapter`` reference takes nothing, a ``cached`` one keeps only its LM head, an ``nvme`` one lives on disk,
    an ``offload``ed one in host memory, and so do weights and optimizer states that the JSON offloads.
    Activations: about 2 bytes x hidden x layers a token with
    checkpointing, 34 without (Korthikanti et al., arXiv 2205.05198).
    """
    shard = [max(1, world_size) if stage >= least else 1 for least in (3, 2, 1)]
    mixed = bytes_per_weight < 4
    factor = 2 if checkpointing else 34
    on_host = [" (host memory)" if offloaded else "" for offloaded in (offload_param, offload_optimizer)]
    trained = num_adapter or size.total
    plan = {
        f"weights{on_host[0]}": (size.total + num_adapter) * bytes_per_weight // shard[0],
        "gradients": trained * bytes_per_weight // shard[1],
        f"optimizer, fp32 master and two moments{on_host[1]}": trained * (12 if mixed else 8) // shard[2],
        "activations": factor * num_tokens * size.hidden_size * size.num_layers * bytes_per_weight // 2,
    }
    if num_adapter:
        plan["loss workspace"] = workspace_bytes
    else:
        plan["loss workspace and LM head gradient"] = workspace_bytes + size.head * (4 + bytes_per_weight)
    if reference and not num_adapter:
        plan["LM head of the reference"] = size.head * bytes_per_weight
    place = {"resident": "reference", "offload": "reference (host memory)", "nvme": "reference (disk)"}
    if reference in place:
        plan[place[reference]] = size.total * bytes_per_weight // max(1, world_size)
    if stage == 3 or num_adapter:
        plan["whole copy, while evaluating"] = size.total * bytes_per_weight
    return plan


class ReferenceMode(NamedTuple):
    """A home of the frozen reference: bytes that one device, its host and the disk hold for it, bytes on the disk for
    each retain token, and when it is the right one."""

    device: int
    host: int
    disk: int
    disk_per_token: int
    right_when: str


def reference_modes(
    size: ModelSize, *, bytes_per_weight: int, world_size: int, num_adapter: int = 0
) -> dict[str, ReferenceMode]:
    """What each mode holds on one of ``world_size`` ranks, the reference's LM head included."""
    share = size.total * bytes_per_weight // max(1, world_size)
    head = 0 if num_adapter else size.head * bytes_per_weight
    modes = {
        "cached": ReferenceMode(
            head, 0, 0, size.hidden_size * bytes_per_weight,
            "full training for more than one pass over retain rows that stay the same; any disk all nodes share",
        ),
        "resident": ReferenceMode(share + head, 0, 0, 0, "new retain rows all the time, and device memory to spare"),
        "offload": ReferenceMode(head, share, 0, 0, "new retain rows all the time, and only host memory to spare"),
        "nvme": ReferenceMode(head, 0, share, 0, "neither device nor host memory to spare: the slowest"),
    }  # fmt: skip
    adapter = ReferenceMode(0, 0, 0, 0, "LoRA, always: the policy with its adapters off")
    return {"adapter": adapter, **modes} if num_adapter else modes
