"""The loss inside the LM head's module under ZeRO-3 on two ranks, with each row kernel, against one process in float64.

What has been wrong elsewhere: a loss that ends inside forward scales the head's gradient by accumulation steps and
outer factors, hangs where ranks have different numbers of rows, or reads an LM head that is not there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from typing import NamedTuple

import pytest
import torch
from loss_cases import plain_logits
from transformers import LlamaConfig, LlamaForCausalLM

from unlearn_ds.data.packing import Placed, pack
from unlearn_ds.types import EncodedRow, PackedBatch, ReferenceRows, Term

pytestmark = [pytest.mark.dist, pytest.mark.slow]
WORLD, VOCAB, WIDTH = 2, 131, 24
TERMS = [Term("forget", "forget", "ce", -1.0), Term("retain", "retain", "kl", 1.0)]


class Situation(NamedTuple):
    """counts: (cross-entropy rows, KL rows) of each micro-batch of each rank. outer: what the loss is multiplied by."""

    counts: tuple[tuple[tuple[int, int], ...], ...]
    tied: bool = False
    frozen_head: bool = False
    outer: float = 1.0


SITUATIONS = {
    "one_micro_batch": Situation((((2, 1),), ((2, 1),))),
    "accumulation": Situation((((2, 1), (1, 1), (1, 2)), ((1, 1), (2, 1), (1, 1)))),
    "ragged": Situation((((4, 1),), ((1, 3),))),
    "no_kl_on_one_rank": Situation((((2, 2),), ((2, 0),))),
    "nothing_on_one_rank": Situation((((2, 2), (2, 1)), ((0, 0), (1, 1)))),
    "tied": Situation((((2, 1), (1, 1)), ((1, 2), (2, 1))), tied=True),
    "negative_outer": Situation((((2, 1), (1, 1)), ((1, 2), (2, 1))), outer=-0.5),
    "frozen_head": Situation((((2, 1),), ((1, 2),)), frozen_head=True),
}


# Interpreted, Triton's kernel goes through those that differ in what reaches a kernel.
KERNELS = [(name, "torch") for name in SITUATIONS] + [
    (name, "triton") for name in ("accumulation", "nothing_on_one_rank", "negative_outer", "frozen_head")
]


def make_model(situation: Situation) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=situation.tied, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def make_batch(situation: Situation, rank: int, part: int) -> PackedBatch:
    draw = torch.Generator().manual_seed(100 * rank + part)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCAB, (count,), generator=draw).tolist())

    num_ce, num_kl = situation.counts[rank][part]
    rows = [EncodedRow(ids(3 + n), ids(2 + n + rank)) for n in range(max(1, num_ce + num_kl))]
    batch = pack([Placed(row, int(n >= num_ce), (-0.3, 0.7)[n >= num_ce]) for n, row in enumerate(rows)], TERMS)
    return batch if num_ce + num_kl else without_rows(batch)


def without_rows(batch: PackedBatch) -> PackedBatch:
    """The stream with none of its rows in the loss: the forward runs, nothing reaches the LM head."""
    none = {name: getattr(batch, name)[:0] for name in ("loss_index_N", "targets_N", "coefficients_N", "sequence_N")}
    return dataclasses.replace(batch, **none, num_kl_rows=0, kl_keys=[])


def make_reference(batch: PackedBatch) -> ReferenceRows | None:
    if not batch.num_kl_rows:
        return None
    draw = torch.Generator().manual_seed(7)
    weight = torch.randn(VOCAB, WIDTH, generator=draw)
    return ReferenceRows(torch.randn(batch.num_kl_rows, WIDTH, generator=draw), weight)


def worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    torch.set_num_threads(1)
    from deepspeed.utils import safe_get_full_grad

    from unlearn_ds import dist, ds_json, engine, ops
    from unlearn_ds.arguments import parse
    from unlearn_ds.model import PackedCausalLM

    engine.start(parse({}).engine)
    values = ds_json.load("zero3_fp32")
    # Without this DeepSpeed keeps weights as small as these on every rank.
    values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    found = {}
    for name, kernel in KERNELS:
        situation = SITUATIONS[name]
        steps = len(situation.counts[0])
        config = parse({"gradient_accumulation_steps": steps, "learning_rate": 1e-3, "max_steps": 1})
        options = ops.LossOptions(kernel=kernel, workspace_bytes=4 * 4 * VOCAB * 8)
        model = PackedCausalLM(make_model(situation), "sdpa", options)
        model.causal_lm.get_output_embeddings().weight.requires_grad_(not situation.frozen_head)
        policy = engine.Policy(model, values, config.optim)
        for part in range(steps):
            batch = make_batch(situation, rank, part)
            policy.backward(policy.loss(batch, make_reference(batch)).loss * situation.outer)
            if part < steps - 1:
                policy.step()
        gradients = {n: safe_get_full_grad(p) for n, p in model.causal_lm.named_parameters() if p.requires_grad}
        found[f"{name} {kernel}"] = {n: g.tolist() for n, g in gradients.items()}
        policy.close()
    if dist.is_main():
        with open(f"{folder}/found.json", "w") as file:
            json.dump(found, file)
    dist.shutdown()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loss")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(folder)), nprocs=WORLD)
    return json.loads((folder / "found.json").read_text())


def plain_gradients(situation: Situation) -> dict[str, torch.Tensor]:
    """Every sequence of every rank on its own, all logits, float64; the mean over ranks, as DeepSpeed takes it."""
    model = make_model(situation).double()
    model.get_output_embeddings().weight.requires_grad_(not situation.frozen_head)
    total = torch.zeros((), dtype=torch.float64)
    for rank, parts in enumerate(situation.counts):
        for part in range(len(parts)):
            batch = make_batch(situation, rank, part)
            reference, first_kl = make_reference(batch), batch.num_response_tokens - batch.num_kl_rows
            ends, hidden = batch.cu_seqlens.tolist(), []
            for start, stop in zip(ends, ends[1:], strict=False):
                hidden.append(model.model(input_ids=batch.input_ids_T[None, start:stop]).last_hidden_state[0])
            rows = torch.cat(hidden)[batch.loss_index_N]
            logp = torch.log_softmax(plain_logits(rows, model.lm_head.weight, None, 1.0), 1)
            loss_N = -logp[:first_kl].gather(1, batch.targets_N[:first_kl, None]).squeeze(1)
            if reference is not None:
                logq = torch.log_softmax(reference.hidden_NH.double() @ reference.weight_VH.double().t(), 1)
                loss_N = torch.cat([loss_N, (logq.exp() * (logq - logp[first_kl:])).sum(1)])
            total = total + (loss_N * batch.coefficients_N.double()).sum() / WORLD
    (total * situation.outer).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_gradients_on_two_ranks_equal_one_process_in_float64(found, name, kernel):
    expected, actual = plain_gradients(SITUATIONS[name]), found[f"{name} {kernel}"]
    assert actual.keys() == expected.keys() and expected
    for key, gradient in expected.items():
        difference = (torch.tensor(actual[key], dtype=torch.float64) - gradient).norm()
        assert difference <= 2e-6 * gradient.norm(), f"{key}: {difference / gradient.norm():.1e}"
