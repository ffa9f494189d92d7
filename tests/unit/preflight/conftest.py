import pytest

from unlearn_ds import arguments
from unlearn_ds.preflight.findings import Subject


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """An environment in which nothing of this machine decides: its own caches, home and scratch folder, CPU ranks."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                 "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "GLOO_SOCKET_IFNAME",
                 "NCCL_SOCKET_IFNAME", "DS_ENV_FILE", "UNLEARN_DS_FORWARDED", "GPUS_PER_NODE"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    for name in ("TORCH_EXTENSIONS_DIR", "UNLEARN_DS_CACHE", "XDG_CACHE_HOME", "TMPDIR", "HOME"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    return monkeypatch


@pytest.fixture
def subject(tmp_path):
    """Make the subject of a run with these flags."""

    def make(nodes=(), index=0, ranks=1, master=None, port=None, **flags):
        config = arguments.parse({"output_dir": str(tmp_path / "out"), **flags})
        return Subject(config, tuple(nodes), index, ranks, master, port)

    return make
