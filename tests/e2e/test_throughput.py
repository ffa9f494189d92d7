"""``launchers/throughput.py`` on two ranks: what it measures, projects and writes, with every phase of a step timed."""

from __future__ import annotations

import csv
import gzip
import json

import pytest
from harness import finish, start, write_data

from unlearn_ds.cost import ratio, rlhf

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def measured(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("throughput")
    forget, retain = write_data(folder)
    process = start(
        folder / "cache", "--scenario", "hallucination", "--model", tiny_model_dir, "--forget_data", forget,
        "--retain_data", retain, "--output_dir", folder / "out", "--steps", 5, "--max_steps", 50, "--batch_size", 3,
        "--gradient_accumulation_steps", 2, "--against", "three_stages", "--profile", "--trace",
        "--log.progress", "false", ranks=2, launcher="throughput.py",
    )  # fmt: skip
    result = finish(process)
    assert result.returncode == 0, result.stdout
    return result.stdout, folder / "out"


@pytest.mark.slow
@pytest.mark.dist
def test_the_whole_run_is_projected_from_the_measured_steps(measured):
    found = json.loads((measured[1] / "throughput.json").read_text())
    one = found["measured"]
    assert (one["ranks"], one["steps_taken"], one["steps_counted"]) == (2, 5, 3)
    assert one["forget_samples_a_step"] == 3 * 2 * 2 and found["forget_samples"] == 600
    assert found["flops"] == 50 * one["hardware_flops_a_step"] > 50 * one["model_flops_a_step"]
    assert found["device_hours"] == pytest.approx(2 * 50 * one["seconds_a_step"] / 3600)
    assert found["rlhf"].keys() == rlhf.DENOMINATORS.keys()
    stages = found["rlhf"]["three_stages"]
    assert stages["flops_ratio"] == pytest.approx(found["flops"] / stages["flops"])
    assert stages["hours_ratio"] is None  # RLHF is modelled on GPUs
    at_limit = found["samples_at_limit"]["three_stages"]
    assert at_limit / 600 * stages["flops_ratio"] == pytest.approx(ratio.LIMIT)
    assert (measured[1] / "throughput.png").read_bytes().startswith(PNG)


@pytest.mark.slow
@pytest.mark.dist
def test_the_table_fits_a_terminal_and_names_every_assumption(measured):
    lines = [line for line in measured[0].splitlines() if line.startswith("|")]
    assert len(lines) > 12 and max(map(len, lines)) <= 80
    assert any("three_stages *" in line for line in lines) and any("n/a, no peak" in line for line in lines)
    assert all(f"- {assumption}" in measured[0] for assumption in ratio.RLHF_ASSUMPTIONS)


@pytest.mark.slow
@pytest.mark.dist
def test_phases_add_up_to_the_step_and_collectives_are_counted(measured):
    rows = list(csv.DictReader((measured[1] / "profile.csv").open()))
    assert len(rows) == 5
    for row in rows[1:]:
        inside = [float(row[f"seconds_{name}"]) for name in
                  ("data", "forward", "loss", "reference", "backward", "optimizer", "communication")]  # fmt: skip
        assert min(inside) > 0
        assert sum(inside) == pytest.approx(float(row["step_seconds"]), rel=0.1)
        assert int(row["collective_calls"]) > 0 and int(row["collective_bytes"]) > 0
    found = json.loads((measured[1] / "profile.json").read_text())
    assert {"all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"} <= found["collectives"].keys()
    assert found["peak_flops"]["source"] == "measured here" and found["utilization"]["mfu"] is None
    assert 0 < found["utilization"]["mfu_of_achievable"] < found["utilization"]["hfu_of_achievable"] < 1
    assert 0 < found["goodput"] < 1


@pytest.mark.slow
@pytest.mark.dist
def test_the_trace_holds_the_phases_by_name(measured):
    with gzip.open(measured[1] / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"forward", "backward", "optimizer", "communication"} <= names


@pytest.mark.parametrize(("flags", "told"), [
    (["--table"], "Llama-2-70B"), (["--calibration"], "OPT-175B on 64, effective TFLOP/s from its hours"),
    (["--help"], "--against NAME"),
])  # fmt: skip
def test_tables_need_no_model(tmp_path, flags, told):
    result = finish(start(tmp_path, *flags, launcher="throughput.py"))
    assert result.returncode == 0 and told in result.stdout


@pytest.mark.parametrize(("flags", "told"), [
    (["--against", "dpo"], "--against must be one of step3"), (["--steps", "0"], "--steps takes a whole number"),
    (["--device", "abacus"], "--device must be one of A100-40G"), (["--batch", "3"], "unknown flag '--batch'"),
])  # fmt: skip
def test_a_mistake_is_told_before_anything_is_loaded(tmp_path, flags, told):
    result = finish(start(tmp_path, *flags, launcher="throughput.py"))
    assert result.returncode == 2 and told in result.stdout
