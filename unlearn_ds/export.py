"""The unlearned model as others load it: a plain Hugging Face folder, or a peft adapter."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from unlearn_ds import dist, lora
from unlearn_ds.engine import Policy


def whole_model(policy: Policy, folder: Path, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
    """Write the model as plain Hugging Face safetensors, adapters merged in, with tokenizer and model card.

    Every rank takes part in gathering, the main one writes. The folder appears whole: it is renamed into place.
    """
    state = policy.consolidated_state_dict()
    if state is not None:
        empty = policy.empty_copy().to(policy.model.causal_lm.dtype)  # config.json names the precision of the weights
        with _complete(folder, tokenizer, card) as partial:
            empty.save_pretrained(partial, state_dict=state)
    dist.barrier()


def adapter(policy: Policy, folder: Path, tokenizer: PreTrainedTokenizerBase, card: str, base: str) -> None:
    """Write the adapters alone, as peft reads them; otherwise like ``whole_model``. base: path or id of the model."""
    state = policy.adapter_state_dict()
    if state is not None:
        with _complete(folder, tokenizer, card) as partial:
            lora.save(policy.model.causal_lm, state, partial, base)
    dist.barrier()


@contextlib.contextmanager
def _complete(folder: Path, tokenizer: PreTrainedTokenizerBase, card: str) -> Iterator[Path]:
    """A folder beside ``folder`` to write to, renamed into place with tokenizer and card at the end."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")  # two runs may fill one cache
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
