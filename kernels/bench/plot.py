"""Plots of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TERMS = {"ce": "cross-entropy", "kl": "KL", "three": "three terms"}
OURS, THEIRS = "#2563eb", "#9ca3af"


def loss(lines: list[dict[str, Any]], path: Path) -> None:
    """Seconds and peak memory of the loss stage: a row of panels for each term and number of rows."""
    from matplotlib.figure import Figure

    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["term"], line["rows"]), []).append(line)
    heights = [len(group) for group in groups.values()]
    figure = Figure(figsize=(11, 0.9 * len(groups) + 0.32 * sum(heights) + 0.8), layout="constrained")
    axes = figure.subplots(len(groups), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    for (left, right), ((term, rows), group) in zip(axes, groups.items(), strict=True):
        names = [line["implementation"] for line in group]
        colors = [OURS if name == "unlearn_ds" else THEIRS for name in names]
        seconds = [line["seconds"] for line in group]
        in_ms = max(seconds) < 1
        for axis, values, unit in (
            (left, [1000 * value if in_ms else value for value in seconds], "ms" if in_ms else "s"),
            (right, [line["extra_bytes"] / 2**30 for line in group], "GiB"),
        ):
            bars = axis.barh(names, values, color=colors)
            axis.bar_label(bars, labels=[f" {value:.3g} {unit}" for value in values], fontsize=8)
            axis.set_xlim(0, 1.2 * max(values))
            axis.invert_yaxis()
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
        right.set_yticks([])
        left.set_title(f"{TERMS[term]}, {rows} response tokens: time", fontsize=9, loc="left")
        right.set_title("extra memory", fontsize=9, loc="left")
    first = lines[0]
    figure.suptitle(f"{first['head']}, {first['dtype']}, {first['hardware']}", fontsize=10)
    figure.savefig(path, dpi=150)
