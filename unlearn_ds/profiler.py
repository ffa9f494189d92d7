"""Where the time of a run goes: phases, FLOPs, memory, collectives, goodput; and traces.

The clock and the headline figures are always on: a few reads of a timer a step. With ``--profile`` every phase ends by
waiting for the device, collectives are counted and timed one by one, and each step leaves a row.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from unlearn_ds import dist, log
from unlearn_ds.cost import devices
from unlearn_ds.model import PackedCausalLM

PHASES = (
    "data", "forward", "loss", "reference", "backward", "optimizer", "communication", "save", "evaluation", "other",
)  # fmt: skip
"""In the order of a step. "other" is what no phase covers; start-up for the clock of a whole run."""

WARM_UP = 3
"""Steps that no median or percentile counts: kernels are compiled and memory is taken there."""

TRACED = 3
"""Steps that a trace holds."""

_NO_FIGURES = re.compile("step|lr|grad_norm|loss.*")
"""Names in a row that say nothing of speed."""

T = TypeVar("T")
Point = tuple[Any, str]
"""(object, name of its function) where a collective can be counted."""


class Clock:
    """Seconds of each phase. A phase inside another interrupts it, so that phases add up to the time that has passed.

    synchronize: called where a phase begins and ends; waits for a device that works beside the host.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None):
        self.synchronize, self.labelled = synchronize, False
        self._open, self._seconds = ["other"], Counter()
        self.began = self._mark = time.perf_counter()

    @property
    def current(self) -> str:
        return self._open[-1]

    def enter(self, name: str) -> None:
        self._charge()
        self._open.append(name)

    def leave(self) -> None:
        self._charge()
        self._open.pop()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what happens inside to ``name``; in a trace it stands there by that name."""
        label = torch.profiler.record_function(name) if self.labelled else contextlib.nullcontext()
        with label:
            self.enter(name)
            try:
                yield
            finally:
                self.leave()

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far."""
        self._charge()
        return {name: self._seconds[name] for name in PHASES}

    def _charge(self) -> None:
        if self.synchronize is not None:
            self.synchronize()
        now = time.perf_counter()
        self._seconds[self._open[-1]] += now - self._mark
        self._mark = now


class Collectives:
    """Counts calls and bytes of collectives, this rank's, and times them by waiting for each."""

    def __init__(self, clock: Clock, points: Sequence[Point]):
        self.calls, self.bytes = Counter(), Counter()
        self._clock, self._inside = clock, False
        self._originals = [(owner, name, vars(owner).get(name)) for owner, name in points]
        for owner, name in points:
            setattr(owner, name, self._counted(name, getattr(owner, name)))

    def close(self) -> None:
        """Put everything back as it was."""
        for owner, name, original in self._originals:
            if original is None:  # a method of its class, which the instance had not replaced
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # DeepSpeed's functions call torch's
                return function(*args, **kwargs)
            self._inside = True
            try:
                with self._clock.phase("communication"):
                    handle = function(*args, **kwargs)
                    if handle is not None:
                        handle.wait()
            finally:
                self._inside = False
            self.calls[name] += 1
            self.bytes[name] += max((_num_bytes(value) for value in (*args, *kwargs.values())), default=0)
            return handle

        return counted


