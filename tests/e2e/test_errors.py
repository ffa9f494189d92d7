"""Mistakes of a user: exit code 2, one sentence to act on, no traceback, before any model is loaded."""

from __future__ import annotations

import functools
import json
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor

import harness
import pytest
from harness import finish, write_data

pytestmark = pytest.mark.slow
# What happens before libraries are imported is part of it.
run, start = (functools.partial(f, launched=True) for f in (harness.run, harness.start))


def message(done):
    """Check the manner of a failure and return its one line."""
    assert "Traceback" not in done.stdout, done.stdout
    assert done.returncode == 2, done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and not lines[0].startswith("error: error"), done.stdout
    return lines[0]


def fails(cache, *flags, seconds=10):
    """A run that must fail within seconds: of work, because other tests may keep the cores busy."""
    began = work_of_children()
    done = run(cache, *flags)
    assert work_of_children() - began < seconds
    return message(done)


def work_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--scenario", "halucination"], "hallucination"),
        (["--learning_rat", "1"], "learning_rate"),
        (["--optim.learning_rat", "1"], "optim.learning_rate"),
        (["--preset", "opt-1.3"], "opt-1.3b"),
        (["--ds_config", "zero33"], "zero3"),
        (["--max_steps", "many"], "whole number"),
        (["--max_steps", "0"], "above 0"),
        (["--eps_forget", "-1"], "negative"),
        (["--eps_forget", "0", "--eps_mismatch", "0", "--eps_retain", "0"], "eps_"),
        (["--reference", "copy"], "offload"),
        (["--reference", "adapter"], "--lora_rank"),
        (["--lora_dropout", "0.1"], "unknown flag"),
        (["--reference", "nvme"], "--engine.nvme_path"),
        (["--forget_data", "nowhere.jsonl", "--retain_data", "nowhere.csv"], "no such file"),
        (["--forget_data", "pminervini/HaluEval:qa"], "--retain_data"),
        (["--model", "./nowhere"], "no such folder"),
        (["surprise"], "surprise"),
    ],
)
def test_a_wrong_flag_is_told_with_the_nearest_right_one(tmp_path, flags, expected):
    assert expected in fails(tmp_path, *flags, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_flag_is_told_once_on_two_ranks(tmp_path):
    """The launcher hands the exit code on, and two ranks do not say the same twice."""
    assert "learning_rate" in message(run(tmp_path, "--learning_rat", "1", ranks=2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({"elasticity": {}}, "removed"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size"),
        ({"gradient_clipping": 1.0}, "--gradient_clipping"),
        ({"train_batch_size": 8}, "--batch_size"),
        ({"optimizer": {"type": "AdamW"}}, "--learning_rate"),
        ({"zero_optimization": {"stage": "auto"}}, "auto"),
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, "overlap_com"),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimization"),
        ({"fp16": {"enabled": True}}, "bf16"),
        ("{stage: 3}", "not valid JSON"),
    ],
)
def test_a_deepspeed_json_with_a_bad_key_is_refused(tmp_path, text, expected):
    """A misspelt key, which DeepSpeed would ignore or answer with a traceback, included."""
    path = tmp_path / "ds.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    assert expected in fails(tmp_path, "--ds_config", path, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kept", "expected"), [([], "config.json"), (["config.json"], "weights")])
def test_a_folder_that_is_no_whole_model_is_refused(tmp_path, tiny_model_dir, kept, expected):
    (tmp_path / "model").mkdir()
    for name in kept:
        shutil.copy(tiny_model_dir / name, tmp_path / "model" / name)
    assert expected in fails(tmp_path, "--model", tmp_path / "model", "--output_dir", tmp_path / "out")


def test_an_output_folder_of_another_run_is_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    settings = json.dumps({"fingerprint": "other", "world_size": 1})
    (out / "config.json").write_text(settings)
    (out / "metrics.jsonl").touch()
    assert "--resume auto" in fails(tmp_path, "--output_dir", out)
    assert (out / "config.json").read_text() == settings


def test_a_saved_model_is_no_run_that_overwrite_may_remove(tmp_path, tiny_model_dir):
    out = tmp_path / "out"
    shutil.copytree(tiny_model_dir, out, copy_function=shutil.copyfile)
    assert "no run of this program" in fails(tmp_path, "--output_dir", out, "--overwrite")
    assert (out / "config.json").read_bytes() == (tiny_model_dir / "config.json").read_bytes()


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume", "auto"]])
def test_an_output_folder_with_foreign_files_is_left_alone(tmp_path, flags):
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    assert "no run of this program" in fails(tmp_path, "--output_dir", out, *flags)
    assert sorted(path.name for path in out.iterdir()) == ["model", "notes.txt"]


