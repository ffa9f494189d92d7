"""A run with adapters: what it exports in either form, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from harness import (
    SMALL_EVALUATION,
    as_if_killed,
    ds_config,
    metrics,
    run,
    says_what_was_recorded,
    without_measured,
    write_data,
)
from transformers import AutoConfig, AutoModelForCausalLM

from unlearn_ds import lora
from unlearn_ds.config import LoraConfig

pytestmark = pytest.mark.slow
STEPS, SAVE_EVERY = 6, 3


@pytest.fixture(scope="module")
def merged(tmp_path_factory, tiny_model_dir):
    """(folder, flags) of a finished run that exports merged weights."""
    folder = tmp_path_factory.mktemp("lora")
    forget, retain = write_data(folder)
    flags = [
        "--model", tiny_model_dir, "--forget_data", forget, "--retain_data", retain, "--max_steps", STEPS,
        "--ds_config", ds_config(folder, 3, bf16=True), "--batch_size", 4, "--learning_rate", 1e-2, "--lora_rank", 4,
        "--save_every", SAVE_EVERY, "--log.tensorboard", "false", "--log.progress", "false", *SMALL_EVALUATION,
    ]  # fmt: skip
    done = run(folder / "cache", *flags, "--output_dir", folder / "merged")
    assert done.returncode == 0, done.stdout
    return folder, flags


@pytest.fixture(scope="module")
def resumed(merged):
    """The same run, gone on with from its middle and exported as an adapter."""
    folder, flags = merged
    out = shutil.copytree(folder / "merged", folder / "separate")
    as_if_killed(out, SAVE_EVERY)
    flags = [*flags, "--output_dir", out, "--resume", "auto", "--lora_export", "separate"]
    done = run(folder / "cache", *flags)
    assert done.returncode == 0, done.stdout
    assert f"resume      after step {SAVE_EVERY}" in done.stdout
    return out


def test_a_checkpoint_holds_adapters_and_not_the_model(merged, tiny_model_dir):
    size = sum(f.stat().st_size for f in (merged[0] / "merged" / "checkpoints" / "step-000003").iterdir())
    num_adapter = lora.size(AutoConfig.from_pretrained(tiny_model_dir), LoraConfig(rank=4, alpha=8.0))
    assert 12 * num_adapter < size < 12 * num_adapter + 250_000  # weights and two moments in fp32, and some lists
    assert (tiny_model_dir / "model.safetensors").stat().st_size > 250_000


def test_resume_continues_bit_identically(merged, resumed):
    whole = merged[0] / "merged"
    assert without_measured(metrics(resumed)) == without_measured(metrics(whole))
    assert (resumed / "answers.jsonl").read_text() == (whole / "answers.jsonl").read_text()


def test_an_adapter_does_not_go_on_with_another_base_model(merged, tiny_model_dir, tmp_path):
    folder, flags = merged
    other = shutil.copytree(tiny_model_dir, tmp_path / "base")
    flags = [*flags, "--model", other, "--output_dir", tmp_path / "out", "--eval.enabled", "false"]
    stopped = run(folder / "cache", *flags, "--checkpoint.export", "false")
    assert stopped.returncode == 0, stopped.stdout
    as_if_killed(tmp_path / "out", SAVE_EVERY)
    model = AutoModelForCausalLM.from_pretrained(other)
    model.get_input_embeddings().weight.data[5] += 1
    model.save_pretrained(other)
    done = run(folder / "cache", *flags, "--checkpoint.export", "false", "--resume", "auto")
    assert done.returncode == 2 and "belong to other weights" in done.stdout, done.stdout


def test_the_separate_adapter_merged_by_peft_is_the_merged_export_and_the_base_is_untouched(
    merged, resumed, tiny_model_dir
):
    """Bit for bit: the merged weights are the base as it lies on disk plus the adapter, and nothing else."""
    exported = AutoModelForCausalLM.from_pretrained(merged[0] / "merged" / "model").state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    untouched = {name: weight.clone() for name, weight in base.state_dict().items()}
    by_peft = peft.PeftModel.from_pretrained(base, resumed / "model").merge_and_unload().state_dict()
    assert {weight.dtype for weight in exported.values()} == {torch.bfloat16}
    assert exported.keys() == by_peft.keys() == untouched.keys()
    assert all(torch.equal(exported[name], by_peft[name]) for name in by_peft)
    changed = {name.split(".")[-2] for name in untouched if not torch.equal(untouched[name], exported[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_separate_export_names_its_base_and_loads_by_itself(resumed, tiny_model_dir):
    settings = json.loads((resumed / "model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model_dir) and settings["r"] == 4
    assert settings["lora_dropout"] == 0.0 and settings["lora_alpha"] == 8
    assert not list((resumed / "model").glob("model*.safetensors"))
    assert "holds them alone" in (resumed / "model" / "README.md").read_text()
    model = peft.AutoPeftModelForCausalLM.from_pretrained(resumed / "model")
    assert all(p.abs().sum() > 0 for name, p in model.named_parameters() if ".lora_B." in name)


def test_the_merged_export_generates_what_the_last_evaluation_recorded(merged):
    out = merged[0] / "merged"
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert any(answer["before"] != answer["after"] for answer in answers)
    assert says_what_was_recorded(out)
