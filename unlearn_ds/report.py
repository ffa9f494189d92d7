"""What a run did, for people: ``report.html`` (one page, no network) and the before/after table on the terminal.

Everything is read from the files of the run folder, so a report can be written again at any time. Any number may be
missing: a run may have been stopped, a term may be inactive, a metric may not apply. Shares are fractions of 1.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from unlearn_ds import dist, log
from unlearn_ds.drawing import MISSING, number, percent, plot, short, stack


class Metric(NamedTuple):
    """How a number of ``evaluation.json`` is shown, and whether more of it is better on rows to forget and to keep.

    unit: "share" (shown in %, change in points), "relative" (change in %, as a factor from 10 on) or "plain".
    """

    label: str
    unit: str = "plain"
    forget: bool | None = None
    keep: bool | None = None


METRICS: Mapping[str, Metric] = {
    "rate": Metric("rate", "share", forget=False, keep=False),  # its label is the "headline" of the evaluation
    "rate_without_floor": Metric("the same by the plain ratio rule", "share", forget=False, keep=False),
    "right_rate": Metric("right answers", "share", forget=True, keep=True),
    "empty": Metric("empty answers", "share"),
    "harmfulness": Metric("mean probability of harm", "share", forget=False, keep=False),
    "refusal_rate": Metric("refusals", "share", forget=None, keep=False),
    "bleu": Metric("BLEU with the text", "plain", forget=False),
    "longest_run": Metric("words recited in a row, mean", "plain", forget=False),
    "longest_run_max": Metric("words recited in a row, most", "plain", forget=False),
    "nll": Metric("NLL per token", "plain", forget=True, keep=False),
    "perplexity": Metric("perplexity", "relative", forget=True, keep=False),
    "accuracy": Metric("multiple-choice accuracy", "share", forget=True, keep=True),
    "question_accuracy": Metric("questions answered right", "share", forget=True, keep=True),
    "questions_kept": Metric("of those right before, still right", "share", forget=True, keep=True),
    "similarity_to_original": Metric("similarity to original", "plain", forget=True, keep=True),
    "diversity": Metric("diversity", "plain", forget=None, keep=True),
}
SETS: Mapping[str, tuple[str, str]] = {
    "unlearned": ("Unlearned prompts", "trained on, to be forgotten"),
    "unseen": ("Unseen prompts", "same behaviour, never trained on"),
    "other_form": ("Unlearned prompts in another form", "another template than the one they were unlearned in"),
    "harmless": ("Harmless prompts", "resemble harmful ones, to be kept"),
    "normal": ("Normal prompts", "held out, to be kept"),
    "neutral": ("Neutral set", "unrelated, to be kept"),
}
MARKS = {"": ("counted", "worse"), "harmless": ("refused", "worse"), "neutral": ("right", "better")}
"""What is said of an answer that its set's metric counts, and whether that is good; "" for all other sets."""
FORGET_SETS = ("unlearned", "unseen", "other_form")
SLIGHT = 0.01
"""A change below 1 point, 1 % or 0.01 is called neither good nor bad."""
COUNT = re.compile("n|n_.*")


class Row(NamedTuple):
    """One line of the before/after table, as text. ``good``: the change is one for the better; None: neither way.

    ``rises``: the number grew; None when it stayed or one side is missing. ``numbers``: before and after, not rounded.
    """

    set: str
    metric: str
    before: str
    after: str
    change: str
    good: bool | None
    rises: bool | None
    key: str
    numbers: tuple[float | None, float | None]


def rows(evaluation: Mapping[str, Any]) -> list[Row]:
    """Before and after of every number of ``evaluation.json``, set by set; counts go to ``heading`` instead."""
    before, after = evaluation.get("before") or {}, evaluation.get("after") or {}
    table = []
    for name in _ordered(SETS, [key for side in (before, after) for key in side if isinstance(side[key], Mapping)]):
        old, new = before.get(name) or {}, after.get(name) or {}
        shown = [key for side in (old, new) for key in side if key in METRICS or _number(side, key) is not None]
        for key in _ordered(METRICS, [key for key in shown if not COUNT.fullmatch(key)]):
            metric = METRICS.get(key, Metric(words(key)))
            label = words(str(evaluation.get("headline") or metric.label)) if key == "rate" else metric.label
            better = metric.forget if name in FORGET_SETS else metric.keep
            table.append(_row(name, key, metric._replace(label=label), better, _number(old, key), _number(new, key)))
    return table


