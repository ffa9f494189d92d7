"""Counted FLOPs against the counters of torch and DeepSpeed, which watch every operation of a real step."""

import itertools

import pytest
import torch
from architectures import CONFIGS, VOCABULARY, make_rows
from deepspeed.profiling.flops_profiler import FlopsProfiler
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from unlearn_ds import lora, matrices
from unlearn_ds.config import LoraConfig
from unlearn_ds.cost import flops
from unlearn_ds.data.packing import Placed, kl_part, pack
from unlearn_ds.model import PackedCausalLM
from unlearn_ds.types import EncodedRow, ReferenceRows, Term

TERMS = [Term("forget", "forget", "ce", -1.0, bound=1e3), Term("mismatch", "mismatch", "ce", 1.0),
         Term("retain", "retain", "kl", 1.0)]  # fmt: skip
NAMES = ("llama", "opt", "gpt_neox", "qwen2", "gemma", "mistral")
SPECIAL = ("opt_350m", "gemma2", "gemma3", "mistral_window", "gpt2")
"""Projections beside the layers, norms after them, windows, and weights stored the other way round."""


def make_batch(share=True):
    """Two answers to each prompt, bounded ones among them, and rows of the reference: uneven lengths."""
    placed = []
    for row, other in zip(make_rows(0), make_rows(1), strict=True):
        placed += [Placed(row, 0, -1.0), Placed(EncodedRow(row.prompt_ids, other.answer_ids), 1, 1.0)]
    return pack(placed + [Placed(row, 2, 1.0) for row in make_rows(2)], TERMS, share)


def counted(name, batch, checkpointing=False, reference="resident", rank=0, layers=2):
    """(our FLOPs, torch's) of one step of a tiny model: reference, forward, loss and backward."""
    architecture = CONFIGS[name]()
    architecture.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(architecture, attn_implementation="eager")
    config = LoraConfig(rank=rank, alpha=2.0 * rank) if rank else LoraConfig()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    packed = PackedCausalLM(model, "sdpa").train()
    if rank:
        lora.add(model, config, seed=0)
    if checkpointing:
        packed.enable_activation_checkpointing()
    states = packed(kl_part(batch), hidden_only=True).detach()
    weight = None if rank else model.get_output_embeddings().weight.detach().clone()
    shape = matrices.products(architecture, config, checkpointing)
    ours = flops.count(
        shape, matrices.work(batch, shape, "sdpa", "cpu"), checkpointing=checkpointing, reference=reference
    )
    with FlopCounterMode(display=False) as counter:
        if reference == "resident":
            with torch.no_grad():
                states = packed(kl_part(batch), hidden_only=True)
        rows = kl_part(batch) if reference == "adapter" else ReferenceRows(states, weight)
        packed(batch, rows)[0].backward()
    return ours, counter.get_total_flops()


@pytest.mark.parametrize(("name", "checkpointing"), [*itertools.product(NAMES, (False, True)),
                                                     *((name, True) for name in SPECIAL)])  # fmt: skip
def test_hardware_flops_are_what_torch_counts(name, checkpointing):
    ours, torchs = counted(name, make_batch(), checkpointing)
    assert ours.hardware == pytest.approx(torchs, rel=0.02)
    assert ours.model < ours.hardware


@pytest.mark.parametrize(("reference", "share"), [("resident", False), ("cached", True)])
def test_every_reference_and_stream_is_counted(reference, share):
    ours, torchs = counted("llama", make_batch(share), reference=reference)
    assert ours.hardware == pytest.approx(torchs, rel=0.02)


@pytest.mark.parametrize(("name", "checkpointing"), [("llama", False), ("llama", True), ("opt", True)])
def test_lora_is_counted(name, checkpointing):
    ours, torchs = counted(name, make_batch(), checkpointing, "adapter", rank=4)
    assert ours.hardware == pytest.approx(torchs, rel=0.02)


def test_a_model_whose_shape_is_asked_keeps_its_attention():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), attn_implementation="sdpa")
    matrices.products(model.config, LoraConfig())
    assert model.config._attn_implementation == "sdpa"


