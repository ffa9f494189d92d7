"""GPUs, by an nvidia-smi that answers in the form of a real one."""

import pytest

from unlearn_ds.preflight import gpu

DEVICES = "0, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4\n1, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4\n"
HEALTHY = "".join(f"{n}, 0, No, No, [N/A], Not Active, Not Active, Not Active\n" for n in (0, 1))


@pytest.fixture
def nvidia_smi(tmp_path, clean):
    """Put an nvidia-smi on the path that answers the question for devices and the one for their health."""
    folder = tmp_path / "bin"
    folder.mkdir()
    clean.setenv("PATH", f"{folder}:/usr/bin:/bin")
    clean.delenv("DS_ACCELERATOR")
    (folder / "dmesg").write_text("#!/bin/sh\n")
    (folder / "dmesg").chmod(0o755)

    def answer(devices=DEVICES, health=HEALTHY, before=""):
        (tmp_path / "devices").write_text(devices)
        (tmp_path / "health").write_text(health)
        script = f'case "$*" in *memory.total*) cat {tmp_path}/devices;; *) cat {tmp_path}/health;; esac\n'
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{before}\n{script}")
        (folder / "nvidia-smi").chmod(0o755)
        return folder

    return answer


def test_devices_are_counted_and_told(nvidia_smi, subject):
    nvidia_smi()
    assert gpu.usable(subject(ranks=2)).seen == "2 x NVIDIA H100 80GB HBM3, 80 GiB each, unused"
    facts = gpu.facts(subject())
    assert facts["GPUs"] == "2 x NVIDIA H100 80GB HBM3" and facts["driver"] == "570.86.15"
    assert gpu.devices()[1].memory_bytes == 81559 * 2**20


def test_a_missing_device_and_a_used_one_are_named(nvidia_smi, subject):
    nvidia_smi()
    found = gpu.usable(subject(ranks=4))
    assert found.status == "fail" and "2 GPU(s) for 4 ranks" in found.seen
    nvidia_smi(devices=DEVICES.replace("1, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4", "1, H100, 570, 81559, 40960"))
    found = gpu.usable(subject(ranks=2))
    assert found.status == "warn" and "GPU 1 (40.0 GiB)" in found.seen


@pytest.mark.parametrize(
    ("column", "value", "status", "expected"),
    [
        (1, "3", "fail", "GPU 1: uncorrectable memory errors (3)"),
        (2, "Yes", "fail", "failed row remapping"),
        (6, "Active", "warn", "thermal slowdown"),
        (4, "[N/A]", "ok", "2 device(s)"),
    ],
)
def test_each_sign_of_bad_health_is_named(nvidia_smi, subject, column, value, status, expected):
    first, second = HEALTHY.splitlines()
    cells = second.split(", ")
    cells[column] = value
    nvidia_smi(health=f"{first}\n{', '.join(cells)}\n")
    found = gpu.health(subject())
    assert found.status == status and expected in found.seen


def test_an_xid_in_the_kernel_log_warns(nvidia_smi, subject):
    folder = nvidia_smi()
    (folder / "dmesg").write_text(
        "#!/bin/sh\necho '[1.0] NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus.'\n"
    )
    found = gpu.health(subject())
    assert found.status == "warn" and "79, GPU has fallen off the bus" in found.seen


def test_a_driver_that_fails_and_one_that_hangs_are_failures(nvidia_smi, subject, clean):
    nvidia_smi(before="echo 'NVIDIA-SMI has failed because it could not talk to the driver'; exit 9")
    found = gpu.usable(subject())
    assert found.status == "fail" and "could not talk to the driver" in found.seen
    assert gpu.health(subject()).status == "skipped" and gpu.facts(subject())["GPUs"] == "unknown"
    clean.setattr(gpu, "SECONDS", 0.2)
    nvidia_smi(before="exec sleep 20")
    assert "timed out" in gpu.usable(subject()).seen


def test_a_torch_built_for_cpus_on_a_node_with_gpus_is_a_failure(nvidia_smi, subject, clean):
    nvidia_smi()
    clean.setattr(gpu, "torch_cuda", lambda: None)
    found = gpu.torch_sees(subject(ranks=1))
    assert found.status == "fail" and "built for CPUs" in found.seen


def test_the_cuda_of_torch_is_read_without_importing_it():
    import torch

    assert gpu.torch_cuda() == torch.version.cuda


def test_a_cpu_node_is_fine(clean, subject):
    assert {check(subject()).status for check in (gpu.usable, gpu.health, gpu.torch_sees)} == {"skipped"}
    assert gpu.facts(subject())["GPUs"] == "none"
