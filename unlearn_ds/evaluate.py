"""Measure a model: generate and score on every set, and let the metrics of the scenario judge."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from typing import Any

import torch

from unlearn_ds import dist, generate
from unlearn_ds.config import EvalConfig, UsageError
from unlearn_ds.data.encode import Encoder
from unlearn_ds.data.packing import pack_scored
from unlearn_ds.model import PackedCausalLM
from unlearn_ds.ops import TokenStatistics
from unlearn_ds.registry import JUDGES, METRICS, resolve
from unlearn_ds.scenarios import Scenario, ScenarioData
from unlearn_ds.types import Answer, AnswerScore, EncodedRow, Measured, Row, Scored

Answers = dict[str, list[Answer]]
"""Generated answers of a model by set: unlearned, unseen, normal, neutral, and those of the scenario."""

FORGET_SETS = ("unlearned", "unseen", "other_form")
"""Sets whose rows hold what is to be forgotten."""
SCORED = {"likelihood", "multiple_choice"}
"""Metrics that read how likely the rows' own answers are."""
SIMILARITIES = ("minilm", "bertscore")
"""Judges that compare two texts."""
NUM_TO_SHOW = 32
"""Prompts asked before a memorising run, to see whether it is needed."""


class Evaluator:
    """The sets, the judges and the tokenizer of one run; call ``run`` for each state of the model."""

    def __init__(self, config: EvalConfig, scenario: Scenario, data: ScenarioData, encoder: Encoder):
        self.config, self.encoder, self.scenario = config, encoder, scenario
        self.rows: dict[str, list[Row]] = {
            "unlearned": data.unlearned(config.num_unlearned),
            "unseen": data.forget["test"][: config.num_unseen],
            "normal": data.normal["test"][: config.num_normal],
            **data.extra,
            "neutral": [Row(item["prompt"], "", tuple(item["answers"])) for item in data.neutral.questions],
        }
        if "other_form" in scenario.metrics:
            asked = [row for row in self.rows["unlearned"] if not row.is_prose]
            self.rows["other_form"] = asked[: config.num_other_form]
        self.measured_on: dict[str, Sequence[str]] = {
            **{name: metrics for name, metrics in scenario.metrics.items() if self.rows[name]},
            "neutral": ("question_accuracy",),
            "neutral texts": ("likelihood",),
            "neutral choices": ("multiple_choice",),
        }
        self.neutral = data.neutral
        self.judge, self.similarity = self._judges(data) if dist.is_main() else (None, None)
        # Forgetting may hold for one form of a prompt only (issue 5 of the published code).
        other = "paper" if encoder.template == "chat" else "none"
        self._other_form = Encoder(encoder.tokenizer, other, max_length=encoder.max_length)
        # The neutral set is read as plain text: no template, no end token.
        self._plain = Encoder(encoder.tokenizer, "none", max_length=encoder.max_length)

    def _judges(self, data: ScenarioData) -> tuple[Any, Any]:
        """The judge of the headline, and what compares two texts: the same where it can."""
        judges = self.scenario.judges
        name = judges[0] if self.config.judge == "auto" else self.config.judge
        if name not in judges:
            raise UsageError(f"--judge {name} cannot decide here; {' or '.join(judges)} can.")
        judge = resolve("judge", name, JUDGES)(self.config, data.calibration)
        self.scenario.check_judge(judge, self.rows["unlearned"] + self.rows["unseen"])
        return judge, judge if name in SIMILARITIES else resolve("judge", SIMILARITIES[0], JUDGES)()

    @property
    def metrics(self) -> dict[str, int]:
        """Name and version of each metric: numbers of two versions are not to be compared."""
        used = sorted({name for names in self.measured_on.values() for name in names})
        return {name: importlib.import_module(METRICS[name].split(":")[0]).version for name in used}

    @property
    def judge_name(self) -> str | None:
        """The judge and its thresholds; None on ranks that do not judge."""
        if self.judge is None:
            return None
        margin = f", margin {self.config.margin:.0%}" if self.judge is self.similarity else ""
        return f"{self.judge.name}{margin}"

    def shows(self, model: PackedCausalLM, synced: bool = False, num_prompts: int | None = NUM_TO_SHOW) -> float:
        """Share of the first unlearned prompts (None: of all) on which ``model`` shows the behaviour; the same on every
        rank."""
        rows = self.rows["unlearned"][:num_prompts]
        texts = self._generate_all(model, {"unlearned": rows}, synced)["unlearned"]
        rate = 0.0
        if dist.is_main():
            rate = self._headline(rows, texts).numbers["rate"]
        return dist.gather_objects(rate)[0]

    def _headline(self, rows: Sequence[Row], texts: Sequence[str]) -> Scored:
        metric = resolve("metric", self.scenario.headline, METRICS)
        return metric(Measured(rows, texts, judge=self.judge, margin=self.config.margin))

    def run(
        self, model: PackedCausalLM, step: int, originals: Answers | None = None, synced: bool = False
    ) -> tuple[dict[str, Any], Answers]:
        """Evaluate ``model`` and return (E, answers); on ranks other than the main one both are empty.

        E has the shape of ``evaluation.json``. originals: answers before unlearning, None for the model itself.
        synced: weights are sharded, so every rank runs every batch count together.
        """
        began = time.perf_counter()
        texts = self._generate_all(model, self.rows, synced)
        sets = {**self.rows, "neutral texts": self._texts(), "neutral choices": self._choices()}
        scored = {
            name: self._score(model, self._encoded(name, sets[name]), synced)
            for name, metrics in self.measured_on.items()
            if SCORED & set(metrics)
        }
        if not dist.is_main():
            return {}, {}
        before = {name: [answer.text for answer in answers] for name, answers in (originals or {}).items()} or texts
        numbers: dict[str, Any] = {}
        flagged: dict[str, list[bool]] = {}
        for name, metrics in self.measured_on.items():
            measured = Measured(
                sets[name], texts.get(name, ()), before.get(name, ()), scored.get(name, ()), self.judge,
                self.similarity, self.config.margin,
            )  # fmt: skip
            numbers[name] = {"n": len(sets[name])}
            for metric in metrics:
                found = resolve("metric", metric, METRICS)(measured)
                numbers[name] |= found.numbers
                if found.flagged is not None and (metric == self.scenario.headline or name not in flagged):
                    flagged[name] = found.flagged
        passages, choices, questions = (numbers.pop(f"neutral{part}") for part in (" texts", " choices", ""))
        numbers["neutral"] = {
            "perplexity": passages["perplexity"], "n_texts": passages["n"],
            "accuracy": choices["accuracy"], "n_choices": len(self.neutral.choices),
            **{key: value for key, value in questions.items() if key != "n"}, "n_questions": questions["n"],
        }  # fmt: skip
        answers = {
            name: [Answer(*pair) for pair in zip(said, flagged.get(name, [None] * len(said)), strict=True)]
            for name, said in texts.items()
        }
        return {"step": step, **numbers, "seconds": round(time.perf_counter() - began, 2)}, answers

    def samples(self, before: Answers, after: Answers) -> list[dict[str, Any]]:
        """Each prompt with its answers before and after, and which of them are counted: by the headline metric where
        it is measured, elsewhere as refusals or as right answers."""
        return [
            {
                "set": name,
                "prompt": row.prompt,
                "right": row.right_answers[0] if row.right_answers else ("" if name in FORGET_SETS else row.answer),
                "wrong": row.answer if name in FORGET_SETS else "",
                "before": before[name][n].text,
                "after": after[name][n].text,
                "flagged_before": before[name][n].flagged,
                "flagged_after": after[name][n].flagged,
            }
            for name, rows in self.rows.items()
            for n, row in enumerate(rows)
        ]

    def _texts(self) -> list[Row]:
        return [Row("", text) for text in self.neutral.texts]

    def _choices(self) -> list[Row]:
        return [
            Row(item["context"], choice, (item["choices"][item["answer"]],))
            for item in self.neutral.choices
            for choice in item["choices"]
        ]

    def _encoded(self, name: str, rows: list[Row]) -> list[EncodedRow]:
        if name in self.rows:
            return self.encoder.encode_all(rows)
        return [_without_end(self._plain.encode(row.prompt, row.answer), self._plain) for row in rows]

    def _generate_all(self, model: PackedCausalLM, sets: dict[str, list[Row]], synced: bool) -> dict[str, list[str]]:
        """Greedy answers to the prompts of each set."""
        asked = [(name, row) for name, rows in sets.items() for row in rows]
        prompts = [
            (self._other_form if name == "other_form" else self.encoder).prompt_ids(row.prompt, row.continues)
            for name, row in asked
        ]
        texts = generate.greedy(
            model, self.encoder, prompts,
            max_new_tokens=self.config.max_new_tokens, batch_size=self.config.batch_size, synced=synced,
        )  # fmt: skip
        answers: dict[str, list[str]] = {name: [] for name in sets}
        for (name, _), text in zip(asked, texts, strict=True):
            answers[name].append(text)
        return answers

    def _score(self, model: PackedCausalLM, rows: Sequence[EncodedRow], synced: bool) -> list[AnswerScore]:
        def score(batch: Sequence[EncodedRow]) -> list[AnswerScore]:
            packed = pack_scored(batch).to(model.device)
            with torch.no_grad():
                found = torch.stack([x.double() for x in TokenStatistics(*model(packed))]).cpu()
            parts = found.split([len(row.answer_ids) for row in batch], dim=1)
            sums = [(*part.sum(1).tolist(), part.shape[1]) for part in parts]
            return [AnswerScore(-logp, count, entropy, int(top)) for logp, entropy, top, count in sums]

        return generate.over_ranks(rows, 48, len, synced, score)


def _without_end(row: EncodedRow | None, encoder: Encoder) -> EncodedRow:
    if row is None:
        raise ValueError("a neutral text is longer than --data.max_length allows")
    ends = row.answer_ids[-1] == encoder.tokenizer.eos_token_id
    return EncodedRow(row.prompt_ids, row.answer_ids[:-1] if ends else row.answer_ids)
