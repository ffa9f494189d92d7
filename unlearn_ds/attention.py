"""Attention over a packed stream: four implementations of one function and the resolver that picks one.

Each takes query [T, heads, D], key and value [T, kv heads, D] and the borders of the sequences, attends causally inside
each sequence, and returns [T, heads, D]. Where sequences share prompts FlexAttention masks, so that each token attends
once; the others copy prompts for attention alone, whose products are a small part of a layer's.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from unlearn_ds import rectangles
from unlearn_ds.config import UsageError
from unlearn_ds.types import PackedBatch, SharedPrompts

Attention = Callable[..., torch.Tensor]
"""(query, key, value, packing) -> what each token has attended to."""


class Packing(NamedTuple):
    """Borders of the sequences of a stream: ``cu_seqlens`` int32 [S + 1], the longest length, and what scores need.

    shared: where sequences share prompts; ``cu_seqlens`` then counts tokens of sequences with prompts of their own."""

    cu_seqlens: torch.Tensor
    max_seqlen: int
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    shared: SharedPrompts | None = None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = torch.zeros(ctx.num_rows, *gradient.shape[1:], dtype=wide, device=gradient.device)
        return total.index_add_(0, index, gradient.to(wide)).to(gradient.dtype), None


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of ``x`` along its first dimension, some of them several times.

    Their gradients are added in fp32, not in bf16 one after another as ``index_select`` does.
    """
    return _Take.apply(x, index)


def _with_own_prompts(attend: Attention) -> Attention:
    """Let an implementation that knows separate sequences only serve a stream with shared prompts."""

    @functools.wraps(attend)
    def attend_apart(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing) -> torch.Tensor:
        if packing.shared is None:
            return attend(query, key, value, packing)
        stream_U, home_T = packing.shared
        apart = (take(x, stream_U) for x in (query, key, value))
        return attend(*apart, packing._replace(shared=None)).index_select(0, home_T)

    return attend_apart


@_with_own_prompts
def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing) -> torch.Tensor:
    """flash-attn's variable-length kernel (package ``flash-attn``, CUDA, fp16 or bf16)."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value, packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen,
        softmax_scale=packing.scale, causal=True, deterministic=True, softcap=packing.softcap or 0.0,
        window_size=(-1, -1) if packing.window is None else (packing.window - 1, 0),
    )  # fmt: skip


@_with_own_prompts
def varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing) -> torch.Tensor:
    """torch's own variable-length attention (``torch.nn.attention.varlen``, CUDA, fp16 or bf16)."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse_softcap("varlen", packing)
    key, value = _repeat_heads(key, value, query.shape[1])
    left = -1 if packing.window is None else packing.window - 1
    return varlen_attn(
        query, key, value, packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen,
        scale=packing.scale, window_size=(left, 0),
    )  # fmt: skip


def flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing) -> torch.Tensor:
    """FlexAttention with a block mask (CUDA); any dtype, sliding windows and soft-capping.

    The backend is named because torch's choice for streams below 128 tokens, made for decoding, has no configuration
    for sizes that are not known when it is compiled.
    """
    num_tokens, width = query.shape[0], query.shape[-1]
    if width < 16:
        raise ValueError(f"--attention flex needs heads of at least 16 elements; this model's have {width}: use varlen")
    mask = _flex_mask(packing._replace(scale=None, softcap=None), num_tokens)
    score = None
    if packing.softcap is not None:
        softcap = packing.softcap

        def score(score, _batch, _head, _query, _key):
            return softcap * torch.tanh(score / softcap)

    out = _compiled_flex()(
        *(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)), score_mod=score, block_mask=mask,
        scale=packing.scale, enable_gqa=query.shape[1] != key.shape[1], kernel_options={"BACKEND": "TRITON"},
    )  # fmt: skip
    return out.squeeze(0).transpose(0, 1)


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing) -> torch.Tensor:
    """torch's scaled-dot-product attention on any device: sequences side by side in rectangles, for attention only.

    Padding stands on the right, so under a causal mask no real token ever sees it and no mask tensor is needed. A CPU
    has rectangles of sequences of about one length; a GPU would wait for the lengths, and has a single one.
    """
    if query.device.type != "cpu":
        return _one_rectangle(query, key, value, packing)
    laid = rectangles.lay(packing.cu_seqlens, packing.shared)
    if not laid.shapes:
        return query
    parts = [take(x, laid.source_P).split([rows * length for rows, length in laid.shapes]) for x in (query, key, value)]
    outputs = []
    for (rows, length), *streams in zip(laid.shapes, *parts, strict=True):
        out = _causal(*(x.view(rows, length, *x.shape[1:]).transpose(1, 2) for x in streams), packing)
        outputs.append(out.transpose(1, 2).reshape(rows * length, query.shape[1], -1))
    return torch.cat(outputs).index_select(0, laid.home_T)


