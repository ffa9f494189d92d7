from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, LlamaForCausalLM

from unlearn_ds.data.packing import pack_scored
from unlearn_ds.model import LossHead, PackedCausalLM, content_digest, load_causal_lm, load_tokenizer, size
from unlearn_ds.types import EncodedRow

ROWS = [EncodedRow((5, 6, 7), (8, 9, 10)), EncodedRow((11,), (12, 13))]


@pytest.fixture
def wrapper(random_llama_dir) -> PackedCausalLM:
    return PackedCausalLM(load_causal_lm(str(random_llama_dir), torch.float32), "sdpa")


def test_a_tokenizer_without_an_end_token_is_refused(random_llama_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(random_llama_dir)
    assert load_tokenizer(str(random_llama_dir)).eos_token == "<|im_end|>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path))


def test_the_head_keeps_its_place_names_and_tie(wrapper, random_llama_dir):
    plain = AutoModelForCausalLM.from_pretrained(random_llama_dir)
    assert isinstance(wrapper.causal_lm.get_output_embeddings(), LossHead)
    assert wrapper.causal_lm.state_dict().keys() == plain.state_dict().keys()
    assert wrapper.causal_lm.lm_head.weight is wrapper.causal_lm.get_input_embeddings().weight


def test_the_head_of_a_wrapped_model_still_makes_logits(wrapper, random_llama_dir):
    plain = AutoModelForCausalLM.from_pretrained(random_llama_dir)
    ids = torch.tensor([[5, 6, 7, 8]])
    with wrapper.generating() as model:
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)


def test_a_head_with_a_bias_is_refused(random_llama_dir):
    model = load_causal_lm(str(random_llama_dir), torch.float32)
    model.lm_head = nn.Linear(64, 512, bias=True)
    with pytest.raises(ValueError, match="no plain linear layer without bias"):
        PackedCausalLM(model, "sdpa")


def test_generation_is_that_of_the_plain_model_and_leaves_the_wrapper_as_it_was(wrapper, random_llama_dir):
    plain = AutoModelForCausalLM.from_pretrained(random_llama_dir)
    ids = torch.tensor([[2, 2, 5, 6, 7], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    wrapper.train()
    before = wrapper(pack_scored(ROWS))[1]
    with wrapper.generating() as model:
        assert not model.training and not torch.is_grad_enabled()
        assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    assert wrapper.causal_lm.training and torch.is_grad_enabled()
    assert torch.equal(wrapper(pack_scored(ROWS))[1], before)


def test_an_error_in_generation_leaves_the_wrapper_as_it_was(wrapper):
    before = wrapper(pack_scored(ROWS))[1]
    with pytest.raises(RuntimeError, match="boom"), wrapper.generating():
        raise RuntimeError("boom")
    assert torch.equal(wrapper(pack_scored(ROWS))[1], before)


def test_two_wrapped_models_do_not_disturb_each_other(random_llama_dir):
    one, two = (PackedCausalLM(load_causal_lm(str(random_llama_dir), torch.float32), "sdpa") for _ in range(2))
    with torch.no_grad():
        before = one(pack_scored(ROWS))[0]
        with two.generating():
            assert torch.equal(one(pack_scored(ROWS))[0], before)


def test_dropout_is_switched_off_on_loading(tmp_path):
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        attention_dropout=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), torch.float32).train()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_the_digest_of_a_model_follows_its_content_and_not_its_place(random_llama_dir, tmp_path):
    model = load_causal_lm(str(random_llama_dir), torch.float32)
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert content_digest(str(tmp_path / "a")) == content_digest(str(tmp_path / "b"))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "c")
    assert content_digest(str(tmp_path / "c")) != content_digest(str(tmp_path / "a"))
    assert content_digest("org/name") != content_digest("org/name", "v2")


def test_sizes_are_counted_without_weights(random_llama_dir):
    model = AutoModelForCausalLM.from_pretrained(random_llama_dir)
    counted = size(model.config)
    linear = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)}
    assert counted.head == 512 * 64 and counted.body == sum(linear.values()) - counted.head
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted[3:] == (2, 64, 512)


def test_the_transposed_layers_of_gpt2_count_as_matrix_products_too():
    counted = size(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    assert counted.head == 97 * 32
    assert counted.body == 2 * (3 + 1 + 4 + 4) * 32 * 32  # query, key and value; output; up; down
