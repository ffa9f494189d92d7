"""Packed scoring of other architectures against their own padded forward: positions, windows, caps and scales."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from unlearn_ds.data.packing import Placed, pack, pack_scored
from unlearn_ds.model import PackedCausalLM, load_causal_lm
from unlearn_ds.types import EncodedRow, Term

VOCABULARY = 97
SMALL = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GEMMA = {**SMALL, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}


def opt():
    return transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.2, dropout=0.3, attention_dropout=0.3,
    )  # fmt: skip


CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "opt": opt,
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "mistral_window": lambda: transformers.MistralConfig(**SMALL, sliding_window=4),
    "cohere_logit_scale": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
    "gemma2_final_softcap": lambda: transformers.Gemma2Config(
        **GEMMA, final_logit_softcapping=2.0, attn_logit_softcapping=None
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    ),
    "granite_logits_scaling": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
    "gemma3_window": lambda: transformers.Gemma3TextConfig(**GEMMA),
}


@pytest.fixture(params=CONFIGS)
def model_dir(request, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]()).save_pretrained(tmp_path)
    return tmp_path


def make_rows() -> list[EncodedRow]:
    draw = torch.Generator().manual_seed(0)
    cuts = [(3, 4), (1, 9), (11, 1), (6, 7)]
    ids = [torch.randint(3, VOCABULARY, (p + a,), generator=draw).tolist() for p, a in cuts]
    return [EncodedRow(tuple(x[:p]), tuple(x[p:])) for x, (p, _) in zip(ids, cuts, strict=True)]


def nll_one_by_one(model, rows) -> torch.Tensor:
    parts = []
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.answer_ids]])
        logp = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
        parts.append(-logp[:-1].gather(1, ids[0, 1:, None]).squeeze(1)[len(row.prompt_ids) - 1 :])
    return torch.cat(parts)


@torch.no_grad()
def test_packed_nll_equals_each_row_alone(model_dir):
    rows = make_rows()
    expected = nll_one_by_one(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval(), rows)
    packed = PackedCausalLM(load_causal_lm(str(model_dir), torch.float32), "sdpa").eval()
    torch.testing.assert_close(packed(pack_scored(rows)), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01


def test_packed_gradients_equal_each_row_alone(model_dir):
    rows = make_rows()
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    nll_one_by_one(plain, rows).sum().backward()
    packed = PackedCausalLM(load_causal_lm(str(model_dir), torch.float32), "sdpa").eval()
    batch = pack([Placed(row, 0, 1.0) for row in rows], [Term("forget", "forget", "ce", 1.0)])
    packed(batch)[0].backward()
    gradients = {name: p.grad for name, p in packed.causal_lm.named_parameters()}
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            difference = (gradients[name] - parameter.grad).norm()
            assert difference <= 1e-4 * parameter.grad.norm() + 1e-5, name


def test_dropout_is_off_even_in_training(model_dir):
    """Defect D10: with dropout in the policy alone the KL to the reference is noise at the first step."""
    packed = PackedCausalLM(load_causal_lm(str(model_dir), torch.float32), "sdpa").train()
    batch = pack_scored(make_rows())
    first, second = packed(batch)[1], packed(batch)[1]
    assert torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(packed.eval()(batch), first)


REFUSED = {
    "sinks": (
        lambda: transformers.GptOssConfig(
            **{**SMALL, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 4}
        ),
        "s_aux",
    ),
    "convolutions": (lambda: transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]), "conv"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_packing_would_compute_wrongly_is_refused(tmp_path, name):
    config, reason = REFUSED[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):
        PackedCausalLM(load_causal_lm(str(tmp_path), torch.float32), "sdpa")(pack_scored(make_rows()))


def test_soft_capped_attention_is_refused_and_not_forgotten(tmp_path):
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=30.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    packed = PackedCausalLM(load_causal_lm(str(tmp_path), torch.float32), "sdpa")
    with pytest.raises(ValueError, match="soft-cap"):
        packed(pack_scored(make_rows()))
