"""Measure a model: generate and score on every set, in batches that are the same for every number of ranks."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from unlearn_ds import dist
from unlearn_ds.config import EvalConfig
from unlearn_ds.data.encode import Encoder
from unlearn_ds.data.packing import pack_scored
from unlearn_ds.metrics.diversity import diversity
from unlearn_ds.metrics.likelihood import likelihood
from unlearn_ds.metrics.multiple_choice import multiple_choice
from unlearn_ds.metrics.similarity import similarity_to_original
from unlearn_ds.model import PackedCausalLM
from unlearn_ds.registry import JUDGES, METRICS, resolve
from unlearn_ds.scenarios import Scenario, ScenarioData
from unlearn_ds.types import Answer, EncodedRow, Row

Answers = dict[str, list[Answer]]
"""Generated answers of a model by set: unlearned, unseen, normal, neutral."""


class Evaluator:
    """The sets, the judge and the tokenizer of one run; call ``run`` for each state of the model."""

    def __init__(self, config: EvalConfig, scenario: Scenario, data: ScenarioData, encoder: Encoder):
        self.config, self.encoder = config, encoder
        self.rows: dict[str, list[Row]] = {
            "unlearned": data.forget["train"][: config.num_unlearned],
            "unseen": data.forget["test"][: config.num_unseen],
            "normal": data.normal["test"][: config.num_normal],
            "neutral": [Row(question, "") for question in data.neutral.questions],
        }
        self.neutral = data.neutral
        self.judge = resolve("judge", config.judge, JUDGES)(config.judge_model) if dist.is_main() else None
        self._rate = resolve("metric", scenario.headline, METRICS)
        # The neutral set is read as plain text: no template, no end token.
        self._plain = Encoder(encoder.tokenizer, "none", max_length=encoder.max_length)

    @property
    def metrics(self) -> dict[str, int]:
        """Name and version of each metric: numbers of two versions are not to be compared."""
        modules = {name: importlib.import_module(target.split(":")[0]) for name, target in METRICS.items()}
        return {name: module.version for name, module in modules.items()}

    @property
    def judge_name(self) -> str | None:
        """The judge and its thresholds; None on ranks that do not judge."""
        if self.judge is None:
            return None
        floor = f", floor {self.judge.floor:g}" if self.judge.floor else ""
        return f"{self.judge.name}, margin {self.config.margin:.0%}{floor}"

    def run(
        self, model: PackedCausalLM, step: int, originals: Answers | None = None, synced: bool = False
    ) -> tuple[dict[str, Any], Answers]:
        """Evaluate ``model`` and return (E, answers); on ranks other than the main one both are empty.

        E has the shape of ``evaluation.json``. originals: answers before unlearning, None for the model itself.
        synced: weights are sharded, so every rank runs every batch count together.
        """
        began = time.perf_counter()
        texts = self._generate_all(model, synced)
        scored = {name: self._score(model, self._encoded(name), synced) for name in ("unlearned", "unseen", "normal")}
        neutral = self._score(model, self._texts(), synced)
        flat = self._score(model, [row for item in self._choices() for row in item], synced)
        if not dist.is_main():
            return {}, {}
        result: dict[str, Any] = {"step": step}
        answers: Answers = {name: [Answer(text) for text in texts[name]] for name in texts}
        for name in ("unlearned", "unseen"):
            rated, flagged = self._rate(texts[name], self.rows[name], self.judge, self.config.margin)
            result[name] = {**rated, "n": len(self.rows[name]), **_nll(scored[name]), **diversity(texts[name])}
            answers[name] = [Answer(*pair) for pair in zip(texts[name], flagged, strict=True)]
        original = [answer.text for answer in (originals or answers)["normal"]]
        result["normal"] = {
            **_nll(scored["normal"]),
            **similarity_to_original(texts["normal"], original, self.judge),
            **diversity(texts["normal"]),
            "n": len(self.rows["normal"]),
        }
        result["neutral"] = {"perplexity": _nll(neutral)["perplexity"], "n_texts": len(neutral)}
        result["neutral"] |= self._accuracy(flat)
        result["seconds"] = round(time.perf_counter() - began, 2)
        return result, answers

    def samples(self, before: Answers, after: Answers) -> list[dict[str, Any]]:
        """Each prompt with its answers before and after, and which of them the headline metric counts."""
        return [
            {
                "set": name,
                "prompt": row.prompt,
                "right": row.right_answers[0] if row.right_answers else ("" if name == "neutral" else row.answer),
                "wrong": row.answer if name in ("unlearned", "unseen") else "",
                "before": before[name][n].text,
                "after": after[name][n].text,
                "flagged_before": before[name][n].flagged,
                "flagged_after": after[name][n].flagged,
            }
            for name, rows in self.rows.items()
            for n, row in enumerate(rows)
        ]

    def _accuracy(self, flat: Sequence[tuple[float, int]]) -> dict[str, float]:
        sums, start = [], 0
        for item in self.neutral.choices:
            sums.append([nll for nll, _ in flat[start : start + len(item["choices"])]])
            start += len(item["choices"])
        return {**multiple_choice(sums, [item["answer"] for item in self.neutral.choices]), "n_choices": len(sums)}

    def _encoded(self, name: str) -> list[EncodedRow]:
        return self.encoder.encode_all(self.rows[name])

    def _texts(self) -> list[EncodedRow]:
        return [_without_end(self._plain.encode("", text), self._plain) for text in self.neutral.texts]

    def _choices(self) -> list[list[EncodedRow]]:
        return [
            [_without_end(self._plain.encode(item["context"], choice), self._plain) for choice in item["choices"]]
            for item in self.neutral.choices
        ]

    def _generate_all(self, model: PackedCausalLM, synced: bool) -> dict[str, list[str]]:
        """Greedy answers to the prompts of every set."""
        prompts = [(name, self.encoder.prompt_ids(row.prompt)) for name, rows in self.rows.items() for row in rows]
        with model.generating() as causal_lm:
            texts = _over_ranks(
                [ids for _, ids in prompts], self.config.batch_size, len, synced,
                lambda batch: self._generate(causal_lm, batch, synced),
            )  # fmt: skip
        answers: dict[str, list[str]] = {name: [] for name in self.rows}
        for (name, _), text in zip(prompts, texts, strict=True):
            answers[name].append(text)
        return answers

    def _generate(self, causal_lm: Any, prompts: Sequence[tuple[int, ...]], synced: bool) -> list[str]:
        tokenizer = self.encoder.tokenizer
        longest, pad = max(map(len, prompts)), tokenizer.eos_token_id
        ids_BL = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=causal_lm.device)
        # Padding is told by place, not by id: the pad id is also the true end of an answer.
        mask_BL = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=causal_lm.device)
        out_BL = causal_lm.generate(
            input_ids=ids_BL, attention_mask=mask_BL, max_new_tokens=self.config.max_new_tokens, do_sample=False,
            temperature=None, top_p=None, top_k=None, repetition_penalty=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=pad, synced_gpus=synced,
        )  # fmt: skip
        texts = tokenizer.batch_decode(out_BL[:, longest:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _score(self, model: PackedCausalLM, rows: Sequence[EncodedRow], synced: bool) -> list[tuple[float, int]]:
        """(summed NLL, number of response tokens) of each row."""

        def score(batch: Sequence[EncodedRow]) -> list[tuple[float, int]]:
            packed = pack_scored(batch).to(model.device)
            with torch.no_grad():
                nll_N = model(packed)
            parts = nll_N.double().cpu().split([len(row.answer_ids) for row in batch])
            return [(float(part.sum()), part.numel()) for part in parts]

        return _over_ranks(rows, 48, len, synced, score)


def _nll(scored: Sequence[tuple[float, int]]) -> dict[str, float]:
    return likelihood([nll for nll, _ in scored], [count for _, count in scored])


def _without_end(row: EncodedRow | None, encoder: Encoder) -> EncodedRow:
    if row is None:
        raise ValueError("a neutral text is longer than --data.max_length allows")
    ends = row.answer_ids[-1] == encoder.tokenizer.eos_token_id
    return EncodedRow(row.prompt_ids, row.answer_ids[:-1] if ends else row.answer_ids)


def _over_ranks(
    items: Sequence[Any],
    batch_size: int,
    length: Callable[[Any], int],
    synced: bool,
    run: Callable[[Sequence[Any]], list[Any]],
) -> list[Any]:
    """Run batches of items on all ranks and return the results in order, on every rank.

    Batches are cut once, items of like length together, and dealt to ranks whole: what a batch computes does not
    depend on the number of ranks. ``synced``: a rank without a batch left repeats its share's first, so all take part.
    """
    order = sorted(range(len(items)), key=lambda i: (length(items[i]), i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rank, world = dist.rank(), dist.world_size()
    mine: list[tuple[int, Any]] = []
    for first in range(0, len(batches), world):
        if first + rank < len(batches):
            batch = batches[first + rank]
            mine += zip(batch, run([items[i] for i in batch]), strict=True)
        elif synced:
            run([items[i] for i in batches[0]])
    results = dict(pair for part in dist.gather_objects(mine) for pair in part)
    return [results[i] for i in range(len(items))]
