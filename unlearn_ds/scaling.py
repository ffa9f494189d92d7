"""Predicted step times of presets on more and more GPUs: table and plot; ``launchers/scaling.py`` is the front door."""

from __future__ import annotations

from typing import NamedTuple

from unlearn_ds import arguments, log, sizing
from unlearn_ds.config import RunConfig, UsageError, replace
from unlearn_ds.cost.interconnect import BUS_EFFICIENCY, CLUSTERS, NodeKind
from unlearn_ds.cost.memory import memory_plan
from unlearn_ds.cost.scaling import ACHIEVABLE, OVERLAP, StepTime, predict
from unlearn_ds.registry import did_you_mean
from unlearn_ds.sizing import GIB, Machine

PRESETS = ("llama2-7b", "llama3-8b", "llama2-13b", "llama2-70b", "llama3-70b")
"""Presets shown where none is asked for, with all their parameters trained."""
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
CONFIGURATIONS = {"ZeRO-3": "zero3", "hpZ": "zero3_hpz"}
"""Label -> configuration that is compared."""


class Point(NamedTuple):
    """A configuration on some GPUs: its step, what a GPU would hold, and whether that fits the cluster's."""

    label: str
    step: StepTime
    peak_bytes: int
    fits: bool


def split(names: str | tuple[str, ...]) -> list[str]:
    """Names with commas between them, as a list."""
    return names.split(",") if isinstance(names, str) else list(names)


def lines(preset: str, scenario: str, cluster_name: str, lora_rank: int = 0, tokens: int = 4096) -> list[Point]:
    """A point for each number of GPUs and configuration, ``tokens`` on every GPU: more GPUs take more rows a step."""
    if cluster_name not in CLUSTERS:
        raise UsageError(f"--cluster: unknown '{cluster_name}'. {did_you_mean(cluster_name, CLUSTERS)}")
    cluster = CLUSTERS[cluster_name]
    config = arguments.parse({"preset": preset, "scenario": scenario, "lora_rank": lora_rank, "reference": "resident"})
    config = replace(config, **{"model.activation_checkpointing": True})
    return [
        point(replace(config, **{"engine.ds_config": name}), label, gpus, cluster, tokens)
        for gpus in GPUS
        for label, name in CONFIGURATIONS.items()
        if name != "zero3_hpz" or gpus > cluster.gpus_per_node
    ]


