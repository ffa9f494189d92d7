"""A measured run beside RLHF, and the tables that the README shows."""

import pytest

from unlearn_ds import drawing, projection
from unlearn_ds.cost import devices, ratio, rlhf

ACTOR = rlhf.ACTORS["Llama-2-7B"]
MEASURED = {
    "device": "NVIDIA A100-SXM4-80GB", "ranks": 4, "seconds_a_step": 9.0, "hardware_flops_a_step": 1e15,
    "forget_samples_a_step": 32,
}  # fmt: skip


def test_the_whole_run_is_steps_times_a_step_and_hours_are_compared_on_the_same_device():
    found = projection.project(MEASURED, ACTOR, 200, "step3", rlhf.Cluster("A100-80G", 8))
    assert (found["flops"], found["device_hours"], found["forget_samples"]) == (2e17, 2.0, 6400)
    entry = found["rlhf"]["step3"]
    assert entry["flops_ratio"] == 2e17 / entry["flops"] and entry["hours_ratio"] == 2.0 / entry["hours"]
    assert found["samples_at_limit"]["step3"] * 1e15 / 32 == pytest.approx(ratio.LIMIT * entry["flops"])


def test_hours_of_different_devices_are_not_compared_and_that_is_said():
    found = projection.project(MEASURED, ACTOR, 200, "step3", rlhf.Cluster("H100", 8))
    assert all(entry["hours_ratio"] is None for entry in found["rlhf"].values())
    assert "not for the NVIDIA A100-SXM4-80GB that was measured" in found["assumptions"][-1]


@pytest.mark.parametrize(("name", "memory", "achievable"), [
    ("NVIDIA A100-SXM4-80GB", "A100-80G", 271.2e12), ("NVIDIA A100-SXM4-40GB", "A100-40G", 271.2e12),
    ("NVIDIA H100 80GB HBM3", "H100", 794.5e12), ("NVIDIA H100 PCIe", None, None), ("NVIDIA H200", "H200", 794.5e12),
    ("cpu", None, None), ("NVIDIA L40S", None, None),
])  # fmt: skip
def test_a_device_is_known_by_its_name_or_not_at_all(name, memory, achievable):
    assert devices.memory_name(name) == memory
    assert devices.achievable_flops(name) == achievable


@pytest.mark.parametrize(("value", "text"), [
    (0.27, "27 %"), (0.0012345, "0.123 %"), (5.9e-6, "0.00059 %"), (12.5, "1,250 %"), (0.4994, "49.9 %"),
    (1.0, "100 %"),
])  # fmt: skip
def test_a_ratio_has_three_digits_however_small(value, text):
    assert drawing.ratio_percent(value) == text


def test_the_tables_of_the_readme_are_what_the_command_prints(capsys, repository):
    projection.print_table("A100-80G")
    rows = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 12 + 4
    readme = (repository / "README.md").read_text(encoding="utf-8")
    assert [row for row in rows if row not in readme] == []
