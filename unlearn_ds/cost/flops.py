"""Sizes of a model and FLOPs of a step: model FLOPs, which the mathematics needs, and what the hardware does beyond."""

from __future__ import annotations

from collections.abc import Mapping
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


class Products(NamedTuple):
    """What a model multiplies, in matrix elements: each costs a token 2 FLOPs a product.

    forward: elements that every token meets, LoRA adapters included. plain: those without adapters. backward: elements
    once for the gradient of their input where that is needed and once for their own where they are trained.
    recomputed: elements that activation checkpointing runs a second time. head: of the LM head, which response tokens
    alone meet. head_trained: whether it has a gradient. attention: sliding window (None: all earlier tokens) -> heads
    times width of a head, summed over the layers with that window; keys that heads share are read by each of them.
    capped_scores: whether attention soft-caps its scores.
    """

    forward: int
    plain: int
    backward: int
    recomputed: int
    head: int
    head_trained: bool
    attention: Mapping[int | None, int]
    capped_scores: bool = False


class Work(NamedTuple):
    """What a batch puts through a model.

    pairs: sliding window -> (query, key) pairs that its attention needs. executed: pairs that the implementation at
    hand computes: copies of shared prompts, and the corners of rectangles. num_bounded: response tokens whose loss is
    looked at twice because their sequence has a bound. reference: the part that the frozen reference runs on.
    """

    num_tokens: int
    num_response_tokens: int
    pairs: Mapping[int | None, int]
    executed: Mapping[int | None, int]
    num_bounded: int = 0
    reference: Work | None = None


class Flops(NamedTuple):
    """FLOPs of a batch. ``model`` is what the objective needs of the policy; the others come on top of it.

    recomputation: of activations in backward. reference: of the frozen model. attention: pairs that are masked or
    computed more than once. bound: of looking at bounded losses first.
    """

    model: float
    recomputation: float = 0.0
    reference: float = 0.0
    attention: float = 0.0
    bound: float = 0.0

    @property
    def hardware(self) -> float:
        """What the device does in all."""
        return sum(self)


def count(products: Products, work: Work, *, checkpointing: bool, reference: str | None) -> Flops:
    """FLOPs of one batch: forward and backward of the policy, and the reference.

    Products with weights and with keys and values count 2 FLOPs a multiplication and addition; norms, activations and
    the optimizer are left out, as is usual (PaLM, arXiv 2204.02311, appendix B). Embeddings are looked up and free.

    checkpointing: of activations. Once for each layer's attention and ``products.recomputed``. reference: a mode of
    ``--reference``; "cached" multiplies with the LM head alone, None (no KL term) does nothing.
    """
    head = 2.0 * products.head * work.num_response_tokens
    linear = 2.0 * (products.forward + products.backward) * work.num_tokens + head * (3 if products.head_trained else 2)
    attention, executed = _attention(products, work.pairs), _attention(products, work.executed)
    again = 2.0 * products.recomputed * work.num_tokens + executed if checkpointing else 0.0
    other = work.reference
    frozen = 0.0
    if other is not None and reference is not None:
        frozen = 2.0 * products.head * other.num_response_tokens
        if reference != "cached":
            frozen += 2.0 * products.plain * other.num_tokens + _attention(products, other.executed)
    # Backward of a product of two activations is two products.
    return Flops(
        linear + 3.0 * attention, again, frozen, 3.0 * (executed - attention), 2.0 * products.head * work.num_bounded
    )


def _attention(products: Products, pairs: Mapping[int | None, int]) -> float:
    """Forward FLOPs of scores and of the sums they weight: two products a pair."""
    return sum(4.0 * width * pairs[window] for window, width in products.attention.items())
