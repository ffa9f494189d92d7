"""Numbers and plots as the report shows them: short, and as SVG in the page's own colours."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

MISSING = "–"
MOST_BARS = 60
"""In a plot of one bar a step."""


def number(value: float | None) -> str:
    """A number in at most seven characters: 0.713, 8.31, 42.0, 12,345, 1.2e12, inf, nan; a dash when it is missing."""
    if value is None or not math.isfinite(value):
        return MISSING if value is None else str(value)
    size = abs(value)
    if size >= 99_999.5 or 0 < size < 0.0005:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    decimals = 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{value:,.{decimals}f}" if size else "0"


def percent(value: float | None) -> str:
    """A fraction as percentage: 0.884 -> 88.4 %."""
    return number(value) if value is None or not math.isfinite(value) else f"{short(f'{100 * value:.1f}')} %"


def ratio_percent(value: float) -> str:
    """Three digits, however small: a ratio that reads 0 says nothing."""
    return f"{float(f'{100 * value:.3g}'):,.12f}".rstrip("0").rstrip(".") + " %"


def short(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def stack(parts: Sequence[tuple[str, Sequence[float]]], first: int) -> str:
    """Parts (CSS variable, value of each step), one on the other, as bars; many steps are averaged to ``MOST_BARS``.

    first: number of the first step."""
    num_steps = len(parts[0][1])
    size = math.ceil(num_steps / MOST_BARS)

    def draw(axes: Any, inks: Sequence[str]) -> None:
        starts = range(0, num_steps, size)
        bottom = [0.0] * len(starts)
        for (_, values), ink in zip(parts, inks[1:], strict=True):
            heights = [statistics.fmean(values[start : start + size]) for start in starts]
            centres = [first + start + (size - 1) / 2 for start in starts]
            axes.bar(centres, heights, width=0.86 * size, bottom=bottom, color=ink, linewidth=0)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        _frame(axes, [0.0, *bottom], False, inks[0])
        axes.set_ylim(0, 1.05 * max(bottom))
        axes.set_axisbelow(True)

    return _svg([name for name, _ in parts], draw, 2.7)


def plot(curves: Sequence[tuple[str, list[float], list[float]]], share: bool = False, fill: bool = True) -> str:
    """Curves (CSS variable, x, y) as SVG coloured by the page, so that it follows dark mode; log beyond two decades.

    fill: shade what lies below a curve, which helps a single one and muddles many.
    """

    def draw(axes: Any, inks: Sequence[str]) -> None:
        _frame(axes, [value for _, _, y in curves for value in y], share, inks[0])
        for (_, x, y), ink in zip(curves, inks[1:], strict=True):
            _draw(axes, x, y, ink, fill)

    return _svg([name for name, _, _ in curves], draw, 1.7)


def scatter(groups: Sequence[tuple[str, list[float], list[float]]], share: bool) -> str:
    """Points (CSS variable, x, y) as SVG, a group a colour, of which the first is drawn hollow; y is a share.

    share: x is one too, else x is linear, or log beyond two decades.
    """

    def draw(axes: Any, inks: Sequence[str]) -> None:
        _frame(axes, [value for _, _, y in groups for value in y], True, inks[0])
        values = [value for _, x, _ in groups for value in x]
        low, high = min(values), max(values)
        if share:
            axes.set_xlim(-0.03, 1.03)
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        elif low > 0 and high > 100 * low:
            axes.set_xscale("log")
            axes.minorticks_off()
        else:
            axes.set_xlim(min(low, 0), 1.08 * high if high > 0 else 1)
            axes.locator_params(axis="x", integer=False)
        axes.xaxis.set_major_formatter(lambda value, _: percent(value) if share else short(number(value)))
        axes.grid(axis="x", color=inks[0], linewidth=0.8)
        for n, ((_, x, y), ink) in enumerate(zip(groups, inks[1:], strict=True)):
            axes.plot(x, y, color=ink, linestyle="", marker="o", markersize=7, fillstyle="full" if n else "none")

    return _svg([name for name, _, _ in groups], draw, 2.7)


def _svg(colours: Sequence[str], draw: Callable[[Any, Sequence[str]], None], height: float) -> str:
    """What ``draw`` makes of empty axes as SVG; its inks, that of rules and then ``colours``, are CSS variables."""
    import matplotlib  # here, so that training does not wait for it
    from matplotlib.figure import Figure

    names = ["muted", "rule", *colours]
    inks = [f"#0000{index:02x}" for index in range(len(names))]
    svg = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": str(names), "font.size": 9.5}):
        figure = Figure(figsize=(4.6, height), layout="constrained")
        draw(figure.subplots(), inks[1:])
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=no_metadata)
    text = re.sub(r'.*<svg[^>]*(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg.getvalue(), flags=re.DOTALL)
    text = re.sub(r'\sid="[\w.]+_\d+"|<style.*?</style>', "", text)  # ids would repeat from plot to plot
    return re.sub("#0000([0-9a-f]{2})", lambda found: f"var(--{names[int(found[1], 16)]})", text)


def _frame(axes: Any, values: Sequence[float], share: bool, ink: str) -> None:
    """Set scale, limits and ticks of an empty plot: no box, a few horizontal rules."""
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), 0.05 * abs(high)) or 1.0  # a flat curve shall look flat
    if share:
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    elif low > 0 and high > 100 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.5, high * 1.5)
        axes.minorticks_off()
    else:
        axes.set_ylim(low - room if low < 0 else max(low - room, 0), high + room)
        axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: percent(value) if share else short(number(value)))
    axes.grid(axis="y", color=ink, linewidth=0.8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw(axes: Any, x: list[float], y: list[float], ink: str, fill: bool) -> None:
    """Draw one curve; a long one as a thin line with its running mean over a twentieth of the steps."""
    import numpy as np

    if window := len(y) // 40 * 2:
        axes.plot(x, y, color=ink, linewidth=0.8, alpha=0.35)
        around = np.ones(window + 1)
        y = np.convolve(y, around, mode="same") / np.convolve(np.ones(len(y)), around, mode="same")
    axes.plot(x, y, color=ink, linewidth=1.8, marker="o", markersize=4, markevery=[-1] if len(x) > 12 else None)
    if fill:
        axes.fill_between(x, y, axes.get_ylim()[0], color=ink, alpha=0.08, linewidth=0)
