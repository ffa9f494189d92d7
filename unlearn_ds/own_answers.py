"""The retain source ``self``: the original model's own greedy answers, made once and kept.

Forgetting generalises over the form of the forget prompts, so what must survive in that form has to be in the retain
mix. The model itself knows best what it would have said. For the KL term an answer cut at its longest length is as good
as a whole one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from unlearn_ds import dist, embedded, generate
from unlearn_ds.config import RunConfig
from unlearn_ds.data import sources
from unlearn_ds.data.encode import Encoder
from unlearn_ds.engine import Policy
from unlearn_ds.scenarios import ScenarioData, lines
from unlearn_ds.types import Row


def make(config: RunConfig, policy: Policy, encoder: Encoder, data: ScenarioData) -> list[Row]:
    """Prompts of the retain sources and general ones in turn, ``config.data.num_self`` at most, with the answers of
    ``policy`` as it is; taken from the cache when the same weights have answered the same prompts before."""
    general = [Row(item["prompt"], item["response"]) for item in lines("normal.jsonl")]
    asked = sources.interleave([*(rows for rows, _ in data.retain), sources.split(general)["train"]])
    asked = list({(row.prompt, row.continues): row for row in asked if row.prompt}.values())[: config.data.num_self]
    prompts = [encoder.prompt_ids(row.prompt, row.continues) for row in asked]
    options = {"max_new_tokens": config.eval.max_new_tokens, "batch_size": config.eval.batch_size}
    identity = repr((policy.weights_digest(), prompts, options))
    file = embedded.cache_folder() / "own_answers" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    texts = dist.gather_objects(_kept(file))[0]
    if texts is None:
        with policy.evaluation_model(config.eval.gather) as (model, synced):
            texts = generate.greedy(model, encoder, prompts, synced=synced, **options)
        if dist.is_main():
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(texts), encoding="utf-8")
            partial.replace(file)
    answered = [(row, text) for row, text in zip(asked, texts, strict=True) if text]
    return [
        Row(row.prompt, text, (), sources.content_key(row.prompt, text), continues=row.continues)
        for row, text in answered
    ]


def _kept(file: Path) -> list[str] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
