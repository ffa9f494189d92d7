"""What plans of memory and of communication need to know of a run: states, where they lie, and sizes of buffers."""

from __future__ import annotations

from typing import NamedTuple

from unlearn_ds.cost.shapes import Shape


class Setup(NamedTuple):
    """A run on ``world_size`` ranks, ``ranks_per_node`` of them on each node. Sizes are elements unless named bytes.

    stage: of ZeRO. bytes_per_weight: 2 in bf16, with fp32 master weights, or 4. reference: mode of the KL's frozen
    model, None without a KL term. num_tokens, num_kl_tokens: of a micro-batch, all and of the rows with a KL. hpz: over
    how many ranks the second copy of the weights is divided, 1 without. offload_*: "none", "cpu" or "nvme".
    num_adapter: parameters of LoRA adapters, 0 when all weights are trained. persistence: weights below it stay whole
    on every rank. on_gpu: a CUDA context and NCCL's buffers count.
    """

    stage: int
    world_size: int
    ranks_per_node: int
    bytes_per_weight: int
    reference: str | None
    num_tokens: int
    num_kl_tokens: int
    accumulation: int
    checkpointing: bool
    workspace_bytes: int
    hpz: int = 1
    offload_param: str = "none"
    offload_optimizer: str = "none"
    num_adapter: int = 0
    reduce_bucket: int = 0
    gather_bucket: int = 0
    prefetch: int = 0
    persistence: int = 0
    max_live: int = 10**9
    max_reuse: int = 10**9
    sub_group: int = 10**9
    communication_bytes: int = 0
    on_gpu: bool = True

    @property
    def mixed(self) -> bool:
        return self.bytes_per_weight < 4

    def divided(self, least_stage: int) -> int:
        """Ranks over which a state is divided that ZeRO divides from ``least_stage`` on."""
        return max(1, self.world_size) if self.stage >= least_stage else 1

    def trained(self, shape: Shape) -> int:
        """Parameters with a gradient."""
        return self.num_adapter or shape.total

    def persistent(self, shape: Shape) -> int:
        """Elements of weights that stay whole on every rank under ZeRO-3."""
        return sum(n for n in shape.weights if n < self.persistence) if self.stage == 3 else 0
