"""The unlearned model as others load it: a plain Hugging Face folder, or a peft adapter."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from unlearn_ds import dist, local_files, lora
from unlearn_ds.engine import Policy


def whole_model(
    policy: Policy, folder: Path, tokenizer: PreTrainedTokenizerBase, card: str, replace: bool = True
) -> None:
    """Write the model as plain Hugging Face safetensors, adapters merged in, with tokenizer and model card.

    Every rank takes part in gathering, the main one writes. The folder appears whole: it is renamed into place. One
    that is there already is replaced, or, in a cache that other runs read, kept.
    """
    state = policy.consolidated_state_dict()
    if state is not None:
        empty = policy.empty_copy().to(policy.model.causal_lm.dtype)  # config.json names the precision of the weights
        with _complete(folder, tokenizer, card, replace) as partial:
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
def _complete(folder: Path, tokenizer: PreTrainedTokenizerBase, card: str, replace: bool = True) -> Iterator[Path]:
    """A folder beside ``folder`` to write to, renamed into place with tokenizer and card at the end."""
    partial = local_files.partial(folder)
    try:
        yield partial
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk above all
        raise
    local_files.put(partial, folder, replace)
