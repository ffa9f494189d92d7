"""Tiny random models of the architectures that are trained here, saved as a hub holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from unlearn_ds.types import EncodedRow

VOCABULARY = 97
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, **TOKENS,
)  # fmt: skip
GEMMA = {**SMALL, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 6}
OPT = dict(
    vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, init_std=0.2,
    max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.3, attention_dropout=0.3, **TOKENS,
)  # fmt: skip
NEOX = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, initializer_range=0.2, attention_dropout=0.2, hidden_dropout=0.2, **TOKENS,
)  # fmt: skip
GPT2 = dict(
    vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **TOKENS
)  # fmt: skip
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "opt": lambda: transformers.OPTConfig(**OPT),
    # 350m alone: embeddings narrower than the layers, a projection after them, norms behind attention and MLP.
    "opt_350m": lambda: transformers.OPTConfig(**{**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "opt_untied": lambda: transformers.OPTConfig(**OPT, tie_word_embeddings=False),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt2_scaled_by_layer": lambda: transformers.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama_tied_with_biases": lambda: transformers.LlamaConfig(
        **SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama3_rope": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=None),
    "mistral_window": lambda: transformers.MistralConfig(**SMALL, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2_window_above_layer_1": lambda: transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True),
    "gemma": lambda: transformers.GemmaConfig(**{**SMALL, "num_key_value_heads": 1}, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA, final_logit_softcapping=2.0, attn_logit_softcapping=1.5),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**NEOX),
    "gpt_neox_sequential": lambda: transformers.GPTNeoXConfig(**NEOX, use_parallel_residual=False),
    "phi3": lambda: transformers.Phi3Config(**SMALL, sliding_window=4),
    "cohere_logit_scale": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
    "granite_logits_scaling": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
    "hyperclovax_logits_scaling": lambda: transformers.HyperCLOVAXConfig(**SMALL, logits_scaling=0.5),
}


def save(config: PretrainedConfig, folder: Path, file_format: str = "safetensors") -> Path:
    """Write a random model into ``folder`` and return it. Noise is on every parameter: biases and norms do something.

    file_format: "safetensors", "sharded" (several files and their index) or "bin" (``pytorch_model.bin``).
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size="20KB" if file_format == "sharded" else "5GB")
    if file_format == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def make_rows(seed: int = 0) -> list[EncodedRow]:
    """Rows of uneven lengths, longer than the windows above."""
    draw = torch.Generator().manual_seed(seed)
    cuts = [(3, 4), (1, 9), (11, 1), (6, 7)]
    ids = [torch.randint(3, VOCABULARY, (p + a,), generator=draw).tolist() for p, a in cuts]
    return [EncodedRow(tuple(x[:p]), tuple(x[p:])) for x, (p, _) in zip(ids, cuts, strict=True)]


def padded_logp(model: torch.nn.Module, rows: list[EncodedRow]) -> list[torch.Tensor]:
    """Log-probabilities [answer tokens, V] of each row from one right-padded forward, as transformers documents it."""
    longest = max(map(len, rows))
    ids = [[*row.prompt_ids, *row.answer_ids] + [0] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    logits = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return [logp[i, len(row.prompt_ids) - 1 : len(row) - 1] for i, row in enumerate(rows)]


def padded_nll(model: torch.nn.Module, rows: list[EncodedRow]) -> list[torch.Tensor]:
    """Negative log-likelihood of each answer token, [answer tokens] a row."""
    answers = [torch.tensor(row.answer_ids)[:, None] for row in rows]
    return [-p.gather(1, ids).squeeze(1) for p, ids in zip(padded_logp(model, rows), answers, strict=True)]