def print_table(evaluation: Mapping[str, Any]) -> None:
    """Print ``rows`` within 80 columns, once for all ranks, with the judge under it."""
    if not dist.is_main():
        return
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    console = log.console()
    table = Table(width=min(80, console.width), box=SIMPLE_HEAD, header_style="bold")
    table.add_column("", ratio=1, overflow="fold")
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right", min_width=8, max_width=16)
    for name, group in itertools.groupby(rows(evaluation), key=lambda row: row.set):
        table.add_section()
        table.add_row(f"[bold]{escape(heading(evaluation, name))}[/]")
        for row in group:
            colour = {True: "green", False: "red", None: "default"}[row.good]
            table.add_row(f"  {escape(row.metric)}", row.before, row.after, f"[{colour}]{row.change}[/]")
    console.print(table)
    console.print(f"judge: {evaluation.get('judge') or 'not named'}", style="dim", markup=False, highlight=False)


def heading(evaluation: Mapping[str, Any], name: str) -> str:
    """Title of a set with what was counted in it: ``Neutral set (24 texts, 140 choices, 89 questions)``."""
    side = next((found[name] for when in ("after", "before") if (found := evaluation.get(when) or {}).get(name)), {})
    counts = [(_number(side, key), words(key[2:])) for key in side if COUNT.fullmatch(key)]
    counted = ", ".join(f"{count:,.0f} {unit}".strip() for count, unit in counts if count is not None)
    title = SETS.get(name, (words(name).capitalize(), ""))[0]
    return f"{title} ({counted})" if counted else title


def write(folder: Path) -> Path:
    """Write ``report.html`` from a run folder: its configuration, metrics, evaluation and answers.

    What a missing file would have told is left out, with a line that says so. Returns the path of the page.
    """
    settings, evaluation = read_json(folder / "config.json"), read_json(folder / "evaluation.json")
    steps, samples = read_lines(folder / "metrics.jsonl"), read_lines(folder / "answers.jsonl")
    profile, profiled = read_json(folder / "profile.json"), read_table(folder / "profile.csv")
    found = phases(profile, profiled)
    page = environment().get_template("report.html.j2").render(
        settings=settings, evaluation=evaluation, steps=steps, rows=rows(evaluation), totals=totals(steps),
        samples=samples, history=history(evaluation), sets=SETS, marks=MARKS, missing=MISSING, heading=heading,
        column=column, plot=plot, profile=profile, phases=found, stack=stack,
        bars=[(phase.name, phase.seconds) for phase in found],
    )  # fmt: skip
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def environment() -> jinja2.Environment:
    """The templates of this folder, with numbers written as people read them."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.ChainableUndefined,
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters |= {"number": number, "percent": percent, "duration": duration, "words": words}
    return templates


def duration(seconds: float) -> str:
    """Seconds as people say them: 41.3 s, 4 min 12 s, 3 h 05 min."""
    if seconds < 60:
        return f"{short(f'{seconds:.1f}')} s"
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min {round(seconds) % 60:02d} s"


def words(name: str) -> str:
    """A name as people write it: ``hallucinated_answers`` -> hallucinated answers."""
    return name.replace("_", " ")


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _ordered(first: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """``names`` without repeats, those of ``first`` in its order, then the others as they come."""
    return [name for name in first if name in names] + [name for name in dict.fromkeys(names) if name not in first]


def _row(name: str, key: str, metric: Metric, better: bool | None, old: float | None, new: float | None) -> Row:
    before, after = (percent(value) if metric.unit == "share" else number(value) for value in (old, new))
    rises = good = None
    if old is not None and new is not None and before != after and not math.isnan(new - old):
        rises = new > old
        slight = abs(new - old) < SLIGHT * (abs(old) if metric.unit == "relative" else 1)
        good = None if better is None or slight else rises == better
    return Row(name, metric.label, before, after, _change(metric.unit, old, new), good, rises, key, (old, new))


def _change(unit: str, old: float | None, new: float | None) -> str:
    if old is None or new is None or math.isnan(new - old):
        return MISSING
    difference, suffix = new - old, ""
    if unit == "share":
        difference, suffix = 100 * difference, " points"
    elif unit == "relative" and 0 < old < math.inf:
        if new >= 10 * old:
            return f"×{number(new / old)}"
        difference, suffix = 100 * (new / old - 1), " %"
    text = short(f"{abs(difference):.1f}") if suffix else number(abs(difference))
    return f"{'' if text == '0' else '+' if difference > 0 else '-'}{text}{suffix}"


def read_json(path: Path) -> dict[str, Any]:
    """A file of a run folder; empty when it is missing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The steps of a run; a line that a crash cut short is not one."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def read_table(path: Path) -> list[dict[str, str]]:
    """The lines of a csv file as text; none when it is missing."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return list(csv.DictReader(text.splitlines()))


def column(entries: Sequence[Mapping[str, Any]], *path: str, sign: float = 1.0) -> tuple[list[float], list[float]]:
    """Steps and values of the number at ``path`` of each entry, where there is one that can be plotted."""
    pairs = []
    for entry in entries:
        inner = functools.reduce(lambda value, name: value.get(name) or {}, path[:-1], entry)
        step, value = _number(entry, "step"), _number(inner, path[-1])
        if step is not None and value is not None and abs(value) < 1e100:  # not inf or nan, and matplotlib can cope
            pairs.append((step, sign * value))
    return [step for step, _ in pairs], [value for _, value in pairs]


def totals(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sums, medians and maxima over the steps; what no step has is left out."""
    reductions: Mapping[str, Callable[[list[float]], float]] = {
        "step_seconds": sum, "tokens": sum, "response_tokens": sum, "tokens_per_second": statistics.median,
        "mfu": statistics.median, "tflops_per_device": statistics.median, "peak_memory_bytes": max, "lr": max,
    }  # fmt: skip
    found = {key: reduce(values) for key, reduce in reductions.items() if (values := column(steps, key)[1])}
    return found | {"skipped": sum(bool(step.get("skipped")) for step in steps)}