def point(config: RunConfig, label: str, gpus: int, cluster: NodeKind, tokens: int) -> Point:
    """Step and memory of one configuration; a quarter of the tokens has a KL."""
    ranks = Machine(gpus // cluster.gpus_per_node, cluster.gpus_per_node, cluster.memory_gib * GIB, None)
    shape, num_adapter = sizing.shape_of(config)
    setup = sizing.setup_of(config, shape, num_adapter, ranks)
    setup = setup._replace(num_tokens=tokens, num_kl_tokens=tokens // 4, accumulation=1)
    plan = memory_plan(shape, setup)
    return Point(label, predict(shape, setup, cluster), plan.peak(), sizing.fits(plan, ranks))


def say(preset: str, cluster_name: str, points: list[Point]) -> None:
    """One preset's points as a table."""
    from rich.table import Table

    tokens = points[0].step.tokens // points[0].step.gpus
    title = f"{preset}, {cluster_name}, {tokens:,} tokens a GPU"
    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    for name in ("GPUs", "", "step s", "compute", "network", "nvlink", "efficiency", "limit", "GiB"):
        table.add_column(name, justify="left" if name in ("", "limit") else "right", no_wrap=True)
    for found in points:
        step = found.step
        table.add_row(
            f"{step.gpus:,}", found.label, f"{step.seconds:.2f}", f"{step.compute:.2f}", f"{step.network:.2f}",
            f"{step.nvlink:.2f}", f"{step.efficiency:.0%}", step.limit,
            f"{found.peak_bytes / GIB:.0f}" + ("" if found.fits else "!"),
        )  # fmt: skip
    log.console().print(table)


ASSUMPTIONS = (
    "Weak scaling: a GPU's tokens stay, so the rows of a step grow with the GPUs.",
    f"Compute at {ACHIEVABLE['H100']:.0%} of an H100's peak and {ACHIEVABLE['A100']:.0%} of an A100's, collectives at "
    f"{BUS_EFFICIENCY:.0%} of the data sheets' bandwidth; published runs and nccl-tests reach that.",
    f"Traffic hides behind {OVERLAP:.0%} of the compute of its pass; efficiency is compute / step.",
    "limit: compute while less than 5 % of it is waited for, else the larger of network and NVLink, which run at once.",
    "hpZ gathers within a node in backward: less network, more NVLink. !: more than the GPU's memory.",
    "Predicted; no cluster has been measured yet.",
)


def say_assumptions() -> None:
    log.say("assumptions")
    for assumption in ASSUMPTIONS:
        log.say(f"- {assumption}")


def draw(points: dict[tuple[str, str], list[Point]], path: str) -> None:
    """Step time and efficiency against GPUs, a column each preset and a colour each cluster.

    points: by (preset, cluster). A square marks a step that waits for the network, a hollow one a plan that a GPU's
    memory does not hold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    presets, clusters = (list(dict.fromkeys(names)) for names in zip(*points, strict=True))
    figure, axes = pyplot.subplots(2, len(presets), figsize=(3.1 * len(presets) + 0.6, 5.8), sharex=True, squeeze=False)
    for (preset, cluster), found in points.items():
        above, below = axes[:, presets.index(preset)]
        for label, style in STYLES.items():
            mine = [p for p in found if p.label == label]
            name = f"{label}, {cluster}: {CLUSTERS[cluster].network * 8 / 1e9:.0f} Gb/s a GPU"
            colour = COLOURS[clusters.index(cluster) % len(COLOURS)]
            for axis, values in (
                (above, [p.step.seconds for p in mine]),
                (below, [100 * p.step.efficiency for p in mine]),
            ):
                axis.plot([p.step.gpus for p in mine], values, color=colour, ls=style, lw=1.5, label=name)
                _marks(axis, mine, values, colour)
        above.set_title(preset, fontsize=10)
    for above, below in axes.T:
        above.set_ylim(bottom=0)
        below.set_ylim(0, 105)
        below.set_xlabel("GPUs")
        below.set_xscale("log", base=2)
        below.set_xticks(GPUS[::2], [f"{n:,}" for n in GPUS[::2]])
    axes[0][0].set_ylabel("seconds of a step")
    axes[1][0].set_ylabel("efficiency, % of compute alone")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    step = next(iter(points.values()))[0].step
    _legend(figure, axes[0][0], step.tokens // step.gpus)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    log.say(f"plot        {path}")


STYLES = {"ZeRO-3": "-", "hpZ": "--"}
COLOURS = ("#1f6fb2", "#c0504d", "#5a8f3c", "#7b5ea7")


def _marks(axis, points: list[Point], values: list[float], colour: str) -> None:
    for fits in (True, False):
        waits = [
            (p.step.gpus, v)
            for p, v in zip(points, values, strict=True)
            if p.step.limit == "network" and p.fits == fits
        ]
        rest = [
            (p.step.gpus, v)
            for p, v in zip(points, values, strict=True)
            if p.step.limit != "network" and p.fits == fits
        ]
        for chosen, marker in ((waits, "s"), (rest, "o")):
            if chosen:
                axis.plot(*zip(*chosen, strict=True), marker, color=colour, ms=4.5, mfc=colour if fits else "white")


def _legend(figure, axis, tokens: int) -> None:
    from matplotlib.lines import Line2D

    handles, labels = axis.get_legend_handles_labels()
    marks = {
        "waits for the network": ("s", "black"),
        "does not": ("o", "black"),
        "hollow: too large for a GPU": ("o", "white"),
    }
    handles += [Line2D([], [], color="black", marker=m, mfc=fill, ls="", ms=5) for m, fill in marks.values()]
    figure.legend(handles, [*labels, *marks], loc="lower center", ncol=4, fontsize=8, frameon=False)
    figure.suptitle(f"Predicted optimizer step, all parameters, {tokens:,} tokens on every GPU", fontsize=11)
    figure.tight_layout(rect=(0, 0.07, 1, 0.99))
