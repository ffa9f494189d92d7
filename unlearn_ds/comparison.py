"""The variants of a study side by side: ``report.html``, ``comparison.json`` and a table on the terminal.

Everything is read from the run folders of the variants, so a comparison can be written again at any time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unlearn_ds import log, report, run_folder

COLOURS = ("v1", "v2", "v3", "v4", "v5", "v6")
"""CSS variables of the page, one a variant."""
_NOT_COMPARED = ("output_dir", "fingerprint", "dry_run", "checkpoint", "log")


class Variant(NamedTuple):
    """What the run folder of one variant holds; ``label`` is the folder's name."""

    label: str
    settings: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]


class Row(NamedTuple):
    """One line of the table, as text: ``before``, and each variant after; ``best``: which of those is the best one.

    Values that look the same share the first place. None is the best where neither way is better, where all look the
    same, and where only one variant has the number.
    """

    set: str
    metric: str
    before: str
    after: tuple[str, ...]
    best: tuple[bool, ...]


def read(folder: Path, labels: Sequence[str]) -> list[Variant]:
    """Read the variants of a study; raises ``FileNotFoundError`` for one that has not been evaluated."""
    variants = []
    for label in labels:
        evaluation = report.read_json(folder / label / "evaluation.json")
        if not evaluation.get("after"):
            raise FileNotFoundError(f"{folder / label} holds no finished run")
        settings, steps = (folder / label / "config.json", folder / label / "metrics.jsonl")
        variants.append(Variant(label, report.read_json(settings), evaluation, report.read_lines(steps)))
    return variants


def rows(variants: Sequence[Variant]) -> list[Row]:
    """Every number that an evaluation of a variant has, set by set, in the order of the report."""
    tables = [{(row.set, row.key): row for row in report.rows(variant.evaluation)} for variant in variants]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    sets = list(dict.fromkeys(name for name, _ in keys))
    found = []
    for name, key in sorted(keys, key=lambda at: sets.index(at[0])):  # a set stays together; sorting is stable
        lines = [table.get((name, key)) for table in tables]
        first = next(line for line in lines if line)
        texts = tuple(line.after if line else report.MISSING for line in lines)
        numbers = [line.numbers[1] if line else None for line in lines]
        found.append(Row(name, first.metric, first.before, texts, _best(name, key, texts, numbers)))
    return found


def _best(name: str, key: str, texts: Sequence[str], numbers: Sequence[float | None]) -> tuple[bool, ...]:
    metric = report.METRICS.get(key, report.Metric(key))
    more_is_better = metric.forget if name in report.FORGET_SETS else metric.keep
    there = {number: text for number, text in zip(numbers, texts, strict=True) if number is not None}
    if more_is_better is None or len(set(there.values())) < 2:
        return (False,) * len(texts)
    best = there[max(there) if more_is_better else min(there)]
    return tuple(text == best for text in texts)


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
    for title in ("before", *(spoken(variant.label) for variant in variants)):
        table.add_column(escape(title), justify="right", overflow="fold", max_width=10)
    for name, group in itertools.groupby(rows(variants), key=lambda row: row.set):
        table.add_section()
        table.add_row(f"[bold]{escape(report.heading(evaluation, name))}[/]")
        for row in group:
            marked = (
                f"[green]{text}*[/]" if best else f"{text} " for text, best in zip(row.after, row.best, strict=True)
            )
            table.add_row(f"  {escape(row.metric)}", row.before, *marked)
    console.print(table)
    said = f"*: the best of the variants; judge: {evaluation.get('judge') or 'not named'}"
    console.print(said, style="dim", markup=False, highlight=False)


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
            }
            for n, variant in enumerate(variants)
        },
    })  # fmt: skip
    histories = [_evaluations(variant.evaluation) for variant in variants]
    page = report.environment().get_template("comparison.html.j2").render(
        study=study, title=title, source=source, variants=variants, evaluation=evaluation, rows=rows(variants),
        changes=differing, totals=totals, histories=histories if any(len(found) > 2 for found in histories) else [],
        settings=variants[0].settings, sets=report.SETS, missing=report.MISSING, heading=report.heading,
        column=report.column, plot=report.plot, spoken=spoken, colours=COLOURS,
    )  # fmt: skip
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _evaluations(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All evaluations of a run in the order of their steps, the two ends included."""
    return report.history(evaluation) or [evaluation[end] for end in ("before", "after") if evaluation.get(end)]