def flags_of_late_mistakes(folder, model):
    """Name -> flags of mistakes that only show once the data or the tokenizer has been read, on their own files."""
    forget, retain = write_data(folder)
    good = {"--model": model, "--forget_data": forget, "--retain_data": retain}

    def forgetting(name, text):
        path = folder / f"{name}.jsonl"
        path.write_text(text)
        return {"--forget_data": path}

    unusable = json.dumps({"question": "", "right_answer": "a", "hallucinated_answer": "b"}) + "\n"
    no_end = folder / "no_end"
    shutil.copytree(model, no_end, copy_function=shutil.copyfile)
    settings = json.loads((no_end / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (no_end / "tokenizer_config.json").write_text(json.dumps(settings))
    changes = {
        "unreadable": forgetting("unreadable", '{"prompt": "a", \n nonsense'),
        "empty": forgetting("empty", ""),
        "unknown_columns": forgetting("unknown_columns", '{"foo": "a", "bar": "b"}\n'),
        "rejected": forgetting("rejected", forget.read_text() + unusable * 8),
        "everything_cut": {"--data.max_length": 3},
        "attention": {"--attention": "flash"},
        "no_end_token": {"--model": no_end},
        "no_such_hub_model": {"--model": "nobody/no-such-model"},
        "no_such_judge": {"--eval.judge_model": folder / "nowhere"},
    }
    return {
        name: [word for pair in {**good, "--output_dir": folder / name / "out", **change}.items() for word in pair]
        for name, change in changes.items()
    }


@pytest.fixture(scope="module")
def late(tmp_path_factory, tiny_model_dir):
    """The folder of all late mistakes and the outcome of each, two runs side by side: each loads torch for seconds."""
    folder = tmp_path_factory.mktemp("late")
    flags = flags_of_late_mistakes(folder, tiny_model_dir)
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda name: finish(start(folder / name, *flags[name]), 120), flags)
        return folder, dict(zip(flags, done, strict=True))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unreadable", "unreadable.jsonl"),
        ("empty", "empty.jsonl"),
        ("unknown_columns", "bar, foo"),
        ("rejected", "8 empty prompt"),
        ("everything_cut", "cut to nothing"),
        ("attention", "--attention auto"),
        ("no_end_token", "end-of-sequence"),
        ("no_such_hub_model", "nobody/no-such-model"),
        ("no_such_judge", "judge"),
    ],
)
def test_what_only_shows_while_loading_is_told_in_one_line_too(late, name, expected):
    assert expected in message(late[1][name])


@pytest.mark.parametrize(("name", "count", "reason"), [("rejected", 8, "empty prompt"), ("everything_cut", 80, "cut")])
def test_unusable_rows_are_written_down_before_the_run_stops(late, name, count, reason):
    lines = (late[0] / name / "out" / "rejected.jsonl").read_text().splitlines()
    assert len(lines) == count
    assert all(reason in json.loads(line)["reason"] for line in lines)


def test_help_and_dry_run_answer_without_training(tmp_path, tiny_model_dir):
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    for flag in ("--scenario", "--model", "--data", "--ds_config", "--output_dir", "--resume", "--max_steps",
                 "--batch_size", "--learning_rate", "--eps_forget", "--forget_bound", "--eval.margin"):  # fmt: skip
        assert f"{flag} " in done.stdout
    done = run(tmp_path, "--dry_run", "--model", tiny_model_dir, "--output_dir", tmp_path / "out")
    assert done.returncode == 0 and "memory plan" in done.stdout and not (tmp_path / "out").exists()
    assert "reference of the KL" in done.stdout and "cached " in done.stdout and "right for" in done.stdout


def test_a_machine_that_cannot_build_async_io_is_told_what_to_install_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "false")  # without a compiler libaio is not found
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # or the run would end at the model before
    flags = ["--model", "nobody/knows-this-model", "--reference", "nvme", "--engine.nvme_path", tmp_path]
    said = fails(tmp_path, *flags, "--output_dir", tmp_path / "out", seconds=120)  # torch is loaded, no model is
    assert "apt-get install libaio-dev" in said and "--reference offload" in said
