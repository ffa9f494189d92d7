"""Greedy answers from a model, in batches that are the same for every number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from unlearn_ds import dist
from unlearn_ds.data.encode import Encoder
from unlearn_ds.model import PackedCausalLM


def greedy(
    model: PackedCausalLM, encoder: Encoder, prompts: Sequence[tuple[int, ...]], *,
    max_new_tokens: int, batch_size: int, synced: bool,
) -> list[str]:  # fmt: skip
    """Answer each prompt (token ids) and return the texts, in order, on every rank.

    synced: weights are sharded, so every rank runs the same number of batches.
    """
    with model.generating() as causal_lm:
        return over_ranks(
            prompts, batch_size, len, synced,
            lambda batch: greedy_batch(causal_lm, encoder, batch, max_new_tokens, synced),
        )  # fmt: skip


def greedy_batch(
    causal_lm: Any, encoder: Encoder, prompts: Sequence[tuple[int, ...]], max_new_tokens: int,
    synced: bool,
) -> list[str]:  # fmt: skip
    """Answers of a plain Hugging Face model to one batch of prompts, as texts."""
    tokenizer = encoder.tokenizer
    longest, pad = max(map(len, prompts)), tokenizer.eos_token_id
    ids_BL = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=causal_lm.device)
    # Padding is told by place, not by id: the pad id is also the true end of an answer.
    mask_BL = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=causal_lm.device)
    out_BL = causal_lm.generate(
        input_ids=ids_BL, attention_mask=mask_BL, max_new_tokens=max_new_tokens, do_sample=False,
        temperature=None, top_p=None, top_k=None, repetition_penalty=None,
        eos_token_id=[encoder.end_id, tokenizer.eos_token_id], pad_token_id=pad, synced_gpus=synced,
    )  # fmt: skip
    texts = tokenizer.batch_decode(out_BL[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def over_ranks(
    items: Sequence[Any],
    batch_size: int,
    length: Callable[[Any], int],
    synced: bool,
    run: Callable[[Sequence[Any]], list[Any]],
) -> list[Any]:
    """Run batches of items on all ranks and return the results in order, on every rank.

    Batches are cut once, items of like length together, and dealt to ranks whole: what a batch computes does not
    depend on the number of ranks. ``synced``: a rank without a batch left repeats its share's first, so all take part.
    """
    order = sorted(range(len(items)), key=lambda i: (length(items[i]), i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rank, world = dist.rank(), dist.world_size()
    mine: list[tuple[int, Any]] = []
    for first in range(0, len(batches), world):
        if first + rank < len(batches):
            batch = batches[first + rank]
            mine += zip(batch, run([items[i] for i in batch]), strict=True)
        elif synced:
            run([items[i] for i in batches[0]])
    results = dict(pair for part in dist.gather_objects(mine) for pair in part)
    return [results[i] for i in range(len(items))]
