from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from unlearn_ds.arguments import parse
from unlearn_ds.checks import check
from unlearn_ds.config import EMBEDDED_MODEL, RunConfig, UsageError, fingerprint, looks_like_file, replace, to_dict

CONFIG = parse({})


def test_the_defaults_pass_their_own_check():
    assert check(CONFIG) is None and check(RunConfig()) is None


def test_the_configuration_can_be_written_as_json_and_cannot_be_changed():
    assert json.loads(json.dumps(to_dict(CONFIG)))["optim"]["max_steps"] == CONFIG.optim.max_steps
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.optim.max_steps = 1


def test_replace_refuses_a_name_that_does_not_exist():
    with pytest.raises((TypeError, AttributeError)):
        replace(CONFIG, **{"optim.max_stepz": 1})
    with pytest.raises((TypeError, AttributeError)):
        replace(CONFIG, nothing=1)


def test_configuration_and_command_line_need_no_torch(repository):
    code = (
        "import sys, unlearn_ds.arguments as a, unlearn_ds.checks as c, unlearn_ds.ds_json as d;"
        "c.check(a.parse({})); d.load('zero3'); a.help_text();"
        "print(sorted({'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# The fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"log.tensorboard": False},
        {"log.progress": False},
        {"eval.every": 5},
        {"eval.gather": "never"},
        {"checkpoint.save_every": 7},
        {"checkpoint.resume": "auto"},
        {"output_dir": "elsewhere"},
        {"dry_run": True},
        {"lora.export": "separate"},
        {"engine.nvme_path": "elsewhere"},
    ],
    ids=str,
)
def test_the_fingerprint_ignores_what_does_not_decide_the_numbers(changes):
    assert fingerprint(replace(CONFIG, **changes)) == fingerprint(CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"scenario": "other"},
        {"model.path": "other"},
        {"model.revision": "abc"},
        {"data.max_length": 100},
        {"data.forget_data": "a.csv"},
        {"objective.eps_forget": 0.75},
        {"objective.reduction": "token"},
        {"memorize.epochs": 9},
        {"optim.learning_rate": 1e-3},
        {"optim.batch_size": 3},
        {"optim.max_steps": 61},
        {"engine.ds_config": "zero2"},
        {"engine.reference": "resident"},
        {"lora.rank": 8},
        {"lora.alpha": 3.0},
        {"lora.targets": ("q_proj",)},
    ],
    ids=str,
)
def test_the_fingerprint_changes_with_what_decides_the_numbers(changes):
    assert fingerprint(replace(CONFIG, **changes)) != fingerprint(CONFIG)


def test_the_fingerprint_follows_the_content_of_local_files_and_not_their_place(tmp_path):
    def of(name, text):
        (tmp_path / name).write_text(text)
        return fingerprint(replace(CONFIG, **{"data.forget_data": str(tmp_path / name)}))

    assert of("a.jsonl", "one") == of("b.jsonl", "one") != of("a.jsonl", "two")


def test_the_fingerprint_is_the_same_in_another_process(repository):
    code = "from unlearn_ds import arguments, config; print(config.fingerprint(arguments.parse({})))"
    out = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == fingerprint(CONFIG)


# check()


