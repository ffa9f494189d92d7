"""Shared memory, limits and host memory."""

import os
import resource
from pathlib import Path

import pytest

from unlearn_ds import machine
from unlearn_ds.preflight import memory


def test_too_little_shared_memory_fails_and_little_warns(tmp_path):
    there = os.statvfs(tmp_path)
    left = there.f_bavail * there.f_frsize
    assert memory.judged_shared(tmp_path, left // 2, left // 2).status == "ok"
    assert memory.judged_shared(tmp_path, left // 2, left * 2).status == "warn"
    found = memory.judged_shared(tmp_path, left * 2, 0)
    assert found.status == "fail" and "--shm-size" in found.do
    assert memory.judged_shared(tmp_path / "nowhere", 0, 0).status == "fail"


def test_cpu_ranks_need_a_buffer_each(clean, subject, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "judged_shared", lambda folder, needed, wanted: asked.append((needed, wanted)))
    memory.shared_memory(subject(ranks=4))
    clean.delenv("DS_ACCELERATOR")
    clean.setattr(memory, "on_cpu", lambda: False)
    memory.shared_memory(subject(ranks=4))
    assert asked == [(4 * memory.BUFFER, memory.NCCL_SHARED), (0, memory.NCCL_SHARED)]


@pytest.fixture
def limit():
    """Lower a limit of this process for the time being."""
    before = {}

    def lower(which, soft):
        before.setdefault(which, resource.getrlimit(which))
        resource.setrlimit(which, (soft, before[which][1]))

    yield lower
    for which, values in before.items():
        resource.setrlimit(which, values)


def test_few_open_files_are_a_warning_that_grows_with_the_ranks(clean, subject, limit):
    limit(resource.RLIMIT_NOFILE, 2000)
    assert memory.open_files(subject()).status == "ok"
    found = memory.open_files(subject(nodes=[f"n{i}" for i in range(64)], ranks=8))
    assert found.status == "warn" and "2000" in found.seen and "8192 is least" in found.do
    limit(resource.RLIMIT_NOFILE, 512)
    assert memory.open_files(subject()).status == "warn"


def test_locked_memory_matters_where_something_is_pinned(clean, subject, tmp_path, limit):
    limit(resource.RLIMIT_MEMLOCK, 65536)
    assert memory.locked_memory(subject(reference="offload")).status == "skipped"  # a CPU rank pins nothing
    found = memory.locked_memory(subject(reference="nvme", **{"engine.nvme_path": str(tmp_path)}))
    assert found.status == "warn" and "0.1 MiB" in found.seen and "--reference nvme" in found.seen
    clean.setattr(memory, "on_cpu", lambda: False)
    assert memory.locked_memory(subject(reference="offload")).status == "warn"
    assert memory.locked_memory(subject(reference="resident")).status == "skipped"


def test_host_memory_is_what_is_available_within_the_control_group():
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < memory.host_bytes() <= int(lines["MemTotal"].split()[0]) * 1024
    assert 0 < memory.host_bytes(free=True) < memory.host_bytes()


@pytest.mark.parametrize(
    ("cached", "held"), [("inactive_file 300", 700), ("total_inactive_file 200\ninactive_file 1", 800)]
)
def test_a_control_group_holds_what_it_uses_without_cached_files(tmp_path, cached, held):
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\n{cached}\n")
    assert machine._held(tmp_path, "memory.current") == held
