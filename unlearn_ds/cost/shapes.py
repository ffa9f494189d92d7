"""Shapes of models: the weights of each layer, and those of preset models whose repositories cannot be read offline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from unlearn_ds.cost.flops import ModelSize


class Shape(NamedTuple):
    """An architecture as plans see it.

    num_kv_heads: heads of keys and values. intermediate_size: width of the MLP; ``gated``: it has three matrices
    (SwiGLU) instead of two. outer: elements of each weight outside the layers, LM head last and not twice where it is
    tied. layer: elements of each weight of one layer, in order of use.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    gated: bool
    tied: bool
    outer: tuple[int, ...]
    layer: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.outer) + self.num_layers * sum(self.layer)

    @property
    def head(self) -> int:
        """Elements of the LM head."""
        return self.vocab_size * self.hidden_size

    @property
    def matrices(self) -> int:
        """Elements in matrix products of one layer: neither norms nor biases."""
        return sum(n for n in self.layer if n > max(self.intermediate_size, self.num_heads * self.head_dim))

    @property
    def weights(self) -> tuple[int, ...]:
        """Elements of every weight: outside the layers, then layer by layer."""
        return self.outer + self.num_layers * self.layer

    @property
    def largest(self) -> int:
        return max(self.weights)

    def size(self) -> ModelSize:
        return ModelSize(
            self.num_layers * self.matrices, self.head, self.total, self.num_layers, self.hidden_size, self.vocab_size
        )

    def adapter(self, rank: int, targets: tuple[str, ...]) -> int:
        """Elements of LoRA adapters of ``rank`` around ``targets``; all linear modules of the layers without any.

        Names are Llama's; those of OPT stand for the same (``out_proj``, ``fc1``, ``fc2``)."""
        hidden, inner = self.hidden_size, self.intermediate_size
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        sides = {"q_proj": (hidden, query), "k_proj": (hidden, key), "v_proj": (hidden, key)}
        if self.gated:
            sides |= {
                "o_proj": (query, hidden), "gate_proj": (hidden, inner), "up_proj": (hidden, inner),
                "down_proj": (inner, hidden),
            }  # fmt: skip
        else:
            sides |= {"out_proj": (query, hidden), "fc1": (hidden, inner), "fc2": (inner, hidden)}
        chosen = [sides[name] for name in targets or sides if name in sides]
        return self.num_layers * rank * sum(a + b for a, b in chosen)


def llama(values: Mapping[str, Any]) -> Shape:
    """Shape of a Llama from the numbers of its configuration: no biases, RMS norms, a head of its own unless tied."""
    hidden, inner, vocab = values["hidden_size"], values["intermediate_size"], values["vocab_size"]
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    tied, head_dim = values["tie_word_embeddings"], hidden // heads
    square, narrow, wide = hidden * heads * head_dim, hidden * kv_heads * head_dim, hidden * inner
    outer = (vocab * hidden, hidden) if tied else (vocab * hidden, hidden, vocab * hidden)
    return Shape(
        hidden, values["num_hidden_layers"], heads, kv_heads, head_dim, inner, vocab, True, tied, outer,
        (hidden, square, narrow, narrow, square, hidden, wide, wide, wide),
    )  # fmt: skip


def opt(values: Mapping[str, Any]) -> Shape:
    """Shape of an OPT: biases everywhere, layer norms, learned positions (two more than its longest text), tied."""
    hidden, inner, vocab = values["hidden_size"], values["ffn_dim"], values["vocab_size"]
    heads, wide, square = values["num_attention_heads"], hidden * inner, hidden * hidden
    outer = (vocab * hidden, (values["max_position_embeddings"] + 2) * hidden, hidden, hidden)
    attention = (square, hidden) * 4
    return Shape(
        hidden, values["num_hidden_layers"], heads, heads, hidden // heads, inner, vocab, False, True, outer,
        (hidden, hidden, *attention, hidden, hidden, wide, inner, wide, hidden),
    )  # fmt: skip


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": vocab, "tie_word_embeddings": False,
    }  # fmt: skip


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "ffn_dim": 4 * hidden, "vocab_size": 50272, "max_position_embeddings": 2048,
    }  # fmt: skip


def llama_of(*numbers: int) -> Shape:
    """Hidden size, layers, heads, key heads, width of the MLP, vocabulary."""
    return llama(_llama(*numbers))


def opt_of(*numbers: int) -> Shape:
    """Hidden size, layers, heads."""
    return opt(_opt(*numbers))


PUBLIC: Mapping[str, Mapping[str, Any]] = {
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "meta-llama/Llama-2-7b-hf": _llama(4096, 32, 32, 32, 11008, 32000),
    "meta-llama/Llama-2-13b-hf": _llama(5120, 40, 40, 40, 13824, 32000),
    "meta-llama/Llama-2-70b-hf": _llama(8192, 80, 64, 8, 28672, 32000),
    "meta-llama/Meta-Llama-3-8B": _llama(4096, 32, 32, 8, 14336, 128256),
    "meta-llama/Meta-Llama-3-70B": _llama(8192, 80, 64, 8, 28672, 128256),
}
"""hub id -> numbers of its config.json, as its model card gives them. Llama's repositories need a licence and a hub."""


def of_values(values: Mapping[str, Any]) -> Shape:
    """Shape of a model of ``PUBLIC``."""
    return {"llama": llama, "opt": opt}[values["model_type"]](values)


def public(name: str) -> Shape | None:
    """Shape of a hub id of ``PUBLIC``; None for any other model."""
    return of_values(PUBLIC[name]) if name in PUBLIC else None
