"""Adapters put into a model: their shapes, what they leave alone, and the reference that is the model without them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from unlearn_ds import lora
from unlearn_ds.config import LoraConfig, UsageError
from unlearn_ds.data.packing import Placed, pack
from unlearn_ds.model import PackedCausalLM, load_causal_lm
from unlearn_ds.reference import AdapterReference, LiveReference
from unlearn_ds.types import EncodedRow, Term

TERMS = [Term("forget", "forget", "ce", -1.0), Term("retain", "retain", "kl", 1.0)]
BATCH = pack(
    [Placed(EncodedRow((7, 8), (9, 10)), 0, -0.5), Placed(EncodedRow((5, 6, 7), (40, 41, 42)), 1, 0.5),
     Placed(EncodedRow((11,), (12, 13)), 1, 0.25)], TERMS,
)  # fmt: skip
CONFIG = LoraConfig(rank=3, alpha=6.0)


@pytest.fixture
def base(random_llama_dir):
    return load_causal_lm(str(random_llama_dir), torch.float32)


@pytest.fixture
def wrapper(random_llama_dir) -> PackedCausalLM:
    """A model with adapters, as training knows it: random B, so that the adapters do something."""
    causal_lm = load_causal_lm(str(random_llama_dir), torch.float32)
    lora.add(causal_lm, CONFIG, seed=0)
    return PackedCausalLM(causal_lm, "sdpa")


def shake(wrapper):
    """Give B values, as steps would."""
    generator = torch.Generator().manual_seed(1)
    for layer in lora.layers(wrapper).values():
        layer.lora_B[lora.NAME].weight.data.normal_(0, 0.1, generator=generator)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_every_adapter_has_the_rank_that_was_asked_for(base, rank):
    """The published code asks AdaLoRA for 32 in a field that AdaLoRA does not read, and trains with 12 (D12)."""
    lora.add(base, LoraConfig(rank=rank, alpha=5.0), seed=0)
    found = lora.layers(base)
    assert len(found) == 2 * 7
    for layer in found.values():
        a, b = lora.adapter_parameters(layer)
        assert a.shape == (rank, layer.in_features) and b.shape == (layer.out_features, rank)
        assert layer.scaling[lora.NAME] == 5.0 / rank


def test_only_adapters_are_trained_and_they_have_no_dropout(base):
    names = {name for name, _ in base.named_parameters()}
    lora.add(base, CONFIG, seed=0)
    assert {n for n, p in base.named_parameters() if p.requires_grad} == {
        n for n, _ in base.named_parameters() if lora.is_adapter(n)
    }
    assert {lora.plain_name(n) for n, _ in base.named_parameters() if not lora.is_adapter(n)} == names
    for layer in lora.layers(base).values():
        assert not layer.lora_bias[lora.NAME]
        assert not any(isinstance(m, torch.nn.Dropout) for m in layer.modules())


def test_named_targets_alone_get_adapters(base):
    lora.add(base, LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj")), seed=0)
    assert {name.rpartition(".")[2] for name in lora.layers(base)} == {"q_proj", "down_proj"}


@pytest.mark.parametrize("target", ["q_porj", "lm_head", "embed_tokens", "norm"])
def test_a_target_without_a_linear_module_is_refused_with_those_that_are_there(base, target):
    with pytest.raises(UsageError, match=f"'{target}' is no linear module.*q_proj"):
        lora.add(base, LoraConfig(rank=2, alpha=4.0, targets=("q_proj", target)), seed=0)


def test_adapters_have_the_precision_of_their_weights(random_llama_dir):
    causal_lm = load_causal_lm(str(random_llama_dir), torch.bfloat16)
    lora.add(causal_lm, CONFIG, seed=0)
    assert {p.dtype for p in causal_lm.parameters()} == {torch.bfloat16}


def test_the_seed_alone_decides_the_start(random_llama_dir):
    started = []
    for ambient in (1, 2):
        causal_lm = load_causal_lm(str(random_llama_dir), torch.float32)
        torch.manual_seed(ambient)
        state = torch.get_rng_state()
        lora.add(causal_lm, CONFIG, seed=7)
        assert torch.equal(torch.get_rng_state(), state)
        started.append([p.clone() for n, p in causal_lm.named_parameters() if lora.is_adapter(n)])
    assert all(torch.equal(a, b) for a, b in zip(*started, strict=True))


def test_switched_off_it_is_the_model_without_adapters_and_trains_again_afterwards(wrapper, base):
    shake(wrapper)
    plain = PackedCausalLM(base, "sdpa")
    with torch.no_grad():
        expected, with_adapters = plain(BATCH, hidden_only=True), wrapper(BATCH, hidden_only=True)
        with lora.switched_off(wrapper):
            assert torch.equal(wrapper(BATCH, hidden_only=True), expected)
        assert torch.equal(wrapper(BATCH, hidden_only=True), with_adapters)
    assert not torch.allclose(with_adapters, expected)
    assert {n for n, p in wrapper.named_parameters() if p.requires_grad} == {
        n for n, _ in wrapper.named_parameters() if lora.is_adapter(n)
    }


def test_an_error_leaves_the_adapters_on(wrapper):
    with pytest.raises(RuntimeError, match="boom"), lora.switched_off(wrapper):
        raise RuntimeError("boom")
    assert not any(layer.disable_adapters for layer in lora.layers(wrapper).values())


def test_the_kl_to_the_model_without_adapters_is_exactly_zero_at_the_start(wrapper):
    _, loss_N = wrapper(BATCH, AdapterReference().rows(BATCH))
    assert loss_N[:2].min() > 0 and torch.equal(loss_N[2:], torch.zeros(5))


def test_the_adapter_reference_gives_loss_and_gradients_of_a_second_model(wrapper, base):
    shake(wrapper)
    second = PackedCausalLM(base, "sdpa").requires_grad_(False)
    live = LiveReference(lambda batch: second(batch, hidden_only=True), base.lm_head.weight.clone())
    results = []
    for reference in (AdapterReference(), live):
        wrapper.zero_grad()
        loss, loss_N = wrapper(BATCH, reference.rows(BATCH))
        loss.backward()
        results.append([loss, loss_N, *(p.grad for p in wrapper.parameters() if p.requires_grad)])
    assert results[0][1][2:].min() > 0
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert wrapper.causal_lm.lm_head.weight.grad is None


def test_merging_is_that_of_peft(wrapper):
    shake(wrapper)
    for layer in lora.layers(wrapper).values():
        ours = lora.merged_weight(layer)
        layer.merge()
        assert torch.equal(ours, layer.get_base_layer().weight)


def test_sizes_are_counted_without_weights(random_llama_dir, wrapper):
    config = AutoModelForCausalLM.from_pretrained(random_llama_dir).config
    assert lora.size(config, CONFIG) == sum(p.numel() for n, p in wrapper.named_parameters() if lora.is_adapter(n)) > 0
    assert lora.size(config, LoraConfig()) == 0
