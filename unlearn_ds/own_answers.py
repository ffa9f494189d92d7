"""The retain source ``self``: the original model's own greedy answers, made once and kept.

Forgetting generalises over the form of the forget prompts, so what must survive in that form has to be in the retain
mix. The model itself knows best what it would have said.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from sentencex import segment

from unlearn_ds import dist, embedded, generate, log
from unlearn_ds.config import RunConfig, UsageError
from unlearn_ds.data import pieces, sources
from unlearn_ds.data.encode import Encoder
from unlearn_ds.engine import Policy
from unlearn_ds.scenarios import ScenarioData, lines
from unlearn_ds.types import Row

BATCH_SIZE = 16
"""Prompts answered together; fixed, because sums in another order may change a word."""


def make(config: RunConfig, policy: Policy, encoder: Encoder, data: ScenarioData) -> list[Row]:
    """Prompts of the retain sources, of the forget prompts' kind and general ones in turn, ``config.data.num_self`` at
    most, with the answers of ``policy`` as it is; taken from the cache when the same weights have answered the same
    prompts before. An answer that ran out of tokens ends with its last whole sentence."""
    general = [Row(item["prompt"], item["response"]) for item in lines("normal.jsonl")]
    asked = sources.interleave([*(rows for rows, _ in data.retain), data.kindred, sources.split(general)["train"]])
    asked = list({(row.prompt, row.continues): row for row in asked if row.prompt}.values())[: config.data.num_self]
    prompts = [encoder.prompt_ids(row.prompt, row.continues) for row in asked]
    options = {"max_new_tokens": config.data.self_tokens, "batch_size": BATCH_SIZE}
    identity = repr((policy.weights_digest(), prompts, options))
    file = embedded.cache_folder() / "own_answers" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    texts = dist.gather_objects(_kept(file))[0]
    if texts is None:
        with policy.evaluation_model(config.eval.gather) as (model, synced):
            texts = generate.greedy(model, encoder, prompts, synced=synced, **options)
        if dist.is_main():
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".partial-{os.getpid()}")  # two runs may answer the same prompts
            partial.write_text(json.dumps(texts), encoding="utf-8")
            partial.replace(file)
    whole = [text if row.continues else _ended(text, encoder, config) for row, text in zip(asked, texts, strict=True)]
    answered = [(row, text) for row, text in zip(asked, whole, strict=True) if text]
    if not answered:
        raise UsageError(
            "--retain_data self: no answer of the model itself had a whole sentence within --data.self_tokens "
            f"{config.data.self_tokens}: raise it, or leave self out."
        )
    log.say(f"self        {len(answered)} answers of the model itself to {len(asked)} prompts")
    return [
        Row(row.prompt, text, (), sources.content_key(row.prompt, text), continues=row.continues)
        for row, text in answered
    ]


def _ended(text: str, encoder: Encoder, config: RunConfig) -> str:
    """An answer as it is, or up to its last whole sentence where it has taken all the tokens that it could."""
    num_tokens = len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
    return text if num_tokens + 1 < config.data.self_tokens else _whole_sentences(text)


def _kept(file: Path) -> list[str] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _whole_sentences(text: str) -> str:
    """``text`` without a last sentence that has no end."""
    sentences = [sentence.strip() for sentence in segment("en", text)]
    while sentences and not sentences[-1].rstrip(pieces.CLOSING).endswith((*pieces.SENTENCE_ENDS, ":")):
        sentences.pop()
    return text[: text.rindex(sentences[-1]) + len(sentences[-1])] if sentences else ""
