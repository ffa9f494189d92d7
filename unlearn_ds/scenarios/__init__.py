"""A scenario is data, and the metric it is judged by. The table of names is ``registry.SCENARIOS``.

Every scenario hands over the same ``ScenarioData``; the trainer knows no scenario by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from unlearn_ds.config import SELF, RunConfig, UsageError, weighted
from unlearn_ds.data import pieces, sources
from unlearn_ds.data.encode import Encoder
from unlearn_ds.data.loader import first_pass
from unlearn_ds.data.sources import Source
from unlearn_ds.types import Calibration, Row

SAMPLE = Path(__file__).parent.parent / "sample"


class Scenario(NamedTuple):
    """``load``: configuration and encoder -> rows. ``headline``: the metric that says whether an answer shows the
    behaviour. ``label``: how a table calls it. ``metrics``: set -> rows of ``registry.METRICS`` measured on it.
    ``judges``: rows of ``registry.JUDGES`` that can decide here, the default first. ``check_judge``: raises
    ``UsageError`` when a judge cannot decide on these rows.
    """

    load: Callable[[RunConfig, Encoder], ScenarioData]
    headline: str
    label: str
    metrics: Mapping[str, Sequence[str]]
    judges: Sequence[str]
    check_judge: Callable[[Any, Sequence[Row]], None] = lambda judge, rows: None


@dataclass
class ScenarioData:
    """Rows of one run, divided.

    forget, normal: {"train", "validation", "test"}; the test side of forget is what evaluation calls unseen.
    mismatch_answers: answers of normal training rows, or what the user gave instead. memorize: rows that the memorising
    run teaches: those to unlearn and the unseen ones, so that unlearning has something to generalise to.
    retain: training rows of each retain source with its weight; normal["train"] is their mix. self_weight: weight of
    the original model's own answers (None: each counts once); uses_self: whether they are asked for.
    drawn: the training rows of forget in the order in which the run comes to them.
    calibration: what the judge may set itself by. extra: further sets of an evaluation by name. kindred: rows whose
    prompts have the form of the forget prompts and are never evaluated.
    """

    forget: dict[str, list[Row]]
    normal: dict[str, list[Row]]
    mismatch_answers: list[str]
    sources: list[Source]
    neutral: NeutralSet = field(default_factory=lambda: NeutralSet())
    memorize: list[Row] = field(default_factory=list)
    retain: list[tuple[list[Row], float | None]] = field(default_factory=list)
    uses_self: bool = False
    self_weight: float | None = None
    drawn: list[Row] = field(default_factory=list)
    calibration: Calibration = Calibration(())
    extra: dict[str, list[Row]] = field(default_factory=dict)
    kindred: list[Row] = field(default_factory=list)

    def unlearned(self, count: int) -> list[Row]:
        """The first ``count`` rows that the run trains on to forget them, one of each prompt: what evaluation asks."""
        by_prompt: dict[str, Row] = {}
        for row in self.drawn:
            by_prompt.setdefault(row.prompt, row)
        return list(by_prompt.values())[:count]

    def add_own_answers(self, rows: list[Row]) -> None:
        """Take the original model's answers into the retain mix."""
        self.normal["train"] = sources.mix([*self.retain, (rows, self.self_weight)])


@dataclass
class NeutralSet:
    """What is neither forgotten nor retained: running texts, multiple-choice items, plain questions with answers."""

    texts: Sequence[str] = ()
    choices: Sequence[dict[str, Any]] = ()
    questions: Sequence[dict[str, Any]] = ()


def neutral_set(num_texts: int, num_choices: int, num_questions: int) -> NeutralSet:
    """The embedded neutral set, written for this project."""
    return NeutralSet(
        [item["text"] for item in lines("neutral_text.jsonl")][:num_texts],
        lines("neutral_choice.jsonl")[:num_choices],
        lines("neutral_question.jsonl")[:num_questions],
    )


def lines(name: str) -> list[dict[str, Any]]:
    """Records of an embedded jsonl file."""
    return [json.loads(line) for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines()]