def _num_bytes(value: Any) -> int:
    """Bytes of a tensor or of a list of tensors; the largest argument of a collective is the whole that it moves."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_num_bytes, value)) if isinstance(value, (list, tuple)) else 0


class Profiler:
    """The figures of a run. Without ``detailed`` it keeps time and headline figures alone.

    Args:
        detailed: wait for the device at the end of each phase, count collectives, print and keep a row a step.
        trace: record a torch profiler trace of a few steps on the main rank.
        device_name: as ``cost.devices`` knows it. synchronize: waits for the device.
    """

    def __init__(
        self, detailed: bool = False, trace: bool = False, device_name: str = "cpu",
        synchronize: Callable[[], None] | None = None,
    ):  # fmt: skip
        self.detailed, self.device_name = detailed, device_name
        self.clock = Clock(synchronize if detailed else None)
        self.peak = devices.peak_flops(device_name)
        self.achievable, self.achievable_source = devices.achievable_flops(device_name), "published"
        self.rows: list[dict[str, Any]] = []
        self._before = dict.fromkeys(PHASES, 0.0)
        self._counted: tuple[Counter, Counter] = Counter(), Counter()
        self.collectives: Collectives | None = None
        self._trace, self._tracer = trace and dist.is_main(), None

    def watch(self, model: PackedCausalLM, points: Sequence[Point]) -> None:
        """Look inside the forward pass and at collectives; nothing without ``detailed``."""
        if not self.detailed:
            return
        clock = self.clock
        head, base = model.causal_lm.get_output_embeddings(), model.causal_lm.base_model

        def name_of(module: torch.nn.Module) -> str:
            if clock.current != "forward":
                return clock.current
            return "loss" if module is head else "forward" if torch.is_grad_enabled() else "reference"

        for module in (head, base):  # without gradients the base runs as its own reference, adapters off
            module.register_forward_pre_hook(lambda module, _: clock.enter(name_of(module)))
            module.register_forward_hook(lambda *_: clock.leave(), always_call=True)
        self.collectives = Collectives(clock, points)
        if self.achievable is None and model.device.type == "cpu":
            self.achievable, self.achievable_source = measured_flops(model.causal_lm.dtype), "measured here"

    def begin_step(self, folder: Path | None, num_steps: int) -> None:
        """Called before each step: starts the trace at the first one and moves it on at the others."""
        if not self._trace or folder is None:
            return
        if self._tracer is None:
            self._tracer = _tracer(folder / "trace.json.gz", num_steps)
            self._tracer.start()
            self.clock.labelled = True
        else:
            self._tracer.step()

    def end_step(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Add the row of a step: its line of metrics.jsonl, and seconds of the phases since the row before.

        What happened between two steps, a checkpoint or an evaluation, stands in the row of the second.
        """
        now = self.clock.seconds()
        row = {**line, **{f"seconds_{name}": now[name] - self._before[name] for name in PHASES}}
        self._before = now
        if self.collectives is not None:
            calls, num_bytes = self.collectives.calls, self.collectives.bytes
            row["collective_calls"] = (calls - self._counted[0]).total()
            row["collective_bytes"] = (num_bytes - self._counted[1]).total()
            self._counted = calls.copy(), num_bytes.copy()
        self.rows.append(row)
        return row

    def finish(self, folder: Path | None) -> None:
        """Say the headline figures; in detail also write ``profile.json`` and ``profile.csv``. All ranks may call."""
        if self._tracer is not None:
            self._tracer.stop()
            self.clock.labelled = False
        if self.collectives is not None:
            self.collectives.close()
        if not self.rows or not dist.is_main():
            return
        found = self.summary()
        log.say(f"throughput  {headline(found)}")
        if self.detailed and folder is not None:
            (folder / "profile.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            with (folder / "profile.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(self.rows[0]))
                writer.writeheader()
                writer.writerows(self.rows)

    def summary(self) -> dict[str, Any]:
        """Medians and 95th percentiles of the steps after the first, totals, and goodput."""
        rows, totals = warm(self.rows), self.clock.seconds()
        wall = time.perf_counter() - self.clock.began
        productive = sum(row["step_seconds"] for row in self.rows if not row["skipped"])
        names = [name for name, value in rows[0].items() if _is_number(value) and not _NO_FIGURES.fullmatch(name)]
        found: dict[str, Any] = {
            "device": self.device_name, "ranks": dist.world_size(), "synchronized": self.detailed,
            "steps": len(self.rows), "first_steps_left_out": len(self.rows) - len(rows),
            "peak_flops": {"specified": self.peak, "achievable": self.achievable, "source": self.achievable_source},
            "padding_tokens": 0, "padding_note": "sequences travel end to end in one stream: there is no padding",
            "goodput": productive / wall, "productive_seconds": productive, "wall_seconds": wall,
            "phase_seconds_of_the_run": totals,
        }  # fmt: skip
        for key, reduce in (("median", statistics.median), ("p95", percentile_95)):
            values = {name: [row[name] for row in rows if _is_number(row[name])] for name in names}
            found[key] = {name: reduce(column) for name, column in values.items()}
        flops = statistics.median(row["model_flops"] / row["step_seconds"] for row in rows) / dist.world_size()
        hardware = statistics.median(row["hardware_flops"] / row["step_seconds"] for row in rows) / dist.world_size()
        found["utilization"] = {
            "mfu": share(flops, self.peak), "mfu_of_achievable": share(flops, self.achievable),
            "hfu": share(hardware, self.peak), "hfu_of_achievable": share(hardware, self.achievable),
        }  # fmt: skip
        if self.collectives is not None:
            found["collectives"] = {
                name: {"calls": count, "bytes": self.collectives.bytes[name]}
                for name, count in sorted(self.collectives.calls.items())
            }
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _tracer(path: Path, num_steps: int) -> torch.profiler.profile:
    """A recorder of ``TRACED`` steps after the first ones, or of what a short run has. Perfetto opens its file."""
    active = max(1, min(TRACED, num_steps - WARM_UP))
    warm_up = 1 if num_steps > active else 0
    schedule = torch.profiler.schedule(
        wait=max(0, min(WARM_UP, num_steps - active) - warm_up), warmup=warm_up, active=active, repeat=1
    )
    return torch.profiler.profile(schedule=schedule, on_trace_ready=lambda made: made.export_chrome_trace(str(path)))


def warm(rows: Sequence[T]) -> Sequence[T]:
    """The rows without the first ``WARM_UP`` steps; a run of fewer than twice as many loses half of its steps."""
    return rows[min(WARM_UP, len(rows) // 2) :]


def percentile_95(values: Sequence[float]) -> float:
    """The smallest value that at least 95 % of the values do not exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def share(speed: float, peak: float | None) -> float | None:
    return speed / peak if peak else None


def measured_flops(dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of a square product on this CPU with the threads there are: the best of those that fit the time."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    torch.mm(a, b)
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def step_line(line: Mapping[str, Any]) -> str:
    """One step in the order people know: step, loss, grad_norm, memory, tps, tflops, mfu."""
    mfu = "n/a" if line["mfu"] is None else f"{line['mfu']:.1%}"
    return (
        f"step {line['step']:>5}  loss {line['loss']:>8.4f}  grad_norm {line['grad_norm']:>8.3f}  "
        f"memory {line['peak_memory_bytes'] / 2**30:>6.2f}GiB  tps {line['tokens_per_second']:>8,.0f}  "
        f"tflops {line['tflops_per_device']:>8.3g}  mfu {mfu}"
    )


def headline(found: Mapping[str, Any]) -> str:
    """Medians of a summary in one line."""
    median, used = found["median"], found["utilization"]
    shares = [f"{name} {'n/a' if used[key] is None else f'{used[key]:.1%}'}"
              for name, key in (("MFU", "mfu"), ("of the achievable", "mfu_of_achievable"))]  # fmt: skip
    return (
        f"{median['tokens_per_second']:,.0f} tokens/s, {median['tflops_per_device']:.3g} TFLOP/s a device, "
        f"{', '.join(shares)}, {median['peak_memory_bytes'] / 2**30:.1f} GiB, goodput {found['goodput']:.0%} of "
        f"{found['wall_seconds']:.0f} s"
    )
