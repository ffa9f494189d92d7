"""Whose an output folder is, before anything is written to it."""

import json

import pytest

from unlearn_ds import arguments, run_folder
from unlearn_ds.config import UsageError, fingerprint, replace, to_dict


@pytest.fixture
def config(tmp_path):
    return arguments.parse({"output_dir": str(tmp_path / "out")})


def earlier_run(config, tmp_path, files=("metrics.jsonl",), world_size=1):
    out = tmp_path / "out"
    out.mkdir()
    settings = {**to_dict(config), "fingerprint": fingerprint(config), "world_size": world_size}
    (out / "config.json").write_text(json.dumps(settings))
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    return out


def resuming(config, **changes):
    return replace(config, **{"checkpoint.resume": "auto"}, **changes)


def test_a_new_and_an_empty_folder_are_free(config, tmp_path):
    run_folder.check(config)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    run_folder.check(config)
    assert not any((tmp_path / "out").iterdir())


def test_a_run_that_failed_before_its_first_step_holds_no_folder(config, tmp_path):
    out = earlier_run(config, tmp_path, files=("rejected.jsonl",))
    run_folder.check(config)
    assert {path.name for path in out.iterdir()} == {"config.json", "rejected.jsonl"}  # looked at, not touched


def test_a_run_that_has_started_is_left_alone_unless_resumed_or_overwritten(config, tmp_path):
    earlier_run(config, tmp_path)
    with pytest.raises(UsageError, match="--resume auto, replace it by --overwrite"):
        run_folder.check(config)
    run_folder.check(resuming(config))
    run_folder.check(replace(config, **{"checkpoint.overwrite": True}))


def test_resuming_with_other_values_names_them(config, tmp_path):
    earlier_run(config, tmp_path)
    with pytest.raises(UsageError, match="other values of optim.max_steps, eval.num_normal"):
        run_folder.check(resuming(config, **{"optim.max_steps": 41, "eval.num_normal": 3}))


def test_resuming_with_changed_data_is_refused(config, tmp_path):
    (tmp_path / "rows.jsonl").write_text("one")
    config = replace(config, **{"data.forget_data": str(tmp_path / "rows.jsonl")})
    earlier_run(config, tmp_path)
    run_folder.check(resuming(config))
    (tmp_path / "rows.jsonl").write_text("two")
    with pytest.raises(UsageError, match="the content of the data files"):
        run_folder.check(resuming(config))


def test_resuming_on_other_ranks_is_refused_when_there_is_a_checkpoint(config, tmp_path, monkeypatch):
    out = earlier_run(config, tmp_path, world_size=2)
    run_folder.check(resuming(config))
    (out / "checkpoints" / "step-000001").mkdir(parents=True)
    (out / "checkpoints" / "step-000001" / "complete.json").touch()
    with pytest.raises(UsageError, match="written by 2 rank.*this run has 1"):
        run_folder.check(resuming(config))
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_folder.check(resuming(config))


def test_a_file_is_no_folder(config, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match="is a file"):
        run_folder.check(config)


def test_the_card_names_the_form_of_the_prompt(config):
    card = run_folder.model_card(replace(config, **{"data.system_prompt": "Be brief."}), None, "chat")
    assert "template `chat`" in card and "'Be brief.'" in card


def test_numbers_that_json_lacks_become_null(tmp_path):
    run_folder.write_json(tmp_path / "x.json", {"a": [float("nan"), 1.0], "b": float("inf")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.0], "b": None}
