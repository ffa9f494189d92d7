"""What a measured or planned unlearning run costs beside RLHF, for people: tables, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearn_ds.cost import devices, published, ratio
from unlearn_ds.cost.rlhf import DENOMINATORS, Actor, Cluster, Samples
from unlearn_ds.drawing import ratio_percent


def project(measured: Mapping[str, Any], actor: Actor, steps: int, against: str, cluster: Cluster) -> dict[str, Any]:
    """The whole run from a few measured steps, and its ratio to every denominator.

    measured: device, ranks, seconds_a_step, hardware_flops_a_step and forget_samples_a_step of the run, beside what is
    only printed. against: the denominator that the plot is about. cluster: what RLHF is modelled on; hours are compared
    where the measured device is the same.
    """
    flops = measured["hardware_flops_a_step"] * steps
    hours = measured["seconds_a_step"] * measured["ranks"] * steps / 3600
    same = devices.memory_name(measured["device"]) == cluster.device
    compared = ratio.compare(actor, flops, hours if same else None, Samples(), cluster)
    samples = measured["forget_samples_a_step"] * steps
    by_name = {entry.denominator: entry for entry in compared}
    return {
        "measured": dict(measured), "steps": steps, "forget_samples": samples, "flops": flops, "device_hours": hours,
        "seconds": measured["seconds_a_step"] * steps, "against": against, "cluster": cluster._asdict(),
        "rlhf": {name: entry._asdict() for name, entry in by_name.items()},
        "limit": ratio.LIMIT,
        "samples_at_limit": {
            name: ratio.samples_within(ratio.LIMIT, flops, samples, entry.flops) for name, entry in by_name.items()
        },
        "assumptions": [
            *ratio.RLHF_ASSUMPTIONS,
            "Of the measured run attention, recomputation and the reference are counted.",
            f"Hours of RLHF are modelled for {cluster.count} x {cluster.device}"
            + ("." if same else f", not for the {measured['device']} that was measured: FLOPs are compared."),
        ],
    }  # fmt: skip


def print_projection(found: Mapping[str, Any]) -> None:
    """The figures of a run and its ratios, within 80 columns."""
    measured, figures = found["measured"], _table("", "")
    mfu, known = measured["mfu"], measured.get
    for name, value in (
        ("model", f"{measured['model']}, {measured['parameters'] / 1e6:,.4g}M parameters"),
        ("devices", f"{measured['ranks']} x {measured['device']}"),
        ("measured steps", f"{measured['steps_counted']} of {measured['steps_taken']} (the first are left out)"),
        ("a step", f"{measured['seconds_a_step']:.3g} s, {measured['forget_samples_a_step']:,} forget samples, "
                   f"{measured['tokens_a_step']:,.0f} tokens"),
        ("tokens a second", f"{measured['tokens_per_second']:,.0f}"),
        ("TFLOP/s a device", f"{measured['tflops_per_device']:.3g}"),
        ("MFU", "n/a, no peak is known of this device" if mfu is None
                else f"{ratio_percent(mfu)} of the specified peak"),
        ("peak memory", f"{_beside_plan(known('peak_memory_bytes'), known('planned_memory_bytes'))} a device"),
        ("host memory", f"{_beside_plan(known('host_memory_bytes'), known('planned_host_bytes'))}"),
        (f"whole run, {found['steps']} steps",
         f"{_hours(found['device_hours'])} device-hours, {found['flops']:.2e} FLOPs"),
    ):  # fmt: skip
        figures.add_row(name, value)
    ratios = _table("RLHF as", "FLOPs", "GPU-h", "ratio", "ratio of GPU-h", "2 % at")
    for name, entry in found["rlhf"].items():
        of_hours = "n/a" if entry["hours_ratio"] is None else ratio_percent(entry["hours_ratio"])
        ratios.add_row(
            name + (" *" if name == found["against"] else ""), f"{entry['flops']:.2e}", _hours(entry["hours"]),
            ratio_percent(entry["flops_ratio"]), of_hours, f"{found['samples_at_limit'][name]:,.0f}",
        )  # fmt: skip
    _print(figures, ratios)
    _say(
        "ratio: FLOPs of the whole run over those of RLHF. 2 % at: forget samples that reach it. *: in the plot's title"
    )
    _notes({name: entry["meaning"] for name, entry in found["rlhf"].items()}, found["assumptions"])


def print_measured_rlhf(found: Mapping[str, Any]) -> None:
    """RLHF as it ran here beside the unlearning run: seconds and FLOPs of published numbers of samples."""
    rlhf, measured = found["rlhf_measured"], found["measured"]
    table = _table("measured here", "s a sample", "FLOPs a sample", "samples", "hours", "FLOPs")
    for name, row in rlhf["stages"].items():
        table.add_row(
            name, f"{row['seconds_a_sample']:.3g}", f"{row['flops_a_sample']:.2e}", f"{row['samples']:,}",
            _hours(row["seconds"] / 3600), f"{row['flops']:.2e}",
        )  # fmt: skip
    table.add_row("RLHF", "", "", "", _hours(rlhf["seconds"] / 3600), f"{rlhf['flops']:.2e}")
    samples = measured["forget_samples_a_step"]
    table.add_row(
        "unlearning", f"{measured['seconds_a_step'] / samples:.3g}",
        f"{measured['hardware_flops_a_step'] / samples:.2e}", f"{found['forget_samples']:,}",
        _hours(found["seconds"] / 3600), f"{found['flops']:.2e}",
    )  # fmt: skip
    _print(table)
    _say(
        f"unlearning takes {ratio_percent(found['flops'] / rlhf['flops'])} of RLHF's FLOPs and "
        f"{ratio_percent(found['seconds'] / rlhf['seconds'])} of its time."
    )
    _notes({}, MEASURED_ASSUMPTIONS)


MEASURED_ASSUMPTIONS = (
    "RLHF is TRL's SFT, reward model and PPO on the same prompts, batch and devices: four models of one size, one pass "
    "each, one PPO epoch; weights in fp32, products in the precision of the run; samples padded to the longest of a "
    "batch, logits of whole samples. Its samples are the published numbers (DeepSpeed-Chat), as long as those here.",
    "Answers are generated for one batch at a time, which the memory bounds: larger batches make RLHF's time shorter.",
    "FLOPs of RLHF are products with weights; of the unlearning run attention and the reference are counted too.",
)


def print_table(device: str) -> None:
    """The analytic table, as Markdown: models and recipes by FLOPs, device-hours and ratios."""
    titles = ("model", "recipe", "FLOPs", "GPU-h", *DENOMINATORS, "step3, GPU-h", "2 % at")
    table, rows = _table(*titles), ratio.table(device=device)
    for row in rows:
        step3 = row["against"]["step3"]
        table.add_row(
            row["model"], row["recipe"], f"{row['flops']:.1e}", _hours(row["device_hours"]),
            *(ratio_percent(row["against"][name]["flops_ratio"]) for name in DENOMINATORS),
            ratio_percent(step3["hours_ratio"]), f"{row['samples_at_limit']:,.0f}",
        )  # fmt: skip
    costs = _table("RLHF: FLOPs, GPU-h", "devices", *DENOMINATORS)
    for model, row in {row["model"]: row for row in rows}.items():
        cells = [f"{entry['flops']:.1e}, {_hours(entry['hours'])}" for entry in row["against"].values()]
        costs.add_row(model, str(ratio.MODELS[model]), *cells)
    _print(table, costs)
    _say(
        f"GPU-h: {device}-hours of all devices, at RLHF's speed. 2 % at: forget samples that reach 2 % of step3. "
        "Ratios are of FLOPs."
    )
    meanings = {name: meaning for name, (meaning, _) in {**ratio.RECIPES, **DENOMINATORS}.items()}
    _notes(meanings, [*ratio.RLHF_ASSUMPTIONS, *ratio.TABLE_ASSUMPTIONS])


def print_calibration() -> None:
    """Every published figure beside the model's."""
    table = _table("published", "figure", "model", "error")
    for row in (*published.accounting(), *published.phases(), *published.stages(), *published.open_rlhf()):
        table.add_row(row.what, f"{row.published:.4g}", f"{row.modelled:.4g}", f"{row.error:+.0%}")
    _print(table)


