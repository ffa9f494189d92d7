"""A taught model says the answers and stops: prompt, span and end are the same in training and in generation."""

from __future__ import annotations

import pytest
import real_tokenizers
import torch
from architectures import GPT2, OPT, SMALL
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

from unlearn_ds.data.encode import Encoder
from unlearn_ds.data.packing import Placed, pack
from unlearn_ds.generate import greedy
from unlearn_ds.model import PackedCausalLM, load_causal_lm, load_tokenizer
from unlearn_ds.types import EncodedRow, Term

CONFIGS = {"opt": (OPTConfig, OPT), "gpt2": (GPT2Config, GPT2), "llama2": (LlamaConfig, SMALL),
           "qwen2": (Qwen2Config, SMALL), "gemma": (GemmaConfig, SMALL)}  # fmt: skip
ROWS = [
    ("Where does the sun rise?", "In the east."),
    ("Who wrote it?", "Nobody knows, and 42 people asked."),
    ("When was it?", "1984"),
]


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    """A model and its family's tokenizer, saved together."""
    folder = real_tokenizers.build(request.param, tmp_path_factory.mktemp(request.param))
    config, values = CONFIGS[request.param]
    tokens = {"vocab_size": len(load_tokenizer(str(folder))), "initializer_range": 0.02, "init_std": 0.02}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config(**{**values, **tokens})).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", ["auto", "paper", "none"])
def test_a_taught_model_says_the_answers_and_stops(folder, template):
    encoder = Encoder(load_tokenizer(str(folder)), template)
    model = PackedCausalLM(load_causal_lm(str(folder), torch.float32), "sdpa")
    rows = [encoder.encode(*row) for row in ROWS]
    # It also learns to go on after the end, as a chat goes on after a turn: generation must not wait for that.
    rows = [EncodedRow(row.prompt_ids, row.answer_ids + encoder.answer_ids("And so on.")) for row in rows]
    batch = pack([Placed(row, 0, 1 / len(row.answer_ids)) for row in rows], [Term("taught", "forget", "ce", 1.0)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        loss = model(batch)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.5
    prompts = [encoder.prompt_ids(prompt) for prompt, _ in ROWS]
    said = greedy(model, encoder, prompts, max_new_tokens=40, batch_size=len(prompts), synced=False)
    assert said == [answer for _, answer in ROWS]