def refuse_harmless_data(config: RunConfig) -> None:
    """For the scenarios that have no use for it."""
    if config.data.harmless_data:
        raise UsageError(f"--harmless_data is for --scenario harmful; {config.scenario} does not ask harmless prompts.")


def load_rows(config: RunConfig, encoder: Encoder, forget_default: str, retain_default: Sequence[str]) -> ScenarioData:
    """Read, check and divide the rows of a run; what a user gave replaces the defaults.

    Mismatch answers are right answers of normal training rows only: the published code also drew from TruthfulQA's
    false answers and from rows held out for testing. They have the form of the rows to forget where there are such.
    """
    data = config.data
    forget = _read(config, str(data.forget_data or forget_default), "forget", data.forget_columns)
    named = weighted(data.retain_data or tuple(retain_default))
    kept = [(_read(config, name, "retain", data.retain_columns), weight) for name, weight in named if name != SELF]
    read = [forget, *(source for source, _ in kept)]
    given = None
    if data.mismatch_data:
        given = _read(config, data.mismatch_data, "retain", data.mismatch_columns)
        read.append(given)
    for source in read:
        source.use = "forget" if source is forget else "mismatch" if source is given else "retain"
        encoder.keep_encodable(source)
        if data.limit:
            del source.rows[data.limit :]
    divided = _apart(sources.split(forget.rows))
    sides = [_apart(sources.split(source.rows)) for source, _ in kept]
    retain = [(side["train"], weight) for side, (_, weight) in zip(sides, kept, strict=True)]
    normal = {side: sources.interleave([part[side] for part in sides]) for side in ("validation", "test")}
    normal["train"] = sources.mix(retain)
    if given:  # the same file may be the retain data, whose held-out answers are evaluated
        held_out = {row.key for side in ("validation", "test") for row in normal[side]}
        given.rows = [row for row in given.rows if row.key not in held_out]
    _check_sides(divided, normal, read)
    return ScenarioData(
        forget=divided,
        normal=normal,
        mismatch_answers=_mismatch_answers(config, [row for rows, _ in retain for row in rows], forget, given),
        sources=read,
        neutral=neutral_set(
            config.eval.num_neutral_texts, config.eval.num_neutral_choices, config.eval.num_neutral_questions
        ),
        memorize=divided["train"] + divided["test"],
        retain=retain,
        uses_self=any(name == SELF for name, _ in named),
        self_weight=next((weight for name, weight in named if name == SELF), None),
        drawn=first_pass(divided["train"], config.seed),
    )


def _apart(divided: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The division without held-out rows whose prompt is trained on: rows are divided by content, and some data answers
    a prompt several times."""
    trained = {row.prompt for row in divided["train"] if not row.continues}
    held_out = {side: [row for row in divided[side] if row.prompt not in trained] for side in ("validation", "test")}
    return {**divided, **held_out}


def _read(config: RunConfig, name: str, kind: str, columns: tuple[str, ...]) -> Source:
    if config.data.as_pieces and pieces.holds_text(name):
        return pieces.read(name, config.data.prompt_characters, config.data.answer_characters)
    return sources.read(name, kind, columns)


def _check_sides(divided: dict[str, list[Row]], normal: dict[str, list[Row]], read: list[Source]) -> None:
    for name, part in (("forget", divided["train"]), ("unseen", divided["test"]), ("normal", normal["train"]),
                       ("held-out normal", normal["test"])):  # fmt: skip
        if not part and all(source.rows for source in read):
            raise UsageError(
                f"too few rows: none is left for the {name} set after the 70/10/20 split by content; "
                "give about 20 or more."
            )


def _mismatch_answers(config: RunConfig, normal: list[Row], forget: Source, given: Source | None) -> list[str]:
    if config.data.mismatch_text:
        return [config.data.mismatch_text]
    rows = given.rows if given else normal
    prose = sum(row.is_prose for row in forget.rows) > len(forget.rows) / 2
    rows = [row for row in rows if row.is_prose == prose] or rows
    return list(dict.fromkeys(answer for row in rows for answer in (row.answer, *row.right_answers) if answer))
