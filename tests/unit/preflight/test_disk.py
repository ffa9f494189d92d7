"""What a run writes where, on disks that are really full where this user may mount one."""

import os
import subprocess

import pytest

from unlearn_ds.preflight import disk
from unlearn_ds.preflight.disk import Need
from unlearn_ds.preflight.files import EMBEDDED_PARAMETERS

MIB = 2**20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB and 64 inodes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=64", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_without_room_is_a_failure_that_names_it(small_disk, subject, clean):
    found = disk.free(subject(output_dir=str(small_disk / "run")))
    assert found.status == "fail" and f"1.0 MiB free at {small_disk}" in found.seen and "free" in found.do


def test_a_disk_without_inodes_is_a_failure(small_disk, subject, clean):
    found = disk.inodes(subject(output_dir=str(small_disk / "run")))
    assert found.status == "fail" and str(small_disk) in found.seen


def test_what_a_run_may_write_warns_and_what_it_will_write_fails(tmp_path):
    there = os.statvfs(tmp_path)
    left = there.f_bavail * there.f_frsize
    cases = {(left // 2, True): "ok", (left * 2, True): "fail", (left * 2, False): "warn"}
    cases[left * 99 // 100, True] = "warn"  # it fits, and hardly so
    for (num_bytes, certain), status in cases.items():
        assert disk.judged([Need(tmp_path, num_bytes, "it", certain)]).status == status, (num_bytes, certain)


def test_needs_of_one_disk_add_up(tmp_path):
    there = os.statvfs(tmp_path)
    half = there.f_bavail * there.f_frsize * 6 // 10
    assert disk.judged([Need(tmp_path, half, "a")]).status == "ok"
    assert disk.judged([Need(tmp_path, half, "a"), Need(tmp_path / "not" / "there", half, "b")]).status == "fail"


def test_what_an_earlier_run_gives_back_counts_as_free(tmp_path, clean, subject):
    there = os.statvfs(tmp_path)
    left = there.f_bavail * there.f_frsize
    assert disk.judged([Need(tmp_path, left, "it")], given_back=left).status == "ok"
    (tmp_path / "out" / "checkpoints" / "step-000002").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "step-000002" / "states.pt").write_bytes(b"0" * 5000)
    assert disk._given_back(subject(overwrite="true")) == 5000
    assert disk._given_back(subject()) == 0


def test_checkpoints_are_counted_in_bytes_a_parameter(clean, subject, tmp_path):
    def written(what, **flags):
        return {need.what: need for need in disk.needs(subject(**flags))}.get(what)

    assert written("3 checkpoints", save_every="10").num_bytes == 3 * 12 * EMBEDDED_PARAMETERS
    fp32 = written("3 checkpoints", save_every="10", ds_config="zero3_fp32")
    assert fp32.num_bytes == 3 * 12 * EMBEDDED_PARAMETERS and fp32.certain
    on_signal = written("two checkpoints, if signals stop the run")
    assert on_signal.num_bytes == 2 * 12 * EMBEDDED_PARAMETERS and not on_signal.certain
    assert written("the best state", stop="patience:2", eval_every="5").num_bytes == 12 * EMBEDDED_PARAMETERS
    assert written("the exported model").num_bytes == 2 * EMBEDDED_PARAMETERS
    assert written("the exported model", lora_rank="8", lora_export="separate") is None
    assert written("3 checkpoints", save_every="10", lora_rank="8") is None  # adapters only
    assert written("the memorized model").folder == tmp_path / "UNLEARN_DS_CACHE"
    assert written("a model of unknown size from the hub", model="org/name") is not None


@pytest.mark.parametrize("kind", ["file", "closed"])
def test_an_output_folder_that_cannot_be_made_is_a_failure(tmp_path, subject, monkeypatch, kind):
    place = tmp_path / "place"
    if kind == "file":
        place.touch()
    else:
        place.mkdir(mode=0o555)
        # The superuser may write everywhere; what os.access says of others is theirs to test.
        monkeypatch.setattr(os, "access", lambda path, mode: path != place)
    found = disk.writable(subject(output_dir=str(place / "run")))
    assert found.status == "fail" and str(place) in found.seen
    assert disk.writable(subject()).status == "ok"


def test_tokens_show_who_sees_one_folder_and_leave_nothing(tmp_path, subject):
    nodes = ("a", "b")
    first = disk.Token(subject(nodes=nodes, index=0), "x")
    second = disk.Token(subject(nodes=nodes, index=1), "x")
    assert first.seen(range(3)) == [0, 1]
    second.close()
    assert first.seen(range(3)) == [0]
    first.close()
    assert not list(tmp_path.glob(".doctor*"))


def test_a_model_that_has_to_be_fetched_needs_room_in_the_hubs_cache(subject, clean):
    wanted = {need.what: need.num_bytes for need in disk.needs(subject(preset="llama2-7b-full"))}
    assert wanted["the model from the hub"] == pytest.approx(2 * 6.738e9, rel=1e-3)
    assert wanted["the exported model"] == wanted["the model from the hub"]
