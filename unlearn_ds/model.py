"""The policy and its tokenizer, and the wrapper whose forward ends in the fused loss inside the LM head's module."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from unlearn_ds import attention, lora, ops
from unlearn_ds.config import UsageError
from unlearn_ds.cost.flops import ModelSize
from unlearn_ds.cost.shapes import Shape
from unlearn_ds.types import PackedBatch, ReferenceRows


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer and refuse one without an end-of-sequence token: an answer must be able to end."""
    with _told(path):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer of {path} has no end-of-sequence token, so no answer could ever end")
    return tokenizer


def load_config(path: str, revision: str | None = None) -> PretrainedConfig:
    """Load the architecture of a saved model without its weights."""
    with _told(path):
        return AutoConfig.from_pretrained(path, revision=revision)


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    """Turn what the hub or a broken folder raises into one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UsageError(f"--model: {path} cannot be loaded: {str(error).splitlines()[0]}") from error


def load_causal_lm(path: str, dtype: torch.dtype, revision: str | None = None) -> PreTrainedModel:
    """Load a causal language model in ``dtype``.

    Under a live ZeRO-3 configuration (engine.py) every rank keeps only its partition. Dropout is switched off: with it
    the KL to the reference would be noise at the first step instead of 0.
    """
    with _told(path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, revision=revision, attn_implementation="eager")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    return model


def content_digest(path: str, revision: str | None = None) -> str:
    """Name of a saved model by the content of its weights and configuration; of a hub id by id and revision."""
    digest = hashlib.sha256()
    files = sorted(f for f in Path(path).glob("*") if f.suffix in (".safetensors", ".bin", ".json", ".jinja"))
    if not files:
        return f"{path}@{revision}"
    for file in files:
        with file.open("rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def size(config: PretrainedConfig) -> ModelSize:
    """Parameters of an architecture by use, counted without allocating any."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    head = whole.get_output_embeddings()
    linear = sum(m.weight.numel() for m in whole.modules() if isinstance(m, (nn.Linear, Conv1D)))
    total = sum(p.numel() for p in whole.parameters())
    text = config.get_text_config()
    return ModelSize(
        linear - head.weight.numel(), head.weight.numel(), total,
        text.num_hidden_layers, text.hidden_size, text.vocab_size,
    )  # fmt: skip


def shape(config: PretrainedConfig) -> Shape:
    """Shape of an architecture, its weights counted without allocating any."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    options = text.to_dict()
    layer, outer = [], []
    for name, parameter in whole.named_parameters():
        found = re.match(r"(.*?\.)(\d+)\.", name)
        if found is None:
            outer.append(parameter.numel())
        elif found.group(2) == "0":
            layer.append((_place(name), parameter.numel()))
    heads = text.num_attention_heads
    inner = options.get("intermediate_size") or options.get("ffn_dim") or options.get("n_inner") or 4 * text.hidden_size
    linear = [m for m in whole.modules() if isinstance(m, nn.Linear) and inner in m.weight.shape]
    in_order = [numel for _, numel in sorted(layer, key=lambda item: item[0])]
    return Shape(
        hidden_size=text.hidden_size, num_layers=text.num_hidden_layers, num_heads=heads,
        num_kv_heads=options.get("num_key_value_heads") or heads,
        head_dim=options.get("head_dim") or text.hidden_size // heads, intermediate_size=inner,
        vocab_size=text.vocab_size, gated=len(linear) > 2 * text.num_hidden_layers,
        tied=bool(text.tie_word_embeddings), outer=tuple(outer), layer=tuple(in_order),
    )  # fmt: skip


def _place(name: str) -> int:
    """Where in a layer a weight is used: norm, attention, norm, MLP. Modules are not registered in that order."""
    if "norm" in name or ".ln_" in name:
        return 0 if any(word in name for word in ("input", "ln_1", "self_attn")) else 2
    return 1 if "attn" in name or "attention" in name else 3


def largest_weight(config: PretrainedConfig) -> int:
    """Elements of the largest weight of an architecture."""
    with torch.device("meta"):
        return max(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


_HARMLESS = {
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "dropout", "position_ids", "is_causal",
    "use_cache", "shared_prompts",
}  # fmt: skip
"""What transformers hands to an attention function besides what changes its result."""


class LossHead(nn.Linear):
    """An LM head that ends in the loss when it is handed a batch.

    The loss runs inside this module's forward so that ZeRO-3's hooks gather the weight, once, for product and gradient.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        batch: PackedBatch | None = None,
        reference: ReferenceRows | None = None,
        options: ops.LossOptions = ops.DEFAULT,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if batch is None:
            return super().forward(hidden)
        if torch.is_grad_enabled():
            if reference is not None and reference.weight_VH is None:
                reference = reference._replace(weight_VH=self.weight)
            return tuple(ops.masked_loss(hidden, self.weight, batch, reference, options))
        return tuple(ops.token_statistics(hidden, self.weight, batch.targets_N, options))


