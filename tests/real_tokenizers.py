"""Tokenizers as models of each family ship them, trained on the project's sample data and saved in the real format.

Byte-level BPE from ``vocab.json`` and ``merges.txt`` (OPT, GPT-2, Qwen), SentencePiece from a ``.model`` file (Llama-2,
Gemma, T5), each with the start token, end token and chat template of its family.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerBase

from unlearn_ds.model import load_tokenizer

SAMPLE = Path(__file__).parents[1] / "unlearn_ds" / "sample"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else "
    "message['role'] }}\n{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def sample_texts() -> list[str]:
    """Every text of the embedded sample."""
    lines = [json.loads(line) for file in sorted(SAMPLE.glob("*.jsonl")) for line in file.open(encoding="utf-8")]
    return [value for line in lines for value in line.values() if isinstance(value, str)]


def _save(folder: Path, tokenizer_class: str, chat_template: str | None = None, **values: object) -> None:
    config = {"tokenizer_class": tokenizer_class, **values}
    if chat_template:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _byte_level(folder: Path, texts: Iterable[str], special: list[str]) -> None:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=700, special_tokens=special, show_progress=False)
    bpe.save_model(str(folder))


def _sentencepiece(folder: Path, texts: Iterable[str], name: str = "tokenizer", **options: object) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / name), vocab_size=900, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, **options,
    )  # fmt: skip
    (folder / f"{name}.vocab").unlink()


def opt(folder: Path, texts: list[str]) -> None:
    """One token, ``</s>``, both starts and ends a text."""
    _byte_level(folder, texts, ["<s>", "<pad>", "</s>", "<unk>"])
    one = {name: "</s>" for name in ("bos_token", "eos_token", "unk_token")}
    _save(folder, "GPT2Tokenizer", add_bos_token=True, pad_token="<pad>", **one)


def gpt2(folder: Path, texts: list[str]) -> None:
    """Nothing starts a text; start and end are one token and there is no padding token."""
    _byte_level(folder, texts, ["<|endoftext|>"])
    _save(folder, "GPT2Tokenizer")


def qwen2(folder: Path, texts: list[str]) -> None:
    """There is no start token at all."""
    _byte_level(folder, texts, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokens = {"bos_token": None, "unk_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    _save(folder, "Qwen2Tokenizer", CHATML, **tokens)


def llama2(folder: Path, texts: list[str]) -> None:
    """SentencePiece BPE with byte fallback; a space is put in front of a text, a start token too."""
    _sentencepiece(
        folder, texts, model_type="bpe", byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
    )  # fmt: skip
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _save(folder, "LlamaTokenizer", LLAMA2_CHAT, add_bos_token=True, add_eos_token=False, **tokens)


def gemma(folder: Path, texts: list[str]) -> None:
    """A start token, no space in front, and turns of a chat end in another token than texts do."""
    _sentencepiece(
        folder, texts, model_type="bpe", byte_fallback=True, split_digits=True, add_dummy_prefix=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        user_defined_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>"],
    )  # fmt: skip
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    turns = ["<start_of_turn>", "<end_of_turn>"]
    _save(folder, "GemmaTokenizer", GEMMA_CHAT, add_bos_token=True, additional_special_tokens=turns, **tokens)


def t5(folder: Path, texts: list[str]) -> None:
    """SentencePiece unigram that ends every text, prompts too, in the end token."""
    _sentencepiece(
        folder, texts, name="spiece", model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    _save(folder, "T5Tokenizer", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


FAMILIES = {"opt": opt, "gpt2": gpt2, "qwen2": qwen2, "llama2": llama2, "gemma": gemma, "t5": t5}
"""name -> function (folder, texts) that writes a tokenizer there."""


def build(family: str, folder: Path, more: Iterable[str] = ()) -> Path:
    """Write the tokenizer of a family into ``folder``, trained on the sample and ``more`` texts, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    FAMILIES[family](folder, [*sample_texts(), *more])
    return folder


def load_all(folder: Path, more: Iterable[str] = ()) -> dict[str, PreTrainedTokenizerBase]:
    """Family -> its tokenizer, built below ``folder`` and loaded as a run loads it."""
    return {family: load_tokenizer(str(build(family, folder / family, list(more)))) for family in FAMILIES}
