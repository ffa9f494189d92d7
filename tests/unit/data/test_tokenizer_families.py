"""The start, the end and the chat template of each family's tokenizer, loaded from the files that families ship."""

from __future__ import annotations

import pytest
import real_tokenizers

from unlearn_ds.config import UsageError
from unlearn_ds.data.encode import Encoder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return real_tokenizers.load_all(tmp_path_factory.mktemp("tokenizers"))


STARTS = {"opt": "</s>", "gpt2": None, "qwen2": None, "llama2": "<s>", "gemma": "<bos>", "t5": None}
ENDS = {"opt": "</s>", "gpt2": "<|endoftext|>", "qwen2": "<|im_end|>", "llama2": "</s>", "gemma": "<eos>", "t5": "</s>"}
OWN_CHAT = {
    "qwen2": ("<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\n", "In Paris.<|im_end|>"),
    "llama2": ("<s>[INST] Where is it? [/INST]", " In Paris.</s>"),
    "gemma": (
        "<bos><start_of_turn>user\nWhere is it?<end_of_turn>\n<start_of_turn>model\n", "In Paris.<end_of_turn>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", real_tokenizers.FAMILIES)
def test_a_family_starts_a_prompt_and_ends_an_answer_with_its_own_tokens_and_each_once(real, family):
    tokenizer = real[family]
    row = Encoder(tokenizer, "paper").encode("Where is it?", "In Paris.")
    tokens = tokenizer.convert_ids_to_tokens([*row.prompt_ids, *row.answer_ids])
    assert (tokens[0] == STARTS[family]) == (STARTS[family] is not None)
    assert tokens[-1] == ENDS[family]
    assert not {STARTS[family], ENDS[family], tokenizer.pad_token} & set(tokens[1:-1])


@pytest.mark.parametrize("family", OWN_CHAT)
def test_a_chat_is_that_of_its_template_with_one_start_token_and_the_end_of_the_turn(real, family):
    """Llama-2's template writes a space before an answer, Gemma's ends a turn in another token than a text."""
    tokenizer = real[family]
    row = Encoder(tokenizer).encode("Where is it?", "In Paris.")
    whole = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "In Paris."}]
    written = tokenizer(tokenizer.apply_chat_template(whole, tokenize=False), add_special_tokens=False)["input_ids"]
    ids = [*row.prompt_ids, *row.answer_ids]
    # What the template writes after the end of the turn is no answer; Llama-2's space before it is left out.
    assert ids[:-1] == written[: len(ids) - 1]
    assert ids[-1] in written[len(ids) - 1 :][:2]
    prompt, answer = OWN_CHAT[family]
    assert tokenizer.decode(row.prompt_ids) == prompt
    assert tokenizer.decode(ids) == prompt + answer


def test_the_answer_of_a_chat_may_start_with_the_space_that_its_template_writes(real):
    tokens = real["llama2"].convert_ids_to_tokens(
        Encoder(real["llama2"]).encode("Where is it?", "In Paris.").answer_ids
    )
    assert tokens[0].startswith("▁")


def test_a_template_that_refuses_a_system_message_says_what_to_do(real):
    with pytest.raises(UsageError, match="System role not supported.*leave --data.system_prompt out"):
        Encoder(real["gemma"], "chat", system_prompt="Be brief.")