class PackedCausalLM(nn.Module):
    """A Hugging Face causal language model driven by packed batches.

    ``forward(batch, reference)`` returns (loss, loss_N) with gradients enabled and without them the
    ``ops.TokenStatistics`` of the response tokens as a plain tuple; ``forward(batch, hidden_only=True)`` returns the
    final hidden states at the response rows, [N, H].

    reference: states of another model, or the packed KL rows for this one to run with its adapters off. It does so in
    the same forward, so that a step of ZeRO-3 fetches weights in the same order every time and can prefetch them.
    """

    def __init__(self, causal_lm: PreTrainedModel, attention_name: str, loss_options: ops.LossOptions = ops.DEFAULT):
        super().__init__()
        self.causal_lm = causal_lm
        self.attention_name = attention_name
        self._registered = _register(attention_name)
        head = causal_lm.get_output_embeddings()
        if type(head) not in (nn.Linear, LossHead) or head.bias is not None:
            # GPT-J and Phi-2 have a bias there; the fused loss knows one product and its gradient.
            kind = f"{type(head).__name__} with a bias" if isinstance(head, nn.Linear) else type(head).__name__
            raise UsageError(
                f"the LM head of {type(causal_lm).__name__} is no plain linear layer without bias but a {kind}, which "
                "the loss here cannot train"
            )
        _check_layers(causal_lm.config)
        self.loss_options = loss_options._replace(logits=_from_head_to_logits(causal_lm))
        # The class changes, the module does not: parameters, names in the state dict and ZeRO-3's hooks stay.
        head.__class__ = LossHead
        causal_lm.set_attn_implementation(self._registered)
        if causal_lm.config._attn_implementation != self._registered:
            # transformers only warns, and each token would go on to see the sequences before its own.
            raise UsageError(
                f"{type(causal_lm).__name__} lets no other attention in than its own, so it cannot be packed"
            )

    @property
    def config(self):
        """The architecture, where DeepSpeed looks for it."""
        return self.causal_lm.config

    @property
    def device(self) -> torch.device:
        return self.causal_lm.device

    def forward(
        self, batch: PackedBatch, reference: ReferenceRows | PackedBatch | None = None, hidden_only: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if isinstance(reference, PackedBatch):
            with torch.no_grad(), lora.switched_off(self):
                reference = ReferenceRows(self._hidden_rows(reference), None)
        hidden_NH = self._hidden_rows(batch)
        if hidden_only:
            return hidden_NH
        return self.causal_lm.get_output_embeddings()(hidden_NH, batch, reference, self.loss_options)

    def _hidden_rows(self, batch: PackedBatch) -> torch.Tensor:
        hidden_TH = self.causal_lm.base_model(
            input_ids=batch.input_ids_T[None], position_ids=batch.position_ids_T[None], use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens, cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen, max_length_k=batch.max_seqlen, shared_prompts=batch.shared,
        ).last_hidden_state[0]  # fmt: skip
        # The last state of a shared prompt predicts the first token of each of its answers.
        return attention.take(hidden_TH, batch.loss_index_N)

    @contextlib.contextmanager
    def generating(self) -> Iterator[PreTrainedModel]:
        """The Hugging Face model as ``generate`` needs it: padded batches, a cache, no dropout."""
        was_training = self.causal_lm.training
        # A few architectures (Gemma 2) soft-cap their scores, which only the eager implementation does for them.
        self.causal_lm.set_attn_implementation("sdpa" if self.causal_lm._supports_sdpa else "eager")
        self.causal_lm.eval()
        try:
            with torch.no_grad():
                yield self.causal_lm
        finally:
            self.causal_lm.set_attn_implementation(self._registered)
            self.causal_lm.train(was_training)

    def enable_activation_checkpointing(self) -> None:
        """Recompute activations in backward; non-reentrant, as ZeRO-3 needs."""
        self.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class _Hidden(BaseModelOutput):
    """What a decoder hands to the LM head, and None for all that only some architectures ask of it."""

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def _from_head_to_logits(causal_lm: PreTrainedModel) -> ops.LogitMap:
    """What lies between the output of the LM head and the logits.

    Names in configurations do not tell (``logits_scaling`` divides in Granite and multiplies in HyperCLOVA X), so the
    model's own forward is asked, with decoder and head replaced: no weight is touched, sharded or not. Raises
    ``UsageError`` for a model that does anything else to its logits.
    """
    config, head = causal_lm.config.get_text_config(), causal_lm.get_output_embeddings()
    softcap = config.to_dict().get("final_logit_softcapping")
    output_V = torch.linspace(-50.0, 50.0, head.out_features, device=causal_lm.device)
    hidden = _Hidden(last_hidden_state=output_V.new_zeros(1, 1, config.hidden_size))
    replaced = {causal_lm.base_model: hidden, causal_lm.get_decoder(): hidden, head: output_V.view(1, 1, -1)}
    for module, value in replaced.items():
        module.forward = lambda *_, _value=value, **__: _value
    try:
        ids_BL = torch.zeros(1, 1, dtype=torch.long, device=causal_lm.device)
        logits_V = causal_lm(input_ids=ids_BL, use_cache=False).logits.flatten().float()
    finally:
        for module in replaced:
            del module.forward
    scale = 1.0 if softcap else float(logits_V[-1] / output_V[-1])
    expected_V = softcap * torch.tanh(output_V / softcap) if softcap else scale * output_V
    if not torch.allclose(logits_V, expected_V, rtol=1e-5, atol=1e-6):
        raise UsageError(f"{type(causal_lm).__name__} changes its logits in a way that the loss here does not follow")
    return ops.LogitMap(scale, softcap)


def _check_layers(config: PretrainedConfig) -> None:
    """Refuse layers that would carry state from one packed sequence into the next (convolutions, linear attention)."""
    known = {"full_attention", "sliding_attention"}
    other = set(config.get_text_config().to_dict().get("layer_types") or ()) - known
    if other:
        raise UsageError(
            f"{config.model_type} has layers of type {', '.join(sorted(other))}, which cannot be packed; attention "
            "layers, full or sliding, can."
        )


def _register(name: str) -> str:
    """Make one of our packed attentions known to transformers and return the name it goes by there."""
    attend = attention.ATTENTION[name]

    def packed(
        module, query, key, value, attention_mask=None, scaling=None, sliding_window=None, softcap=None, **kwargs
    ):
        asked = [
            name for name, value in kwargs.items() if name not in _HARMLESS and not (value is None or value is False)
        ]
        asked += ["a mask of its own"] * (attention_mask is not None)
        asked += ["tokens that see what follows"] * (vars(module).get("is_causal") is False)
        if asked:
            # Attention sinks, biases and the like change the result: better no training than another model's.
            raise UsageError(f"{type(module).__name__} asks attention for {', '.join(asked)}, which is not supported")
        if "cu_seq_lens_q" not in kwargs:
            raise UsageError(f"{type(module).__name__} is not told where packed sequences end, so it cannot be packed")
        packing = attention.Packing(
            kwargs["cu_seq_lens_q"], kwargs["max_length_q"], scaling, sliding_window, softcap,
            kwargs["shared_prompts"],
        )  # fmt: skip
        out_THD = attend(*(x[0].transpose(0, 1) for x in (query, key, value)), packing)
        return out_THD[None], None

    # transformers reads meaning into "sdpa" or "flash" in a name and refuses architectures by it.
    registered = f"unlearn_ds_{list(attention.ATTENTION).index(name)}"
    ALL_ATTENTION_FUNCTIONS.register(registered, packed)
    return registered
