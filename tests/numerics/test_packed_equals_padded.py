"""One packed forward through the wrapper against three padded Hugging Face forwards with full logits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from unlearn_ds.config import ObjectiveConfig
from unlearn_ds.data.loader import Layout, Loader, TrainingRows
from unlearn_ds.data.packing import pack_scored
from unlearn_ds.model import PackedCausalLM, load_causal_lm
from unlearn_ds.objectives import ga_mismatch
from unlearn_ds.ops import LossOptions
from unlearn_ds.reference import LiveReference
from unlearn_ds.types import EncodedRow

WEIGHTS = ObjectiveConfig(eps_forget=0.5, eps_mismatch=1.0, eps_retain=0.7, num_mismatch=2)
VOCABULARY = 512


def make_rows() -> TrainingRows:
    draw = torch.Generator().manual_seed(0)

    def ids(longest: int) -> tuple[int, ...]:
        count = int(torch.randint(1, longest + 1, (1,), generator=draw))
        return tuple(torch.randint(3, VOCABULARY, (count,), generator=draw).tolist())

    return TrainingRows(
        [EncodedRow(ids(14), ids(9)) for i in range(6)],
        [ids(11) for _ in range(7)],
        [EncodedRow(ids(14), ids(12)) for i in range(6)],
    )


def make_loader(rows: TrainingRows, reduction: str) -> Loader:
    layout = Layout(forget_per_micro_batch=3, retain_per_micro_batch=4)
    return Loader(rows, ga_mismatch.terms(WEIGHTS), layout, num_mismatch=2, reduction=reduction)


def load_reference(path):
    """The policy's weights with noise of a tenth of their size."""
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += torch.randn(parameter.shape, generator=draw) * parameter.std() * 0.1
    return reference.requires_grad_(False).eval()


