"""The variants of a study side by side: ``report.html``, ``comparison.json`` and a table on the terminal.

Everything is read from the run folders of the variants, so a comparison can be written again at any time.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unlearn_ds import log, report, run_folder, studies
from unlearn_ds.drawing import scatter

COLOURS = ("v1", "v2", "v3", "v4", "v5", "v6")
"""CSS variables of the page, one a variant."""
_NOT_COMPARED = ("output_dir", "fingerprint", "dry_run", "checkpoint", "log")


class Variant(NamedTuple):
    """What the run folder of one variant holds; ``label`` is the folder's name. ``repeats``: the evaluations of its
    runs with other seeds, by seed; settings, evaluation and steps are those of the first."""

    label: str
    settings: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    repeats: Mapping[int, Mapping[str, Any]] = {}


class Row(NamedTuple):
    """One line of the table, as text: ``before``, and each variant after; ``best``: which of those is the best one.

    With several seeds a variant has the mean and the sample standard deviation. Values that look the same share the
    first place, and means that differ by less than a standard deviation. None is the best where neither way is better,
    where all look the same, and where only one variant has the number.
    """

    set: str
    metric: str
    before: str
    after: tuple[str, ...]
    best: tuple[bool, ...]


DIVERGED = "diverged"
"""Shown where a number of some seeds is not finite."""


class Cell(NamedTuple):
    """``text``: the number, or the mean of several seeds; ``spread``: their standard deviation, empty with one."""

    text: str
    spread: str
    number: float | None
    deviation: float = 0.0

    @property
    def whole(self) -> str:
        return f"{self.text.removesuffix(' %')}±{self.spread}" if self.spread else self.text


def read(folder: Path, names: Sequence[str]) -> list[Variant]:
    """Read the runs of a study, named as ``studies.plan`` names them; raises ``FileNotFoundError`` for one that has not
    been evaluated."""
    variants: dict[str, Variant] = {}
    for name in names:
        evaluation = report.read_json(folder / name / "evaluation.json")
        if not evaluation.get("after"):
            raise FileNotFoundError(f"{folder / name} holds no finished run")
        settings, label = report.read_json(folder / name / "config.json"), studies.label(name)
        if label in variants:
            first = variants[label]
            variants[label] = first._replace(repeats={**first.repeats, settings["seed"]: evaluation})
        else:
            variants[label] = Variant(label, settings, evaluation, report.read_lines(folder / name / "metrics.jsonl"))
    return list(variants.values())


def rows(variants: Sequence[Variant]) -> list[Row]:
    """Every number that an evaluation of a variant has, set by set, in the order of the report."""
    tables = [
        [
            {(row.set, row.key): row for row in report.rows(found)}
            for found in (variant.evaluation, *variant.repeats.values())
        ]
        for variant in variants
    ]
    keys = list(dict.fromkeys(key for seeds in tables for table in seeds for key in table))
    sets = list(dict.fromkeys(name for name, _ in keys))
    found = []
    for name, key in sorted(keys, key=lambda at: sets.index(at[0])):  # a set stays together; sorting is stable
        lines = [[table[name, key] for table in seeds if (name, key) in table] for seeds in tables]
        first = next(line for seeds in lines for line in seeds)
        cells = [_cell(key, [line.numbers[1] for line in seeds]) for seeds in lines]
        # Seeds of a run that memorizes first start from models of their own.
        starts = [line.numbers[0] for line in next(seeds for seeds in lines if seeds)]
        before = first.before if len(set(starts)) == 1 else _cell(key, starts).whole
        after = tuple(cell.whole for cell in cells)
        found.append(Row(name, first.metric, before, after, _best(name, key, cells)))
    return found


def _cell(key: str, numbers: Sequence[float | None]) -> Cell:
    """A variant's number after unlearning, or the mean of its seeds and their spread.

    A number that is not finite is null in evaluation.json: with it in one seed there is no mean."""
    there = [number for number in numbers if number is not None]
    if not there:
        return Cell(report.MISSING, "", None)
    if len(there) < len(numbers):
        return Cell(DIVERGED, "", None)
    show = report.percent if report.METRICS.get(key, report.Metric(key)).unit == "share" else report.number
    mean = statistics.fmean(there)
    if len(there) < 2 or not all(map(math.isfinite, there)):
        return Cell(show(mean), "", mean)
    deviation = statistics.stdev(there)
    return Cell(show(mean), show(deviation), mean, deviation)


def _best(name: str, key: str, cells: Sequence[Cell]) -> tuple[bool, ...]:
    metric = report.METRICS.get(key, report.Metric(key))
    more_is_better = metric.forget if name in report.FORGET_SETS else metric.keep
    there = [cell for cell in cells if cell.number is not None]
    if more_is_better is None or not there:
        return (False,) * len(cells)
    best = (max if more_is_better else min)(there, key=lambda cell: cell.number)
    shares = [
        cell in there
        and (cell.text == best.text or abs(cell.number - best.number) < max(cell.deviation, best.deviation))
        for cell in cells
    ]
    return tuple(shares) if sum(shares) < len(there) else (False,) * len(cells)


class TradeOff(NamedTuple):
    """A scatter plot. ``groups``: (CSS variable, x, y), first where the variants started and then each of them, a point
    a seed; ``share``: whether x is one; ``not_drawn``: variants with a seed that diverged."""

    groups: list[tuple[str, list[float], list[float]]]
    share: bool
    not_drawn: list[str]


def trade_off(variants: Sequence[Variant], name: str, key: str) -> TradeOff | None:
    """Headline rate on the unlearned prompts (y) against the number ``key`` of the set ``name`` (x).

    None where no variant has the number.
    """
    runs = [(variant.evaluation, *variant.repeats.values()) for variant in variants]
    starts = [evaluation.get("before") or {} for seeds in runs for evaluation in seeds]
    groups, not_drawn = [("ink", *_points(starts, name, key, once=True))], []
    for colour, variant, seeds in zip(COLOURS, variants, runs, strict=False):
        x, y = _points([evaluation["after"] for evaluation in seeds], name, key)
        groups.append((colour, x, y))
        if len(x) < len(seeds):
            not_drawn.append(spoken(variant.label))
    share = report.METRICS.get(key, report.Metric(key)).unit == "share"
    return TradeOff(groups, share, not_drawn) if any(x for _, x, _ in groups[1:]) else None


def _points(
    entries: Sequence[Mapping[str, Any]], name: str, key: str, once: bool = False
) -> tuple[list[float], list[float]]:
    pairs = [((entry.get(name) or {}).get(key), (entry.get("unlearned") or {}).get("rate")) for entry in entries]
    # matplotlib cannot cope with more.
    known = [(x, y) for x, y in pairs if x is not None and y is not None and abs(x) < 1e100]
    known = list(dict.fromkeys(known)) if once else known
    return [x for x, _ in known], [y for _, y in known]


def changes(variants: Sequence[Variant]) -> dict[str, list[Any]]:
    """Dotted knob -> its value in each variant, for the knobs that are not the same in all."""
    flat = [dict(_flatten(variant.settings)) for variant in variants]
    knobs = dict.fromkeys(knob for values in flat for knob in values)
    table = {knob: [values.get(knob) for values in flat] for knob in knobs}
    return {knob: values for knob, values in table.items() if any(value != values[0] for value in values)}


def _flatten(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if key in _NOT_COMPARED:
            continue
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        yield from ((f"{key}.{name}".rstrip("."), each) for name, each in inner)


def print_table(variants: Sequence[Variant]) -> None:
    """Print ``rows`` within 80 columns, the best value of a line with a star, and the judge under it."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    console = log.console()
    evaluation = variants[0].evaluation
    table = Table(width=min(80, console.width), box=SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("", ratio=1, overflow="fold", min_width=18)
    # The names of metrics need 20; with three variants there is room for a mean and its spread in one line.
    widest = min(12, (table.width - 20) // (len(variants) + 1) - 2)
    for title in ("before", *(spoken(variant.label) for variant in variants)):
        table.add_column(escape(title), justify="right", overflow="fold", max_width=widest)
    for name, group in itertools.groupby(rows(variants), key=lambda row: row.set):
        table.add_section()
        table.add_row(f"[bold]{escape(report.heading(evaluation, name))}[/]")
        for row in group:
            marked = (
                f"[green]{text}*[/]" if best else f"{text} " for text, best in zip(row.after, row.best, strict=True)
            )
            table.add_row(f"  {escape(row.metric)}", row.before, *marked)
    console.print(table)
    said = f"*: the best of the variants; judge: {evaluation.get('judge') or 'not named'}{_of_seeds(variants)}"
    console.print(said, style="dim", markup=False, highlight=False)


def _of_seeds(variants: Sequence[Variant]) -> str:
    """What a number is where each variant was run with several seeds; nothing with one."""
    runs = 1 + len(variants[0].repeats)
    return f"; mean ± standard deviation of {runs} seeds" if runs > 1 else ""


def spoken(label: str) -> str:
    """``with-mismatch`` -> with mismatch."""
    return label.replace("-", " ")


def write(folder: Path, study: str, title: str, source: str, variants: Sequence[Variant]) -> Path:
    """Write ``comparison.json`` and ``report.html`` of a study; returns the path of the page."""
    evaluation, differing = variants[0].evaluation, changes(variants)
    totals = [report.totals(variant.steps) for variant in variants]
    run_folder.write_json(folder / "comparison.json", {
        "study": study, "title": title, "source": source,
        **{key: evaluation.get(key) for key in ("scenario", "headline", "judge", "metrics", "before")},
        "variants": {
            variant.label: {
                "changes": {knob: values[n] for knob, values in differing.items()}, "steps": len(variant.steps),
                **{key: totals[n].get(key) for key in ("tokens", "response_tokens", "step_seconds")},
                "after": variant.evaluation["after"],
                "after_with_seed": {
                    variant.settings["seed"]: variant.evaluation["after"],
                    **{seed: evaluation["after"] for seed, evaluation in variant.repeats.items()},
                },
            }
            for n, variant in enumerate(variants)
        },
    })  # fmt: skip
    histories = [_evaluations(variant.evaluation) for variant in variants]
    page = report.environment().get_template("comparison.html.j2").render(
        study=study, title=title, source=source, variants=variants, evaluation=evaluation, rows=rows(variants),
        changes=differing, totals=totals, histories=histories if any(len(found) > 2 for found in histories) else [],
        settings=variants[0].settings, sets=report.SETS, missing=report.MISSING, heading=report.heading,
        column=report.column, plot=report.plot, scatter=scatter, trade_off=trade_off, spoken=spoken, colours=COLOURS,
        of_seeds=_of_seeds(variants),
    )  # fmt: skip
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _evaluations(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All evaluations of a run in the order of their steps, the two ends included."""
    return report.history(evaluation) or [evaluation[end] for end in ("before", "after") if evaluation.get(end)]
