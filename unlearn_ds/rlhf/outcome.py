"""Unlearning beside RLHF as both ran here: a table for the terminal, ``rlhf.json`` and ``rlhf.png``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.table import Table

from unlearn_ds import log
from unlearn_ds.drawing import number, percent, ratio_percent
from unlearn_ds.run_folder import write_json

_INK = {"unlearning": "#0b87b5", "rlhf": "#e2572b"}


def show(folder: Path, found: Mapping[str, Any]) -> None:
    """Print the tables, and write what they were made of and a plot into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "rlhf.json", found)
    _draw(folder / "rlhf.png", found)
    for table in (effect(found), cost(found)):
        log.console().print(table)
    for line in (*ratio(found), *(f"not counted: {what}" for what in found["not_counted"])):
        log.say(line)
    for name in ("rlhf.json", "rlhf.png"):
        log.say(f"written     {folder / name}")


def effect(found: Mapping[str, Any]) -> Table:
    """What each did to the model."""
    table = _table(found["headline"], "before", "unlearning", "RLHF")
    states = [found["before"], found["unlearning"]["after"], found["rlhf"]["after"]]
    for label, group, key, write in (
        (f"on {found['before']['unlearned']['n']} unlearned prompts", "unlearned", "rate", percent),
        ("on unseen prompts", "unseen", "rate", percent),
        ("perplexity, normal rows", "normal", "perplexity", number),
        ("perplexity, neutral text", "neutral", "perplexity", number),
        ("accuracy, neutral choices", "neutral", "accuracy", percent),
        ("neutral questions answered right", "neutral", "question_accuracy", percent),
    ):
        table.add_row(label, *(write(state.get(group, {}).get(key)) for state in states))
    return table


def cost(found: Mapping[str, Any]) -> Table:
    """What each took, evaluations left out."""
    table = _table("", "steps", "samples", "seconds", "FLOPs", "rate")
    rlhf, mine = found["rlhf"], found["unlearning"]
    for name, row in rlhf["stages"].items():
        rate = [point["rate"] for point in rlhf["curve"] if point["stage"] == name][-1]
        table.add_row(name, str(row["steps"]), f"{row['samples']:,}", *_spent(row), percent(rate))
    table.add_row("RLHF", "", "", *_spent(rlhf), percent(rlhf["curve"][-1]["rate"]))
    table.add_row("unlearning", str(mine["steps"]), "", *_spent(mine), percent(mine["after"]["unlearned"]["rate"]))
    return table


def ratio(found: Mapping[str, Any]) -> list[str]:
    """The ratios in sentences: of all that ran, of RLHF until it first reached the rate, of published samples."""
    mine, rlhf = found["unlearning"], found["rlhf"]

    def of(other: Mapping[str, Any]) -> str:
        flops, seconds = (ratio_percent(mine[name] / other[name]) for name in ("flops", "seconds"))
        return f"{flops} of RLHF's FLOPs and {seconds} of its time"

    target = mine["after"]["unlearned"]["rate"]
    reached = [point for point in rlhf["curve"] if point["flops"] and point["rate"] <= target]
    lines = [f"unlearning took {of(rlhf)}."]
    if reached and reached[0]["flops"] < rlhf["flops"]:
        lines.append(f"RLHF was there after {reached[0]['stage']}: {of(reached[0])} until then.")
    elif not reached:
        lines.append("RLHF ended at a higher rate.")
    return [*lines, f"RLHF on its published numbers of samples, at this speed: {of(found['at_published_samples'])}."]


def _spent(row: Mapping[str, Any]) -> Sequence[str]:
    return f"{row['seconds']:,.0f}", f"{row['flops']:.2e}"


def _table(*titles: str) -> Table:
    table = Table(box=MARKDOWN)
    for n, title in enumerate(titles):
        table.add_column(title, justify="right" if n else "left", no_wrap=True)
    return table


def _draw(path: Path, found: Mapping[str, Any]) -> None:
    """The rate against FLOPs, both from the same model on; RLHF's stages are shaded."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8.4, 4.6), dpi=140, layout="constrained")
    axes = figure.subplots()
    begin = 0.0
    for n, (name, row) in enumerate(found["rlhf"]["stages"].items()):
        end = begin + row["flops"] / 1e15
        axes.axvspan(begin, end, color=_INK["rlhf"], alpha=0.05 + 0.05 * (n % 2), linewidth=0)
        axes.annotate(name, ((begin + end) / 2, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=9)
        begin = end
    for name, label in (("rlhf", "RLHF (TRL: SFT, reward model, PPO)"), ("unlearning", "unlearning")):
        curve = found[name]["curve"]
        axes.plot([point["flops"] / 1e15 for point in curve], [point["rate"] for point in curve], color=_INK[name],
                  marker="o", markersize=5, linewidth=2.2, label=label, markeredgecolor="white")  # fmt: skip
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="training, PFLOP", ylabel=found["headline"], xlim=(0, None), ylim=(0, None))
    axes.set_title(f"{found['model']}, {found['prompts']} prompts, {found['ranks']} x {found['device']}", pad=22)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