def write(folder: Path, found: Mapping[str, Any]) -> list[Path]:
    """Write ``throughput.json`` and ``throughput.png`` and return their paths."""
    paths = [folder / "throughput.json", folder / "throughput.png"]
    paths[0].write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    _draw(paths[1], found)
    return paths


def _draw(path: Path, found: Mapping[str, Any]) -> None:
    """Ratio of FLOPs against forget samples, one line a denominator, and where each crosses the limit."""
    import numpy as np  # here, so that a table does not wait for it
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    limit, at_limit, run = found["limit"], found["samples_at_limit"], found["forget_samples"]
    low, high = min(run, *at_limit.values()) / 8, max(run, *at_limit.values()) * 8
    samples = np.geomspace(low, high, 50)
    figure = Figure(figsize=(8.4, 5.0), dpi=140, layout="constrained")
    axes = figure.subplots()
    axes.axhspan(limit * 1e-9, limit, color="#14886b", alpha=0.07, linewidth=0)
    axes.axhline(limit, color="#14886b", linewidth=1.2, linestyle=(0, (4, 3)))
    for (name, crossing), ink in zip(at_limit.items(), ("#e2572b", "#0b87b5", "#5b50e0", "#b7791f"), strict=True):
        chosen = name == found["against"]
        width, strength = (2.4, 1.0) if chosen else (1.3, 0.75)
        axes.plot(samples, limit * samples / crossing, color=ink, linewidth=width, alpha=strength, zorder=2 + chosen,
                  label=f"{name}: 2 % at {crossing:,.0f} samples")  # fmt: skip
        if chosen:
            axes.plot([crossing] * 2, [0, limit], color=ink, linewidth=1, linestyle=(0, (1, 2)))
        axes.plot([crossing], [limit], marker="o", markersize=7 if chosen else 4.5, color=ink, markeredgecolor="white",
                  zorder=4)  # fmt: skip
    mine = found["rlhf"][found["against"]]["flops_ratio"]
    axes.plot([run], [mine], marker="D", markersize=9, color="#161b26", markeredgecolor="white", zorder=5)
    right = run > (low * high) ** 0.5
    axes.annotate(f"this run: {run:,} samples, {ratio_percent(mine)}", (run, mine), (-12, 8) if right else (12, -14),
                  textcoords="offset points", ha="right" if right else "left", fontweight="bold")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="forget samples (steps x batch)",
             ylim=(limit * low / max(at_limit.values()), limit * high / min(at_limit.values())))  # fmt: skip
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel("FLOPs of unlearning, share of RLHF's")
    axes.annotate("2 %, the paper's claim", (high, limit), (-6, 5), textcoords="offset points", ha="right",
                  color="#14886b", fontsize=9)  # fmt: skip
    axes.tick_params(which="both", length=0)
    axes.grid(which="major", color="#e6e8ee", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", fontsize=9, title="RLHF as", alignment="left")
    model = found["measured"]["model"]
    axes.set_title(
        f"{model}: unlearning costs {ratio_percent(mine)} of RLHF ({found['against']})", loc="left", fontweight="bold"
    )
    figure.savefig(path)


def _beside_plan(num_bytes: float | None, planned: float | None) -> str:
    """Measured GiB, and what the plan has, where they are known."""
    if num_bytes is None:
        return "n/a"
    return f"{num_bytes / 2**30:.1f} GiB" + ("" if planned is None else f" ({planned / 2**30:.1f} planned)")


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _table(*titles: str):
    from rich.box import MARKDOWN
    from rich.table import Table

    table = Table(box=MARKDOWN, show_header=any(titles))
    for n, title in enumerate(titles):
        table.add_column(title, justify="left" if n == 0 or not title else "right", no_wrap=True)
    return table


def _print(*tables: Any) -> None:
    from rich.console import Console

    for table in tables:
        # As wide as the table is: one that wraps is no table in a file.
        Console(width=max(80, Console(width=200).measure(table).maximum)).print(table)


def _say(text: str) -> None:
    print(text)


def _notes(meanings: Mapping[str, str], assumptions: Sequence[str]) -> None:
    for name, meaning in meanings.items():
        _say(f"  {name:<13}{meaning}")
    _say("assumptions")
    for assumption in assumptions:
        _say(f"- {assumption}")
