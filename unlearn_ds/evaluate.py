"""Measure a model: generate and score on every set, in batches that are the same for every number of ranks."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from unlearn_ds import dist
from unlearn_ds.config import EvalConfig, UsageError
from unlearn_ds.data.encode import Encoder
from unlearn_ds.data.packing import pack_scored
from unlearn_ds.model import PackedCausalLM
from unlearn_ds.registry import JUDGES, METRICS, resolve
from unlearn_ds.scenarios import Scenario, ScenarioData
from unlearn_ds.types import Answer, EncodedRow, Measured, Row

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
        self.scenario = scenario
        asked = self.rows["unlearned"] + self.rows["unseen"]
        if self.judge and not self.judge.floor and not all(row.right_answers for row in asked):
            raise UsageError(
                f"--judge {config.judge} needs the right answer of each forget row: name their column as the third of "
                "--forget_columns, or use --judge minilm."
            )
        # The neutral set is read as plain text: no template, no end token.
        self._plain = Encoder(encoder.tokenizer, "none", max_length=encoder.max_length)

    @property
    def metrics(self) -> dict[str, int]:
        """Name and version of each metric: numbers of two versions are not to be compared."""
        used = sorted({name for names in self._measured_on().values() for name in names})
        return {name: importlib.import_module(METRICS[name].split(":")[0]).version for name in used}

    def _measured_on(self) -> dict[str, Sequence[str]]:
        return {**self.scenario.metrics, "neutral texts": ("likelihood",), "neutral choices": ("multiple_choice",)}

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
        sets = {name: (self.rows[name], self.encoder.encode_all(self.rows[name])) for name in self.scenario.metrics}
        sets |= {"neutral texts": self._texts(), "neutral choices": self._choices()}
        scored = {name: self._score(model, encoded, synced) for name, (_, encoded) in sets.items()}
        if not dist.is_main():
            return {}, {}
        answers: Answers = {name: [Answer(text) for text in texts[name]] for name in texts}
        before = {name: [answer.text for answer in answers] for name, answers in (originals or answers).items()}
        numbers: dict[str, Any] = {}
        for name, metrics in self._measured_on().items():
            nll_sums, counts = zip(*scored[name], strict=True)
            measured = Measured(
                sets[name][0], texts.get(name, ()), before.get(name, ()), nll_sums, counts, self.judge,
                self.config.margin,
            )  # fmt: skip
            numbers[name] = {"n": len(measured.rows)}
            for metric in metrics:
                found = resolve("metric", metric, METRICS)(measured)
                numbers[name] |= found.numbers
                if metric == self.scenario.headline:
                    answers[name] = [Answer(*pair) for pair in zip(texts[name], found.flagged, strict=True)]
        passages, choices = numbers.pop("neutral texts"), numbers.pop("neutral choices")
        numbers["neutral"] = {
            "perplexity": passages["perplexity"], "n_texts": passages["n"],
            "accuracy": choices["accuracy"], "n_choices": len(self.neutral.choices),
        }  # fmt: skip
        return {"step": step, **numbers, "seconds": round(time.perf_counter() - began, 2)}, answers

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

    def _texts(self) -> tuple[list[Row], list[EncodedRow]]:
        rows = [Row("", text) for text in self.neutral.texts]
        return rows, [_without_end(self._plain.encode("", row.answer), self._plain) for row in rows]

    def _choices(self) -> tuple[list[Row], list[EncodedRow]]:
        rows = [
            Row(item["context"], choice, (item["choices"][item["answer"]],))
            for item in self.neutral.choices
            for choice in item["choices"]
        ]
        return rows, [_without_end(self._plain.encode(row.prompt, row.answer), self._plain) for row in rows]

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
            eos_token_id=[self.encoder.end_id, tokenizer.eos_token_id], pad_token_id=pad, synced_gpus=synced,
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
