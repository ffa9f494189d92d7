"""Phases add up, collectives are counted once, steps are summed up as they say, and traces open."""

import csv
import gzip
import json
import time
import types

import pytest
import torch

from unlearn_ds import profiler
from unlearn_ds.profiler import Clock, Collectives, Profiler


def line(step, seconds=1.0, **changes):
    return {
        "step": step, "loss": 0.5, "grad_norm": 2.0, "skipped": False, "tokens": 100,
        "tokens_per_second": 100 / seconds, "step_seconds": seconds, "model_flops": 6e12, "hardware_flops": 9e12,
        "tflops_per_device": 6 / seconds, "mfu": None, "peak_memory_bytes": 2**30,
    } | changes  # fmt: skip


def test_a_phase_inside_another_interrupts_it_and_all_add_up():
    clock = Clock()
    with clock.phase("forward"):
        time.sleep(0.02)
        with clock.phase("loss"):
            time.sleep(0.05)
    with clock.phase("forward"):
        time.sleep(0.01)
    seconds, passed = clock.seconds(), time.perf_counter() - clock.began
    assert seconds["forward"] >= 0.03 and seconds["loss"] >= 0.05
    assert sum(seconds.values()) == pytest.approx(passed, abs=0.005)
    assert clock.current == "other"


def test_a_phase_that_fails_is_left():
    clock = Clock()
    with pytest.raises(ValueError), clock.phase("backward"):
        raise ValueError
    assert clock.current == "other"


def test_the_device_is_waited_for_at_both_ends_of_a_phase_and_only_in_detail():
    waited = []
    for detailed in (False, True):
        made = Profiler(detailed=detailed, synchronize=lambda: waited.append(1))
        with made.clock.phase("forward"):
            pass
        assert len(waited) == (2 if detailed else 0)


class Backend:
    """Like DeepSpeed's: a method that calls torch's function, and one that hands back something to wait for."""

    def __init__(self, module):
        self.module, self.waited = module, 0

    def all_reduce(self, tensor, async_op=False):
        return self.module.all_reduce(tensor)

    def all_gather_into_tensor(self, output, part):
        return self

    def wait(self):
        self.waited += 1


def test_collectives_are_counted_once_with_the_bytes_of_the_whole_and_put_back():
    module = types.ModuleType("collectives")
    module.all_reduce = original = lambda tensor: None
    backend, clock = Backend(module), Clock()
    points = [(backend, "all_reduce"), (backend, "all_gather_into_tensor"), (module, "all_reduce")]
    counted = Collectives(clock, points)
    backend.all_reduce(torch.zeros(10), async_op=True)
    module.all_reduce(tensor=torch.zeros(3))
    backend.all_gather_into_tensor(torch.zeros(8), torch.zeros(2))
    assert dict(counted.calls) == {"all_reduce": 2, "all_gather_into_tensor": 1}
    assert dict(counted.bytes) == {"all_reduce": 52, "all_gather_into_tensor": 32}
    assert backend.waited == 1 and clock.seconds()["communication"] > 0
    counted.close()
    assert module.all_reduce is original and "all_reduce" not in vars(backend)
    backend.all_reduce(torch.zeros(10))
    assert counted.calls["all_reduce"] == 2


def test_lists_of_tensors_are_whole():
    assert profiler._num_bytes([torch.zeros(2), (torch.zeros(3),)]) == 20


@pytest.mark.parametrize(("count", "left"), [(1, 1), (2, 1), (5, 3), (6, 3), (40, 37)])
def test_the_first_steps_are_left_out(count, left):
    assert len(profiler.warm(list(range(count)))) == left


def test_the_95th_percentile_is_one_of_the_values():
    assert profiler.percentile_95(range(1, 101)) == 95
    assert profiler.percentile_95([3.0]) == 3.0
    assert profiler.percentile_95([1, 2, 3]) == 3


def filled(detailed=True, device_name="NVIDIA A100-SXM4-80GB"):
    made = Profiler(detailed=detailed, device_name=device_name)
    for step in range(1, 11):
        with made.clock.phase("backward"):
            time.sleep(0.001)
        made.end_step(line(step, seconds=9.0 if step < 4 else 1.0 if step < 10 else 2.0, skipped=step == 5))
    return made


def test_a_summary_has_medians_percentiles_utilization_and_goodput():
    made = filled()
    made.clock.began -= 100.0
    found = made.summary()
    assert (found["steps"], found["first_steps_left_out"]) == (10, 3)
    assert (found["median"]["step_seconds"], found["p95"]["step_seconds"]) == (1.0, 2.0)
    assert 0.001 <= found["median"]["seconds_backward"] < 0.01
    assert found["utilization"]["mfu"] == pytest.approx(6 / 312)
    assert found["utilization"]["hfu_of_achievable"] == pytest.approx(9 / 271.2)
    assert found["productive_seconds"] == 3 * 9.0 + 5 * 1.0 + 2.0  # the skipped step did nothing
    assert found["goodput"] == pytest.approx(34 / 100, rel=0.01)
    assert found["padding_tokens"] == 0
    assert not {"loss", "grad_norm", "step"} & found["median"].keys()


def test_what_is_not_known_is_said_to_be_so_and_never_0():
    found = filled(device_name="abacus").summary()
    assert set(found["utilization"].values()) == {None}
    assert "MFU n/a, of the achievable n/a" in profiler.headline(found)
    assert profiler.step_line(line(1)).endswith("mfu n/a")


def test_a_step_is_told_in_the_order_people_know():
    told = profiler.step_line(line(7, mfu=0.4231))
    names = [word for word in told.split() if word.isalpha() or word == "grad_norm"]
    assert names == ["step", "loss", "grad_norm", "memory", "tps", "tflops", "mfu"]
    assert told.endswith("mfu 42.3%")


def test_files_hold_every_step_and_only_in_detail(tmp_path):
    filled(detailed=False).finish(tmp_path)
    assert not list(tmp_path.iterdir())
    filled().finish(tmp_path)
    rows = list(csv.DictReader((tmp_path / "profile.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    assert {f"seconds_{name}" for name in profiler.PHASES} <= rows[0].keys()
    assert json.loads((tmp_path / "profile.json").read_text())["median"]["tokens"] == 100


@pytest.mark.parametrize("num_steps", [1, 2, 4, 10])
def test_a_trace_holds_the_phases_of_some_steps_however_short_the_run(tmp_path, num_steps):
    made = Profiler(trace=True)
    for step in range(1, num_steps + 1):
        made.begin_step(tmp_path, num_steps)
        with made.clock.phase("backward"):
            torch.ones(4, 4) @ torch.ones(4, 4)
        made.end_step(line(step))
    made.finish(tmp_path)
    with gzip.open(tmp_path / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("backward") == max(1, min(3, num_steps - 3)) and "aten::mm" in names


def test_a_measured_peak_is_one():
    assert 1e8 < profiler.measured_flops(torch.float32, size=128, seconds=0.05) < 1e14
