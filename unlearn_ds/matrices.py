"""What a model multiplies, read off the model itself, and what a packed batch puts through it."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from unlearn_ds import attention, lora, rectangles
from unlearn_ds.config import LoraConfig
from unlearn_ds.cost.flops import Products, Work
from unlearn_ds.types import PackedBatch


def products(architecture: PretrainedConfig, config: LoraConfig, checkpointing: bool = False) -> Products:
    """Matrix elements of an architecture by what happens to them, with the adapters that ``config`` asks for.

    A model without memory runs two tokens without values: so it is seen, not guessed, which matrices run, which of
    their inputs need a gradient (those of the first layer under LoRA do not) and what a checkpointed layer computes
    again. checkpointing: of activations. Experts that are no linear modules are not counted.
    """
    with torch.device("meta"):
        # A copy: the attention asked for here would become that of the model whose architecture this is.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(architecture), attn_implementation="eager")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if config.rank:
            lora.add(model, config, seed=0)
    if checkpointing:
        model.enable_input_require_grads()  # as transformers does with it
    trace = _Trace(model)
    ids_BL = torch.zeros(1, 2, dtype=torch.long, device="meta")
    with trace.saved:
        # A mask that is whole already: transformers would look at its values to make one.
        mask = torch.zeros(1, 1, 2, 2, device="meta")
        model.train()(input_ids=ids_BL, attention_mask=mask, position_ids=ids_BL, use_cache=False)
    head = model.get_output_embeddings().weight
    body = [seen for seen in trace.linear if seen[1] is not head]
    return Products(
        forward=sum(weight.numel() for _, weight, *_ in body),
        plain=sum(weight.numel() for name, weight, *_ in body if not lora.is_adapter(f"{name}.weight")),
        backward=sum(weight.numel() * (needed + weight.requires_grad) for _, weight, needed in body),
        recomputed=trace.recomputed,
        head=head.numel(),
        head_trained=head.requires_grad,
        attention=_attention_widths(architecture),
        capped_scores=bool(architecture.get_text_config().to_dict().get("attn_logit_softcapping")),
    )


class _Trace:
    """What one forward does: (name, weight, whether its input needs a gradient) of each linear module, in order, and
    matrix elements that layers under checkpointing run again."""

    def __init__(self, model: PreTrainedModel):
        self.linear: list[tuple[str, nn.Parameter, bool]] = []
        self.recomputed = self._num_saved = self._then = 0
        self.saved = torch.autograd.graph.saved_tensors_hooks(self._note_saved, lambda tensor: tensor)
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                module.register_forward_hook(lambda m, args, _, name=name: self._note_linear(name, m, args[0]))
            if isinstance(module, GradientCheckpointingLayer):
                module.register_forward_pre_hook(lambda *_: self._begin_layer())
                module.register_forward_hook(lambda *_: self._end_layer())

    def _note_saved(self, tensor: torch.Tensor) -> torch.Tensor:
        self._num_saved += 1
        return tensor

    def _note_linear(self, name: str, module: nn.Module, x: torch.Tensor) -> None:
        self.linear.append((name, module.weight, x.requires_grad))
        self._then = self._num_saved

    def _begin_layer(self) -> None:
        self._first = len(self.linear)

    def _end_layer(self) -> None:
        run = self.linear[self._first :]
        self.recomputed += sum(weight.numel() for _, weight, _ in run)
        # Recomputation ends with the last tensor that backward needs (torch's early stop), so the last matrix of a
        # layer runs again only where something after it, a norm or dropout, keeps a tensor.
        if self._num_saved == self._then:
            self.recomputed -= run[-1][1].numel()


def _attention_widths(architecture: PretrainedConfig) -> dict[int | None, int]:
    """Sliding window -> width of the queries of all layers that have it."""
    text = architecture.get_text_config()
    options, heads = text.to_dict(), text.num_attention_heads
    width = heads * (options.get("head_dim") or text.hidden_size // heads)
    window = options.get("sliding_window")
    kinds = options.get("layer_types") or ["sliding_attention"] * text.num_hidden_layers
    windows = Counter(window if kind == "sliding_attention" else None for kind in kinds)
    return {window: width * num_layers for window, num_layers in windows.items()}


def work(batch: PackedBatch, multiplied: Products, attention_name: str, device_type: str) -> Work:
    """What ``batch``, on the host, puts through a model that multiplies so; plain numbers: every step counts itself."""
    lengths = batch.cu_seqlens.diff().tolist()
    of_reference = lengths[len(lengths) - len(batch.kl_keys) :]
    needed = {window: attention.needed_pairs(batch, window) for window in multiplied.attention}

    def executed(of: list[int], shapes: list[tuple[int, int]] | None) -> dict[int | None, int]:
        return {
            window: attention.executed_pairs(of, window, shapes, device_type, multiplied.capped_scores)
            for window in multiplied.attention
        }

    def by_implementation(of: list[int], pairs: dict[int | None, int]) -> dict[int | None, int]:
        """FlexAttention alone computes what is needed and no more; only SDPA fills rectangles."""
        if attention_name == "flex":
            return pairs
        if attention_name != "sdpa":
            return executed(of, None)
        return executed(of, rectangles.shapes(of) if device_type == "cpu" else [(len(of), max(of, default=0))])

    reference = None
    if batch.kl_keys:
        # Its sequences end the stream, each with a prompt of its own.
        own = executed(of_reference, None)
        reference = Work(
            batch.num_tokens - batch.first_kl_token, batch.num_kl_rows, own,
            by_implementation(of_reference, own),
        )  # fmt: skip
    num_bounded = 0 if batch.bounded_index is None else batch.bounded_index.numel()
    return Work(
        batch.num_tokens, batch.num_response_tokens, needed, by_implementation(lengths, needed),
        num_bounded, reference,
    )  # fmt: skip