def history(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The evaluations in the order of their steps, each step once; none when only the two ends were evaluated."""
    middle = evaluation.get("history") or []
    entries = [entry for entry in (evaluation.get("before"), *middle, evaluation.get("after")) if entry]
    by_step = {step: entry for entry in entries if (step := _number(entry, "step")) is not None}
    return [by_step[step] for step in sorted(by_step)] if len(middle) > 2 else []


PHASES = (
    "data", "forward", "loss", "reference", "backward", "optimizer", "communication", "other", "save", "evaluation",
)  # fmt: skip
BETWEEN_STEPS = ("save", "evaluation")


class Phase(NamedTuple):
    """A part of a step's time: seconds of each step, their median and 95th percentile, and its share of all steps."""

    name: str
    seconds: list[float]
    median: float
    p95: float
    share: float


def phases(profile: Mapping[str, Any], steps: Sequence[Mapping[str, str]]) -> list[Phase]:
    """Where the time of a step goes, from profile.json and the lines of profile.csv; phases with no time are left out.

    The first steps and what happened between steps are not counted.
    """
    warm = steps[profile.get("first_steps_left_out", 0) :]
    columns = {name: [float(row[f"seconds_{name}"]) for row in warm] for name in PHASES if name not in BETWEEN_STEPS}
    # Time of no phase stands in the row of the step that came after it; only what is within a step belongs here.
    named = [sum(values) for values in zip(*(columns[name] for name in columns if name != "other"), strict=True)]
    whole = [float(row["step_seconds"]) for row in warm]
    columns["other"] = [max(0.0, step - known) for step, known in zip(whole, named, strict=True)]
    found = []
    for name, values in columns.items():
        if values and sum(values) > 0.0005 * sum(whole):
            ordered = sorted(values)
            p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
            found.append(Phase(name, values, statistics.median(values), p95, sum(values) / sum(whole)))
    return found
