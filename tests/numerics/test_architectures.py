"""One packed forward of each architecture against its own padded forwards: positions, windows, caps, norms, scales."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import CONFIGS, GEMMA, SMALL, make_rows, padded_logp, padded_nll, save
from transformers import AutoModelForCausalLM

from unlearn_ds.config import UsageError
from unlearn_ds.data.packing import Placed, pack, pack_scored
from unlearn_ds.model import PackedCausalLM, load_causal_lm
from unlearn_ds.reference import LiveReference
from unlearn_ds.types import EncodedRow, Term

TERMS = [Term("forget", "forget", "ce", -0.5), Term("retain", "retain", "kl", 0.7)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name -> folder of a saved model, written when first asked for."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = save(CONFIGS[name](), tmp_path_factory.mktemp(name))
        return folders[name]

    return folder


def load_plain(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def load_packed(path, dtype=torch.float32):
    return PackedCausalLM(load_causal_lm(str(path), dtype), "sdpa")


def disturbed(model):
    """The same weights with noise: a reference from which the policy has moved away."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draw).to(parameter)
    return model.requires_grad_(False)


def plain_loss(model, reference, forget, retain):
    ascent = torch.stack([nll.mean() for nll in padded_nll(model, forget)]).mean()
    pairs = zip(padded_logp(model, retain), padded_logp(reference, retain), strict=True)
    kl = torch.stack([(q.exp() * (q - p)).sum(-1).mean() for p, q in pairs]).mean()
    return -0.5 * ascent + 0.7 * kl


def packed_loss(model, reference, forget, retain):
    placed = [
        Placed(row, term, TERMS[term].weight / len(rows) / len(row.answer_ids))
        for term, rows in enumerate((forget, retain))
        for row in rows
    ]
    batch = pack(placed, TERMS)
    head = reference.causal_lm.get_output_embeddings().weight
    return model(batch, LiveReference(lambda part: reference(part, hidden_only=True), head).rows(batch))[0]


