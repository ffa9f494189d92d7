"""Scatter plots: what the SVG shows of its points."""

import re

import pytest

from unlearn_ds.drawing import scatter

Y_TICKS = ["0 %", "25 %", "50 %", "75 %", "100 %"]


def drawn(x, share):
    text = scatter([("ink", [x[0]], [0.6]), ("v1", list(x[1:]), [0.2] * (len(x) - 1))], share)
    points = re.findall(r'<use xlink:href="#m\w+"[^>]*style="(fill[^"]*; stroke: var\(--\w+\))"', text)
    return points, re.findall(r">([^<>]+)</text>", text)


def test_the_first_group_is_hollow_and_each_point_is_drawn():
    points, _ = drawn((0.5, 0.4, 0.3), share=True)
    assert points == ["fill-opacity: 0; stroke: var(--ink)"] + ["fill: var(--v1); stroke: var(--v1)"] * 2


@pytest.mark.parametrize(
    ("x", "share", "ticks"),
    [
        ((0.5, 0.4), True, Y_TICKS),
        ((1.0, 30.0, 2000.0), False, ["1", "10", "100", "1,000"]),
        ((20.0, 30.0, 2000.0), False, ["0", "500", "1,000", "1,500", "2,000"]),
        ((0.0, 30.0, 2000.0), False, ["0", "500", "1,000", "1,500", "2,000"]),
        ((0.6, 1.0), False, ["0", "0.25", "0.5", "0.75", "1"]),
        ((0.0, 0.0), False, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
    ],
    ids=["share", "log", "linear", "zero", "fractions", "all_zero"],
)
def test_x_is_a_share_or_linear_or_logarithmic_beyond_two_decades(x, share, ticks):
    points, texts = drawn(x, share)
    assert texts == [*ticks, *Y_TICKS] and len(points) == len(x)