def test_a_shared_prompt_is_counted_once_and_the_loss_on_response_tokens_alone():
    architecture = CONFIGS["llama"]()
    shape = matrices.products(architecture, LoraConfig())
    prompt, answers = tuple(range(3, 13)), [tuple(range(3, 8)), tuple(range(3, 7))]
    batch = pack([Placed(EncodedRow(prompt, a), i, 1.0) for i, a in enumerate(answers)], TERMS[:2], share_prompts=True)
    work = matrices.work(batch, shape, "flex", "cuda")
    assert (work.num_tokens, work.num_response_tokens) == (10 + 5 + 4, 9)
    prompt_pairs, answer_pairs = 10 * 11 // 2, [10 * n + n * (n + 1) // 2 for n in (5, 4)]
    assert work.pairs == work.executed == {None: prompt_pairs + sum(answer_pairs)}
    body = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48
    found = flops.count(shape, work, checkpointing=False, reference=None)
    assert found.model == 6 * (2 * body * 19 + 32 * VOCABULARY * 9) + 12 * 2 * 32 * work.pairs[None]
    assert found.hardware - found.model == found.bound == 2 * 32 * VOCABULARY * 5


@pytest.mark.parametrize(("name", "device", "expected"), [
    ("flash", "cuda", [10, 55]), ("varlen", "cuda", [10, 55]), ("sdpa", "cuda", [55, 55]), ("sdpa", "cpu", [100, 100]),
])  # fmt: skip
def test_each_attention_executes_what_it_does(name, device, expected):
    rows = [EncodedRow((3,) * 2, (4,) * 2), EncodedRow((3,) * 5, (4,) * 5)]
    batch = pack([Placed(row, 0, 1.0) for row in rows], TERMS)
    shape = matrices.products(CONFIGS["llama"](), LoraConfig())
    assert matrices.work(batch, shape, name, device).executed == {None: sum(expected)}


def test_capped_scores_fill_the_rectangle_on_every_device():
    shape = matrices.products(CONFIGS["gemma2"](), LoraConfig())
    assert shape.capped_scores and not matrices.products(CONFIGS["gemma"](), LoraConfig()).capped_scores
    batch = pack(
        [Placed(EncodedRow((3,) * 2, (4,) * 2), 0, 1.0), Placed(EncodedRow((3,) * 5, (4,) * 5), 0, 1.0)], TERMS
    )
    assert set(matrices.work(batch, shape, "sdpa", "cuda").executed.values()) == {200}


def test_the_reference_fills_a_rectangle_of_its_own():
    long, short = EncodedRow((3,) * 5, (4,) * 5), EncodedRow((3,) * 2, (4,) * 2)
    batch = pack([Placed(long, 0, -1.0), Placed(short, 2, 1.0), Placed(short, 2, 1.0)], TERMS)
    assert kl_part(batch).max_seqlen == kl_part(kl_part(batch)).max_seqlen == 4
    work = matrices.work(batch, matrices.products(CONFIGS["llama"](), LoraConfig()), "sdpa", "cpu")
    assert work.reference.executed == {None: 2 * 4 * 4} and work.executed == {None: 3 * 10 * 10}


def test_a_window_limits_the_pairs():
    shape = matrices.products(CONFIGS["gemma3"](), LoraConfig())
    assert shape.attention == {4: 32, None: 32}
    batch = pack([Placed(EncodedRow((3,) * 5, (4,) * 5), 0, 1.0)], TERMS)
    work = matrices.work(batch, shape, "flash", "cuda")
    assert work.pairs == work.executed == {4: 1 + 2 + 3 + 4 * 7, None: 55}


@pytest.mark.parametrize("name", NAMES)
def test_deepspeeds_profiler_counts_the_same_forward(name):
    """Its counter knows no backward; it sees the plain model, whose head runs on every token."""
    architecture = CONFIGS[name]()
    model = AutoModelForCausalLM.from_config(architecture, attn_implementation="eager").eval()
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    with torch.no_grad():
        model(input_ids=torch.randint(3, VOCABULARY, (3, 17)), use_cache=False)
    profiler.stop_profile()
    shape = matrices.products(architecture, LoraConfig())
    ours = (shape.forward + shape.head) * 3 * 17 + 2 * sum(shape.attention.values()) * 3 * 17**2
    assert ours == pytest.approx(profiler.get_total_macs(), rel=0.02)
    profiler.end_profile()