def gradients(model):
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_loss_and_gradients_equal_padded_forwards(saved, name):
    """Ascent on some rows and the KL to another model on others, in one stream, biases and norms included."""
    path, forget, retain = saved(name), make_rows(0), make_rows(1)
    plain = load_plain(path)
    expected = plain_loss(plain, disturbed(load_plain(path)), forget, retain)
    expected.backward()
    packed = load_packed(path)
    reference = load_packed(path)
    disturbed(reference.causal_lm)
    loss = packed_loss(packed, reference, forget, retain)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    ours, truth = gradients(packed.causal_lm), gradients(plain)
    assert ours.keys() == truth.keys() and truth
    whole = torch.stack([g.norm() for g in truth.values()]).norm()
    for key, gradient in truth.items():
        difference = (ours[key] - gradient).norm()
        assert difference <= 1e-5 * gradient.norm() + 1e-6 * whole, f"{key}: {difference / gradient.norm():.1e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_shared_prompts_change_neither_loss_nor_gradients(saved, name):
    """Windows, learned and rotary positions, caps: an answer far down the stream counts from the end of its prompt."""
    prompts, answers = make_rows(0), [row.answer_ids for row in make_rows(1)]
    units = [[row, *(EncodedRow(row.prompt_ids, answer) for answer in answers)] for row in prompts[:3]]
    placed = [Placed(row, 0, 1.0 / (1 + n)) for unit in units for n, row in enumerate(unit)]
    placed += [Placed(row, 1, 0.3) for row in prompts[3:]]
    results = []
    for share in (False, True):
        model, reference = load_packed(saved(name)), load_packed(saved(name))
        disturbed(reference.causal_lm)
        batch = pack(placed, TERMS, share_prompts=share)
        head = reference.causal_lm.get_output_embeddings().weight
        live = LiveReference(lambda part, of=reference: of(part, hidden_only=True), head)
        loss, loss_N = model(batch, live.rows(batch))
        loss.backward()
        results.append((batch.num_tokens, loss_N.detach(), gradients(model.causal_lm)))
    (num_apart, apart_N, apart), (num_shared, shared_N, shared) = results
    assert num_apart - num_shared == len(answers) * sum(len(row.prompt_ids) for row in prompts[:3])
    torch.testing.assert_close(shared_N, apart_N, rtol=1e-5, atol=1e-6)
    whole = torch.stack([g.norm() for g in apart.values()]).norm()
    for key, gradient in apart.items():
        difference = (shared[key] - gradient).norm()
        assert difference <= 1e-5 * gradient.norm() + 1e-6 * whole, f"{key}: {difference / gradient.norm():.1e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_in_bf16_the_error_is_at_most_twice_that_of_padded_bf16(saved, name):
    path, rows = saved(name), make_rows()
    exact_model, padded_model = load_plain(path, torch.bfloat16).float(), load_plain(path, torch.bfloat16)
    packed_model = load_packed(path, torch.bfloat16)
    batch = pack([Placed(row, 0, 1.0) for row in rows], TERMS[:1])
    exact, padded = torch.cat(padded_nll(exact_model, rows)), torch.cat(padded_nll(padded_model, rows))
    loss, packed = packed_model(batch)
    for value in (exact.sum(), padded.sum(), loss):
        value.backward()
    assert (packed.double() - exact).norm() <= 2 * (padded.double() - exact).norm() + 1e-3 * exact.norm()
    truth, plain, ours = (gradients(m) for m in (exact_model, padded_model, packed_model.causal_lm))
    errors = [torch.stack([(g[k] - truth[k]).norm() for k in truth]).norm() for g in (ours, plain)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_is_off_even_in_training(saved, name):
    """Defect D10: with dropout in the policy alone the KL to the reference is noise at the first step."""
    packed = load_packed(saved(name)).train()
    batch = pack_scored(make_rows())
    first, second = packed(batch)[1], packed(batch)[1]
    assert torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(-packed.eval()(batch)[0], first)


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_from_left_padded_prompts_equals_each_prompt_alone(saved, name):
    """Positions must start at the first real token: OPT counts them along the attention mask, with an offset of 2."""
    prompts = [row.prompt_ids for row in make_rows()]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain, longest = load_plain(saved(name)), max(map(len, prompts))
    alone = [plain.generate(torch.tensor([prompt]), **options)[0, len(prompt) :] for prompt in prompts]
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with load_packed(saved(name)).generating() as model:
        together = model.generate(ids, attention_mask=mask, **options)[:, longest:]
    assert torch.equal(together, torch.stack(alone))
    assert together.unique().numel() > 3


@torch.no_grad()
@pytest.mark.parametrize("file_format", ["sharded", "bin"])
def test_other_files_hold_the_same_model(saved, tmp_path, file_format):
    save(CONFIGS["qwen2"](), tmp_path, file_format)
    names = {"sharded": "model.safetensors.index.json", "bin": "pytorch_model.bin"}
    assert (tmp_path / names[file_format]).exists() and not (tmp_path / "model.safetensors").exists()
    batch = pack_scored(make_rows())
    assert torch.equal(load_packed(tmp_path)(batch)[0], load_packed(saved("qwen2"))(batch)[0])


def test_the_models_have_what_sets_them_apart(saved):
    """The comparisons above would say little of models without it."""
    models = {name: load_plain(saved(name)) for name in CONFIGS}
    tied = {n for n, m in models.items() if m.get_output_embeddings().weight is m.get_input_embeddings().weight}
    assert {"opt", "gpt2", "qwen2", "gemma", "gemma2", "gemma3"} <= tied
    assert not {"opt_untied", "llama", "mistral", "gpt_neox", "phi3"} & tied
    assert models["opt_350m"].model.decoder.project_out.out_features == 16
    assert models["opt_350m"].model.decoder.final_layer_norm is None
    assert {"q_norm", "k_norm"} <= {name.split(".")[-2] for name, _ in models["qwen3"].named_parameters()}
    assert set(models["gemma3"].config.layer_types) == {"sliding_attention", "full_attention"}
    assert set(models["qwen2_window_above_layer_1"].config.layer_types) == {"sliding_attention", "full_attention"}


# What is refused


def mpt():
    return transformers.MptConfig(vocab_size=97, d_model=32, n_heads=4, n_layers=2, max_seq_len=64)


OWN_ATTENTION, BIAS = "lets no other attention in than its own", "no plain linear layer without bias but a Linear with"
REFUSED = {
    "sinks": (
        lambda: transformers.GptOssConfig(
            **{**SMALL, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 4}
        ),
        "s_aux",
    ),
    "convolutions": (lambda: transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]), "conv"),
    "alibi": (lambda: transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4), OWN_ATTENTION),
    "alibi_too": (mpt, OWN_ATTENTION),
    "falcon": (
        lambda: transformers.FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        OWN_ATTENTION,
    ),
    "mask_of_its_own": (lambda: transformers.DogeConfig(**SMALL), "a mask of its own"),
    "borders_lost": (lambda: transformers.StableLmConfig(**SMALL), "is not told where packed sequences end"),
    "both_directions": (
        lambda: transformers.Gemma3TextConfig(**GEMMA, use_bidirectional_attention=True),
        "tokens that see what follows",
    ),
    "head_with_a_bias": (lambda: transformers.PhiConfig(**SMALL), BIAS),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_packing_would_compute_wrongly_is_refused(tmp_path, name):
    config, reason = REFUSED[name]
    save(config(), tmp_path)
    with pytest.raises(UsageError, match=reason):
        load_packed(tmp_path)(pack_scored(make_rows()))


def test_a_model_that_does_something_else_to_its_logits_is_refused(saved, monkeypatch):
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 1e-3
            return output

    with pytest.raises(UsageError, match="Shifted changes its logits in a way"):
        PackedCausalLM(Shifted.from_pretrained(saved("llama")), "sdpa")