BAD = [
    ({"scenario": "halucination"}, "unknown scenario 'halucination'. Did you mean 'hallucination'"),
    ({"objective.name": "ga"}, "unknown objective 'ga'"),
    ({"engine.reference": "cache"}, "unknown reference 'cache'. Did you mean 'cached'"),
    ({"eval.judge": "bert"}, "unknown judge 'bert'.*'bertscore'"),
    ({"data.source": "half"}, "--data must be one of sample, full; got 'half'"),
    ({"data.template": "chatml"}, "--data.template must be one of"),
    ({"objective.reduction": "mean"}, "--reduction must be one of sequence, token"),
    ({"optim.schedule": "step"}, "--schedule must be one of"),
    ({"model.attention": "eager"}, "--attention must be one of"),
    ({"checkpoint.resume": "latest"}, "--resume must be one of none, auto"),
    ({"optim.max_steps": 0}, "--max_steps must be above 0; got 0"),
    ({"optim.batch_size": -1}, "--batch_size must be above 0"),
    ({"optim.learning_rate": 0.0}, "--learning_rate must be above 0"),
    ({"optim.learning_rate": float("nan")}, "--learning_rate must be above 0"),
    ({"optim.learning_rate": float("inf")}, "--learning_rate must be above 0"),
    ({"optim.gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must be above 0"),
    ({"optim.max_skipped": 0}, "--optim.max_skipped must be above 0"),
    ({"data.max_length": 0}, "--data.max_length must be above 0"),
    ({"engine.loss_workspace_mib": -1}, "--engine.loss_workspace_mib must not be negative"),
    ({"engine.timeout_minutes": 0}, "--engine.timeout_minutes must be above 0"),
    ({"eval.batch_size": 0}, "--eval.batch_size must be above 0"),
    ({"eval.max_new_tokens": 0}, "--eval.max_new_tokens must be above 0"),
    ({"memorize.epochs": 0}, "--memorize.epochs must be above 0"),
    ({"memorize.batch_size": 0}, "--memorize.batch_size must be above 0"),
    ({"checkpoint.keep": 0}, "--checkpoint.keep must be above 0"),
    ({"objective.eps_forget": 0.0, "objective.eps_mismatch": 0.0, "objective.eps_retain": 0.0}, "are all 0"),
    ({"checkpoint.overwrite": True, "checkpoint.resume": "auto"}, "--overwrite removes the run"),
    ({"eval.num_normal": 0}, "--eval.num_normal must be above 0"),
    ({"eval.gather": "false"}, "--eval.gather must be one of auto, always, never"),
    ({"eval.margin": -0.1}, "--eval.margin must not be negative"),
    ({"optim.adam_beta1": 1.0}, "--optim.adam_beta1 must be below 1"),
    ({"objective.eps_forget": -1.0}, "--eps_forget must not be negative.*sign of the ascent"),
    ({"objective.eps_mismatch": -1.0}, "--eps_mismatch must not be negative"),
    ({"objective.eps_retain": float("nan")}, "--eps_retain must not be negative"),
    ({"objective.forget_bound": -1.0}, "--forget_bound must not be negative"),
    ({"optim.gradient_clipping": -1.0}, "--gradient_clipping must not be negative"),
    ({"optim.warmup_ratio": -0.1}, "--warmup_ratio must not be negative"),
    ({"optim.warmup_ratio": 1.0}, "--warmup_ratio must be below 1"),
    ({"optim.weight_decay": -0.1}, "--weight_decay must not be negative"),
    ({"optim.retain_batch_size": -1}, "--retain_batch_size must not be negative"),
    ({"checkpoint.save_every": -1}, "--save_every must not be negative"),
    ({"eval.every": -1}, "--eval_every must not be negative"),
    ({"data.max_rejected": -0.1}, "--data.max_rejected must not be negative"),
    ({"data.limit": -1}, "--data.limit must not be negative"),
    ({"seed": -1}, "--seed must not be negative"),
    ({"objective.num_mismatch": 0}, "--num_mismatch must be at least 1.*--eps_mismatch 0"),
    ({"data.mismatch_data": "org/name", "data.mismatch_text": "x"}, "exclude each other"),
    ({"data.forget_data": "org/name"}, "come together; --retain_data is missing"),
    ({"data.retain_data": "org/name"}, "come together; --forget_data is missing"),
    ({"data.forget_data": "nowhere.csv", "data.retain_data": "org/name"}, "--forget_data: no such file: nowhere.csv"),
    ({"data.mismatch_data": "./nowhere.txt"}, "--mismatch_data: no such file"),
    ({"model.path": "./nowhere"}, "--model: no such folder: ./nowhere"),
    ({"lora.rank": -1}, "--lora_rank must not be negative"),
    ({"lora.rank": 4, "lora.alpha": 0.0}, "--lora_alpha must be above 0"),
    ({"lora.rank": 4, "lora.export": "both"}, "--lora_export must be one of merged, separate"),
    ({"lora.alpha": 8.0}, "--lora_alpha needs --lora_rank above 0"),
    ({"lora.targets": ("q_proj",)}, "--lora_targets needs --lora_rank above 0"),
    ({"lora.export": "separate"}, "--lora_export needs --lora_rank above 0"),
    ({"engine.reference": "adapter"}, "--reference adapter .* needs --lora_rank above 0"),
    ({"engine.reference": "nvme"}, "--reference nvme needs --engine.nvme_path FOLDER"),
    ({"engine.ds_config": "zero3_nvme"}, "--ds_config zero3_nvme needs --engine.nvme_path FOLDER"),
    ({"engine.nvme_path": "."}, "--engine.nvme_path is only read by --reference nvme and.*--reference offload"),
    ({"engine.reference": "nvme", "engine.nvme_path": "./nowhere"}, "--engine.nvme_path: no such folder: ./nowhere"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_what_cannot_work_is_refused_with_a_sentence_that_names_the_flag(changes, message):
    with pytest.raises(UsageError, match=message):
        check(replace(CONFIG, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"objective.eps_mismatch": 0.0, "objective.num_mismatch": 0},
        {"objective.eps_retain": 0.0},
        {"data.forget_data": "org/name", "data.retain_data": "org/other"},
        {"data.mismatch_text": "I do not know."},
        {"model.path": "org/name"},
        {"model.path": EMBEDDED_MODEL},
        {"lora.rank": 4, "engine.reference": "adapter"},
        {"lora.rank": 4, "lora.alpha": 3.0, "lora.targets": ("q_proj",), "lora.export": "separate"},
        {"engine.reference": "nvme", "engine.nvme_path": "."},
        {"engine.ds_config": "zero3_nvme", "engine.nvme_path": "."},
        {"optim.warmup_ratio": 0.0, "optim.gradient_clipping": 0.0, "optim.weight_decay": 0.0},
    ],
    ids=str,
)
def test_what_can_work_passes(changes):
    assert check(replace(CONFIG, **changes)) is None


def test_a_data_file_of_an_unknown_kind_is_refused(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text("a\tb\n")
    with pytest.raises(UsageError, match=r"--forget_data: .*data\.tsv is none of \.csv"):
        check(replace(CONFIG, **{"data.forget_data": str(path), "data.retain_data": "org/name"}))


def test_a_model_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no config.json"):
        check(replace(CONFIG, **{"model.path": str(tmp_path)}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no weights"):
        check(replace(CONFIG, **{"model.path": str(tmp_path)}))
    (tmp_path / "model.safetensors").touch()
    check(replace(CONFIG, **{"model.path": str(tmp_path)}))


def test_files_and_hub_ids_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not looks_like_file("org/name")
    assert all(looks_like_file(name) for name in ("data.csv", "x.parquet", "./x", "/x", "~/x"))
    (tmp_path / "org").mkdir()
    assert looks_like_file("org")
