"""A lock of a build that was killed is told from one of a build that lives."""

import os
import subprocess
import sys
import time

import pytest

from unlearn_ds.preflight import locks

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path):
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path / "cpu_adam" / "lock"


def test_a_lock_that_torch_holds_is_held_and_stale_once_its_process_was_killed(tmp_path, lock):
    """The real lock of torch: should it no longer keep its file open, this says so."""
    code = HOLD.replace("from torch.utils.file_baton", f"sys.path.insert(0, {_folder_of_baton()!r})\nfrom file_baton")
    holder = subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        os.utime(lock, (1, 1))  # however old it is
        os.utime(lock.parent, (1, 1))
        assert locks.state_of(lock, patience=0) == "held"
        assert locks.judged(tmp_path).status == "ok" and "cpu_adam" in locks.judged(tmp_path).seen
    finally:
        holder.kill()
        holder.wait()
    assert locks.state_of(lock) == "stale"


def _folder_of_baton():
    """Where torch keeps its lock, without importing torch in another process for it."""
    import importlib.util

    return os.path.join(os.path.dirname(importlib.util.find_spec("torch").origin), "utils")


def test_a_stale_lock_is_a_failure_with_its_path_its_age_and_the_command(tmp_path, lock):
    lock.touch()
    os.utime(lock, (time.time() - 3 * 3600,) * 2)
    found = locks.judged(tmp_path)
    assert found.status == "fail" and f"{lock} (3 h old)" in found.seen and found.do == f"rm {lock}"
    lock.unlink()
    assert locks.judged(tmp_path).status == "ok"


def test_locks_below_a_folder_of_one_torch_version_are_found(tmp_path):
    lock = tmp_path / "py311_cu128" / "async_io" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert str(lock) in locks.judged(tmp_path).seen


@pytest.mark.parametrize(("patience", "state"), [(900.0, "unknown"), (0.0, "stale")])
def test_where_the_owner_cannot_be_looked_up_the_newest_file_decides(lock, monkeypatch, patience, state):
    """As on a disk that another node builds on."""
    monkeypatch.setattr(locks, "_file_system", lambda path: "nfs4")
    lock.touch()
    os.utime(lock, (1, 1))  # made long ago, and the build still writes beside it
    (lock.parent / "cpu_adam.o").touch()
    os.utime(lock.parent / "cpu_adam.o", (time.time() - 1,) * 2)
    assert locks.state_of(lock, patience) == state
    if state == "unknown":
        assert locks.judged(lock.parent.parent).status == "warn"


@pytest.mark.parametrize(
    ("kind", "namespace", "seen"),
    [("ext4", "pid:[4026531836]", True), ("nfs4", "pid:[4026531836]", False), ("fuse.sshfs", "pid:[4026531836]", False),
     ("ext4", "pid:[4026532000]", False), ("overlay", "pid:[4026532000]", True)],
)  # fmt: skip
def test_who_can_hold_a_lock_unseen(lock, monkeypatch, kind, namespace, seen):
    """Other machines on a shared disk; other containers where a folder of the host is mounted into this one."""
    lock.touch()
    monkeypatch.setattr(locks, "_file_system", lambda path: kind)
    monkeypatch.setattr(os, "readlink", lambda path: namespace)
    assert locks._sees_owner(lock, os.geteuid()) is seen


def test_the_kind_of_a_file_system_is_that_of_the_deepest_mount():
    assert locks._file_system(locks.Path("/proc/self/stat")) == "proc"


def test_the_folder_of_compiled_ops_is_that_of_the_environment(clean, subject, tmp_path):
    assert locks.stale(subject()).status == "ok"
    (tmp_path / "TORCH_EXTENSIONS_DIR" / "cpu_adam").mkdir()
    (tmp_path / "TORCH_EXTENSIONS_DIR" / "cpu_adam" / "lock").touch()
    assert locks.stale(subject()).status == "fail"


def test_ninja_and_a_compiler_are_asked_for_where_an_op_is_built(clean, subject, tmp_path):
    (tmp_path / "bin").mkdir()
    clean.setenv("PATH", str(tmp_path / "bin"))
    clean.delenv("CXX", raising=False)
    assert "ninja" in locks.compiler(subject()).seen
    for name in ("ninja", "c++"):
        found = locks.compiler(subject())
        assert found.status == "fail" and name in found.seen
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    assert "will be built" in locks.compiler(subject()).seen
    built = tmp_path / "TORCH_EXTENSIONS_DIR" / "deepspeed_shm_comm"
    built.mkdir()
    (built / "deepspeed_shm_comm.so").touch()
    (tmp_path / "bin" / "c++").unlink()
    assert locks.compiler(subject()).seen == "built: deepspeed_shm_comm"
