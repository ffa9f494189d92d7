"""Ten optimizer steps of a run equal the formula written down in plain PyTorch: padded forwards, full logits, AdamW."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import ds_config, metrics, run, write_data
from transformers import AutoModelForCausalLM, get_scheduler

from unlearn_ds import arguments, build
from unlearn_ds.data.encode import Encoder
from unlearn_ds.model import load_tokenizer
from unlearn_ds.registry import SCENARIOS, resolve

pytestmark = pytest.mark.dist
STEPS, EPS_FORGET, EPS_MISMATCH, EPS_RETAIN, LEARNING_RATE = 10, 0.5, 0.25, 2.0, 1e-3


def padded(rows):
    longest = max(map(len, rows))
    ids = [[*row.prompt_ids, *row.answer_ids] + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


def predictions(model, rows):
    """Log-probabilities at the positions that predict each row's answer: one [tokens, V] a row."""
    ids, mask = padded(rows)
    logp = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    return [logp[n, len(row.prompt_ids) - 1 : len(row) - 1] for n, row in enumerate(rows)]


def cross_entropy(model, rows):
    losses = [
        F.nll_loss(p, torch.tensor(row.answer_ids)) for p, row in zip(predictions(model, rows), rows, strict=True)
    ]
    return torch.stack(losses).mean()


def kl(model, reference, rows):
    with torch.no_grad():
        targets = predictions(reference, rows)
    pairs = zip(predictions(model, rows), targets, strict=True)
    return torch.stack([(q.exp() * (q - p)).sum(-1).mean() for p, q in pairs]).mean()


def plain_losses(config, loader, path):
    model, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=1, num_training_steps=STEPS)
    losses = []
    for step in range(STEPS):
        rows = {"forget": [], "mismatch": [], "retain": []}
        for term, row in (item for part in loader.global_batch(step) for unit in part for item in unit):
            rows[loader.terms[term].name].append(row)
        terms = (
            -cross_entropy(model, rows["forget"]),
            cross_entropy(model, rows["mismatch"]),
            kl(model, reference, rows["retain"]),
        )
        loss = EPS_FORGET * terms[0] + EPS_MISMATCH * terms[1] + EPS_RETAIN * terms[2]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.gradient_clipping)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append([value.item() for value in (loss, *terms)])
    return losses


def test_ten_steps_on_zero3_equal_plain_pytorch(tmp_path, tiny_model_dir):
    forget, retain = write_data(tmp_path)
    flags = {
        "model": str(tiny_model_dir), "forget_data": str(forget), "retain_data": str(retain), "max_steps": STEPS,
        "ds_config": ds_config(tmp_path, 3), "batch_size": 4, "num_mismatch": 2, "learning_rate": LEARNING_RATE,
        "eps_forget": EPS_FORGET, "eps_mismatch": EPS_MISMATCH, "eps_retain": EPS_RETAIN, "gradient_clipping": 1.0,
        "output_dir": str(tmp_path / "out"), "eval.enabled": "false", "log.progress": "false", "memorize": "false",
    }  # fmt: skip
    done = run(tmp_path / "cache", *(word for name, value in flags.items() for word in (f"--{name}", value)))
    assert done.returncode == 0, done.stdout
    ours = [
        [line[n] for n in ("loss", "loss_forget", "loss_mismatch", "loss_retain")] for line in metrics(tmp_path / "out")
    ]

    config = arguments.parse(flags)
    encoder = Encoder(load_tokenizer(str(tiny_model_dir)))
    data = resolve("scenario", "hallucination", SCENARIOS).load(config, encoder)
    loader = build.loader(config, encoder, data, data.forget["train"])
    plain = plain_losses(config, loader, tiny_model_dir)
    assert ours[-1][3] > 0.01  # the run has moved away from its start, or the comparison would say nothing
    # The textbook KL of the plain side cancels: near zero it is only good to the rounding of its logits.
    assert ours == [pytest.approx(line, rel=1e-5, abs=1e-6) for line in plain]
