"""Sizes of a model and FLOPs of a step."""

from __future__ import annotations

from typing import NamedTuple


class ModelSize(NamedTuple):
    """Parameters in matrix products: of the body, run on every token, and of the LM head, run on response tokens.

    total: all parameters, embeddings included."""

    body: int
    head: int
    total: int
    num_layers: int
    hidden_size: int
    vocab_size: int


def step_flops(size: ModelSize, num_tokens: int, num_response_tokens: int, num_adapter: int = 0) -> float:
    """Model FLOPs of training on so many tokens: forward 2 and backward 4 for each parameter a token meets.

    With ``num_adapter`` parameters of LoRA adapters, the frozen weights cost 4: their own gradient is never made.
    Attention scores, recomputation and the reference are left out, as in model-FLOPs utilisation.
    """
    per_weight = 4.0 if num_adapter else 6.0
    met = size.body * num_tokens + size.head * num_response_tokens
    return per_weight * met + 6.0 * num_adapter * num_tokens
