"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) by ``peft``, put into a Hugging Face model in place.

Model, LM head and names stay what they are: ``layers.0.q_proj`` becomes a peft layer around ``base_layer``. There is no
dropout: with it the KL to the reference would be noise at the first step instead of 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from peft.tuners import lora
from peft.utils.other import transpose
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unlearn_ds.config import LoraConfig, UsageError

NAME = "default"
"""What peft calls an adapter that nobody named."""


def add(causal_lm: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Freeze ``causal_lm`` and put an adapter around each target, in the precision of its weight.

    B starts at 0, so the model computes what it did. A is drawn from ``seed`` on the CPU: the same values on every
    rank, device and ZeRO stage; the weights themselves may be sharded. Raises ``UsageError`` for a target that no
    linear module matches, and for the LM head, which ends in the loss.
    """
    linear = {n for n, m in causal_lm.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    head = next(n for n, m in causal_lm.named_modules() if m is causal_lm.get_output_embeddings())
    last_names = sorted({name.rpartition(".")[2] for name in linear - {head}})
    for target in config.targets:
        matched = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not matched or head in matched:
            raise UsageError(
                f"--lora_targets: '{target}' is no linear module of {type(causal_lm).__name__} that can take an "
                f"adapter; these can: {', '.join(last_names)}."
            )
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets) or "all-linear", lora_dropout=0.0,
        bias="none", task_type=peft.TaskType.CAUSAL_LM,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, causal_lm, NAME)


def layers(model: nn.Module) -> dict[str, lora.Linear]:
    """The modules of ``model`` with an adapter, by name; none without LoRA."""
    return {name: module for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)}


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is the model that the adapters were put into. Not to be left open over a backward."""
    there = layers(model).values()
    for layer in there:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in there:
            layer.enable_adapters(True)


def adapter_parameters(layer: lora.Linear) -> list[nn.Parameter]:
    """A and B of one layer."""
    return [layer.lora_A[NAME].weight, layer.lora_B[NAME].weight]


def merged_weight(layer: lora.Linear) -> torch.Tensor:
    """The weight of a layer with its adapter merged in, rounded once. Needs whole weights.

    Bit for bit what peft makes of the exported adapter, which it loads in fp32 (``PeftModel.merge_and_unload``).
    """
    with torch.no_grad():
        weight_A, weight_B = (parameter.float() for parameter in adapter_parameters(layer))
        delta = transpose(weight_B @ weight_A, layer.fan_in_fan_out) * layer.scaling[NAME]
        weight = layer.get_base_layer().weight
        return (weight.float() + delta).to(weight.dtype)


def is_adapter(name: str) -> bool:
    """True for the name of a parameter that belongs to an adapter and not to the model."""
    return f".lora_A.{NAME}." in name or f".lora_B.{NAME}." in name


def plain_name(name: str) -> str:
    """Name that a parameter of the model had before it got adapters."""
    return name.replace(".base_layer.", ".")


def save(causal_lm: PreTrainedModel, state: dict[str, torch.Tensor], folder: Path, base: str) -> None:
    """Write an adapter as peft reads it: ``PeftModel.from_pretrained(base_model, folder)``.

    state: the adapter's parameters under their names in ``causal_lm``. base: path or hub id of the model it belongs to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = causal_lm.peft_config[NAME]
    settings.base_model_name_or_path = base
    settings.inference_mode = True  # as peft writes it: an adapter is loaded frozen unless asked otherwise
    settings.save_pretrained(folder)
    prefixed = {f"base_model.model.{name.replace(f'.{NAME}.', '.')}": x.contiguous() for name, x in state.items()}
    save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def size(architecture: PretrainedConfig, config: LoraConfig) -> int:
    """Parameters of the adapters that ``add`` would make, counted without allocating any; 0 without LoRA."""
    if not config.rank:
        return 0
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(architecture)
        add(whole, config, seed=0)
    return sum(p.numel() for name, p in whole.named_parameters() if is_adapter(name))