def padded(model, rows):
    """Log-probabilities [B, L, V] of a right-padded batch, its targets [B, L], and where those are response tokens."""
    longest = max(map(len, rows))
    input_ids, attention_mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest)
    is_response = torch.zeros(len(rows), longest - 1, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor([*row.prompt_ids, *row.answer_ids])
        attention_mask[i, : len(row)] = 1
        is_response[i, len(row.prompt_ids) - 1 : len(row) - 1] = True
    logits = model(input_ids=input_ids, attention_mask=attention_mask.long()).logits
    return torch.log_softmax(logits.float(), -1)[:, :-1], input_ids[:, 1:], is_response


def reduced(loss_BL, is_response, reduction):
    loss_BL = loss_BL * is_response
    if reduction == "token":
        return loss_BL.sum() / is_response.sum()
    return (loss_BL.sum(1) / is_response.sum(1)).mean()


def plain_loss(policy, reference, forget, mismatch, retain, reduction):
    """The formula of the paper as it would be written down: three forwards, full logits, torch's own functions."""
    values = []
    for rows in (forget, mismatch):
        logp, targets, is_response = padded(policy, rows)
        values.append(reduced(-logp.gather(2, targets[..., None]).squeeze(2), is_response, reduction))
    logp, _, is_response = padded(policy, retain)
    logq, _, _ = padded(reference, retain)
    values.append(reduced((logq.exp() * (logq - logp)).sum(-1), is_response, reduction))
    return -WEIGHTS.eps_forget * values[0] + WEIGHTS.eps_mismatch * values[1] + WEIGHTS.eps_retain * values[2], values


def rows_of(batch, loader: Loader):
    """The rows of a packed batch, by term."""
    ends = batch.cu_seqlens.tolist()
    found = [[] for _ in loader.terms]
    for s, term in enumerate(batch.term_of_sequence):
        ids = batch.input_ids_T[ends[s] : ends[s + 1]].tolist()
        cut = len(ids) - int(batch.sequence_lengths_S[s])
        found[term].append(EncodedRow(tuple(ids[:cut]), tuple(ids[cut:])))
    return found


@pytest.fixture(scope="module")
def reference(tiny_model_dir):
    return load_reference(tiny_model_dir)


@pytest.mark.parametrize("workspace_bytes", [512 * 2**20, 1], ids=["one_chunk", "many_chunks"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_packed_loss_and_gradients_equal_three_padded_forwards(tiny_model_dir, reference, reduction, workspace_bytes):
    loader = make_loader(make_rows(), reduction)
    (batch,) = loader.micro_batches(0)
    forget, mismatch, retain = rows_of(batch, loader)
    assert (len(forget), len(mismatch), len(retain)) == (3, 6, 4)

    padded_model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    expected, (_, _, kl) = plain_loss(padded_model, reference, forget, mismatch, retain, reduction)
    expected.backward()
    assert kl > 1e-3

    policy = PackedCausalLM(
        load_causal_lm(str(tiny_model_dir), torch.float32), "sdpa", LossOptions(workspace_bytes=workspace_bytes)
    )
    packed_reference = PackedCausalLM(load_reference(tiny_model_dir), "sdpa")
    live = LiveReference(
        lambda part: packed_reference(part, hidden_only=True), reference.get_output_embeddings().weight
    )
    loss, _ = policy(batch, live.rows(batch))
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    plain = dict(padded_model.named_parameters())
    packed = dict(policy.causal_lm.named_parameters())
    assert plain.keys() == packed.keys() and plain
    for name, parameter in plain.items():
        difference = (packed[name].grad - parameter.grad).norm()
        assert difference <= 1e-5 * parameter.grad.norm(), f"{name}: {difference / parameter.grad.norm():.1e}"


def test_kl_to_an_equal_reference_is_exactly_zero(tiny_model_dir):
    loader = make_loader(make_rows(), "sequence")
    (batch,) = loader.micro_batches(0)
    policy = PackedCausalLM(load_causal_lm(str(tiny_model_dir), torch.float32), "sdpa")
    with torch.no_grad():
        hidden = policy(batch, hidden_only=True)
    head = policy.causal_lm.get_output_embeddings().weight.detach().clone()
    live = LiveReference(lambda part: hidden[-part.num_kl_rows :], head)
    _, loss_N = policy(batch, live.rows(batch))
    assert not loss_N[-batch.num_kl_rows :].any() and loss_N[: -batch.num_kl_rows].all()


def test_the_reference_on_the_retain_part_alone_sees_what_the_whole_stream_sees(tiny_model_dir):
    (batch,) = make_loader(make_rows(), "sequence").micro_batches(0)
    model = PackedCausalLM(load_causal_lm(str(tiny_model_dir), torch.float32), "sdpa")
    with torch.no_grad():
        whole = model(batch, hidden_only=True)[-batch.num_kl_rows :]
        live = LiveReference(lambda part: model(part, hidden_only=True), model.causal_lm.get_output_embeddings().weight)
        torch.testing.assert_close(live.rows(batch).hidden_NH, whole, rtol=0, atol=1e-5)


def test_without_gradients_the_wrapper_returns_the_nll_of_each_response_token(tiny_model_dir):
    rows = make_rows().retain
    model = load_causal_lm(str(tiny_model_dir), torch.float32)
    with torch.no_grad():
        logp, targets, is_response = padded(model, rows)
        nll_BL = -logp.gather(2, targets[..., None]).squeeze(2)
        nll = -PackedCausalLM(model, "sdpa")(pack_scored(rows))[0]
    torch.testing.assert_close(nll, nll_BL[is_response], rtol=1e-5, atol=1e-5)


def test_one_packed_row_of_another_content_leaves_the_other_losses_unchanged(tiny_model_dir):
    rows = list(make_rows().retain)
    model = PackedCausalLM(load_causal_lm(str(tiny_model_dir), torch.float32), "sdpa")
    changed = [*rows]
    changed[1] = EncodedRow(tuple(9 for _ in rows[1].prompt_ids), tuple(11 for _ in rows[1].answer_ids))
    with torch.no_grad():
        before, after = (model(pack_scored(r))[0].split([len(x.answer_ids) for x in r]) for r in (rows, changed))
    assert all(torch.equal(b, a) for i, (b, a) in enumerate(zip(before, after, strict=True)) if i != 1)
    assert not torch.equal(before[1], after[1])


def test_activation_checkpointing_gives_the_same_gradients(tiny_model_dir):
    (batch,) = make_loader(make_rows(), "sequence").micro_batches(0)
    gradients = []
    for checkpointing in (False, True):
        policy = PackedCausalLM(load_causal_lm(str(tiny_model_dir), torch.float32), "sdpa").train()
        if checkpointing:
            policy.enable_activation_checkpointing()
        with torch.no_grad():
            rows = LiveReference(
                lambda part, p=policy: p(part, hidden_only=True), policy.causal_lm.lm_head.weight.clone()
            )
            reference_rows = rows.rows(batch)
        policy(batch, reference_rows)[0].backward()
        gradients.append([p.grad for p in policy.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-8)