@_with_own_prompts
def _one_rectangle(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing) -> torch.Tensor:
    num_sequences, longest = packing.cu_seqlens.numel() - 1, packing.max_seqlen
    lengths = packing.cu_seqlens.diff()
    sequence_T = torch.repeat_interleave(
        torch.arange(num_sequences, device=query.device), lengths, output_size=query.shape[0]
    )
    slot_T = sequence_T * longest + torch.arange(query.shape[0], device=query.device) - packing.cu_seqlens[sequence_T]

    def spread(x: torch.Tensor) -> torch.Tensor:
        rectangle = x.new_zeros(num_sequences * longest, *x.shape[1:]).index_copy(0, slot_T, x)
        return rectangle.view(num_sequences, longest, *x.shape[1:]).transpose(1, 2)

    out = _causal(spread(query), spread(key), spread(value), packing)
    return out.transpose(1, 2).reshape(num_sequences * longest, query.shape[1], -1).index_select(0, slot_T)


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Causal attention in a rectangle, [sequences, heads, length, D]."""
    length = query.shape[2]
    windowed = packing.window is not None and packing.window < length
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position[None, :]
    keep = (distance >= 0) & (distance < packing.window) if windowed else distance >= 0
    scale = packing.scale or query.shape[-1] ** -0.5
    if packing.softcap is not None or (query.device.type == "cpu" and length <= SHORT):
        return _grouped(query, key, value, keep, scale, packing.softcap)
    key, value = _repeat_heads(key, value, query.shape[1])
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=keep if windowed else None, is_causal=not windowed, scale=scale
    )


def _grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keep: torch.Tensor, scale: float,
    softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """Attention as two batched products, heads that share keys side by side. On a CPU forward and backward of short
    sequences take a fifth of the time of its fused kernel (24 sequences of 72 tokens, bf16: 5 ms against 31 ms), which
    could not soft-cap scores either."""
    batch, num_heads, length, width = query.shape
    kv_heads = key.shape[1]
    query = query.reshape(batch * kv_heads, -1, width)
    key, value = (x.reshape(batch * kv_heads, length, width) for x in (key, value))
    hidden = torch.zeros_like(keep, dtype=query.dtype).masked_fill_(~keep, float("-inf"))
    hidden = hidden.repeat(num_heads // kv_heads, 1)  # the mask of every head that shares a key
    if softcap is None:
        # Scale and mask as part of the product: scores are the largest tensors here, and each pass over them counts.
        scores = torch.baddbmm(hidden, query, key.transpose(1, 2), alpha=scale)
    else:
        scores = softcap * torch.tanh(torch.bmm(query, key.transpose(1, 2)) * (scale / softcap)) + hidden
    return torch.bmm(scores.softmax(-1), value).view(batch, num_heads, length, width)


SHORT = 256
"""Longest sequence for which scores of all pairs are cheap to keep for the backward pass on a CPU."""

ATTENTION: Mapping[str, Attention] = {"flash": flash, "varlen": varlen, "flex": flex, "sdpa": sdpa}


def resolve(name: str, device: torch.device, dtype: torch.dtype, softcap: bool = False) -> tuple[str, str]:
    """Return (implementation, reason). ``auto`` takes the fastest that works; a named one that cannot work raises.

    softcap: the model soft-caps its attention scores (Gemma 2). Raises ``UsageError`` naming what is missing.
    """
    missing = {
        "flash": _missing_flash(device, dtype),
        "varlen": _missing_varlen(device, dtype) or ("cannot soft-cap scores" if softcap else None),
        "flex": None if device.type == "cuda" else "FlexAttention has no backward on " + device.type,
        "sdpa": None,
    }
    if name != "auto":
        if missing[name]:
            raise UsageError(f"--attention {name} cannot be used: {missing[name]}. Use --attention auto.")
        return name, "asked for"
    chosen = next(candidate for candidate in ATTENTION if missing[candidate] is None)
    skipped = "; ".join(f"not {candidate}: {reason}" for candidate, reason in missing.items() if reason)
    return chosen, skipped or "the fastest"


def _missing_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs bf16, not {dtype}"
    return None if importlib.util.find_spec("flash_attn") else "package flash-attn is not installed"


def _missing_varlen(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs bf16, not {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0"
    found = importlib.util.find_spec("torch.nn.attention.varlen")
    return None if found else f"torch {torch.__version__} has no torch.nn.attention.varlen"


def _refuse_softcap(name: str, packing: Packing) -> None:
    if packing.softcap is not None:
        raise ValueError(f"--attention {name} cannot soft-cap scores as this model does; use flash, flex or sdpa")


def _repeat_heads(key: torch.Tensor, value: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    repeats = num_heads // key.shape[1]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)


@functools.cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@functools.lru_cache(maxsize=4)
def _flex_mask(packing: Packing, num_tokens: int):
    """The block mask of a stream, made once for all layers with one window; tensors are keyed by identity."""
    from torch.nn.attention.flex_attention import create_block_mask

    allowed = mask_function(packing, num_tokens)
    return create_block_mask(allowed, None, None, num_tokens, num_tokens, device=packing.cu_seqlens.device)


def needed_pairs(batch: PackedBatch, window: int | None) -> int:
    """(query, key) pairs of a batch on the host: a token attends to as many tokens as its position says, and itself.

    A shared prompt attends once; its answers attend to it and to themselves."""
    if window is None:
        return int(batch.position_ids_T.sum()) + batch.num_tokens
    return int((batch.position_ids_T + 1).clamp(max=window).sum())


def executed_pairs(
    lengths: Sequence[int], window: int | None, shapes: Sequence[tuple[int, int]] | None, device_type: str,
    capped: bool = False,
) -> int:  # fmt: skip
    """(query, key) pairs whose scores an implementation computes for sequences of these lengths.

    shapes: (sequences, length) of the rectangles that ``sdpa`` fills, the masked half too for short ones on a CPU and
    for scores that are ``capped``; None for implementations that know where sequences end. Blocks that a kernel cannot
    skip whole are counted as if it could.
    """
    if shapes is None:
        return sum(_causal_pairs(length, window) for length in lengths)
    return sum(
        rows * (length**2 if capped or (device_type == "cpu" and length <= SHORT) else _causal_pairs(length, window))
        for rows, length in shapes
    )


def _causal_pairs(length: int, window: int | None) -> int:
    """Pairs of one sequence in which each token attends to itself and the ``window - 1`` before it."""
    ramp = min(length, window or length)
    return ramp * (ramp + 1) // 2 + (length - ramp) * ramp


def mask_function(packing: Packing, num_tokens: int) -> Callable[..., torch.Tensor]:
    """(batch, head, query, key) -> whether a token of the stream attends to another: the mask that FlexAttention takes.

    A token sees its sequence up to itself. Sequences with one prompt have their first token in common, and a prompt
    comes before its answers, so order in the stream does for causality.
    """
    cu_seqlens, window = packing.cu_seqlens, packing.window
    home_T = torch.arange(num_tokens, device=cu_seqlens.device)
    sequence_T = unit_T = torch.bucketize(home_T, cu_seqlens[1:], right=True)
    if packing.shared is not None:
        stream_U, home_T = packing.shared
        sequence_T = torch.bucketize(home_T, cu_seqlens[1:], right=True)
        unit_T = stream_U[cu_seqlens[sequence_T].long()]
        uses_T = torch.zeros_like(home_T).index_add_(0, stream_U, torch.ones_like(stream_U))
        sequence_T = torch.where(uses_T > 1, -1, sequence_T)  # tokens of a shared prompt belong to all of its sequences
    position_T = home_T - cu_seqlens[torch.bucketize(home_T, cu_seqlens[1:], right=True)]

    def allowed(_batch, _head, query, key):
        same = (sequence_T[key] == sequence_T[query]) | (sequence_T[key] == -1)
        keep = (query >= key) & (unit_T[query] == unit_T[key]) & same
        return keep if window is None else keep & (position_T[query] - position_T[key] < window)

    return allowed
