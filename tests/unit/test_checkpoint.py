"""Checkpoints are whole or not there; the engine is a stand-in that writes one file."""

import json
import random

import numpy as np
import pytest
import torch

from unlearn_ds import checkpoint


class Engine:
    """Writes ``state`` as JSON, as an engine would write its weights."""

    def save_checkpoint(self, folder, tag, state):
        (folder / tag).mkdir(parents=True)
        (folder / tag / "engine.json").write_text(json.dumps(state))

    def load_checkpoint(self, folder, tag):
        return json.loads((folder / tag / "engine.json").read_text())


def save(folder, step, keep=2):
    return checkpoint.save(Engine(), folder, step, {"skipped_in_a_row": 1}, keep)


def test_the_newest_is_found_with_its_state(tmp_path):
    save(tmp_path, 9)
    assert save(tmp_path, 10) == tmp_path / "step-000010"
    assert checkpoint.load_newest(Engine(), tmp_path) == {"step": 10, "skipped_in_a_row": 1}


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=3)
    assert [folder.name for folder in sorted(tmp_path.iterdir())] == ["step-000002", "step-000003", "step-000004"]


def test_an_interrupted_checkpoint_is_not_resumed_from_and_written_anew(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / checkpoint._MARKER).unlink()
    assert checkpoint.load_newest(Engine(), tmp_path)["step"] == 1
    save(tmp_path, 2)
    assert checkpoint.load_newest(Engine(), tmp_path)["step"] == 2


def test_nothing_to_resume_from_is_none(tmp_path):
    assert checkpoint.load_newest(Engine(), tmp_path) is None


def test_another_number_of_ranks_is_refused_and_both_numbers_told(tmp_path):
    marker = save(tmp_path, 1) / checkpoint._MARKER
    marker.write_text(json.dumps({"step": 1, "world_size": 8}))
    with pytest.raises(ValueError, match="8 ranks and this run has 1"):
        checkpoint.load_newest(Engine(), tmp_path)


def test_every_random_state_is_restored(tmp_path):
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    save(tmp_path, 1)
    expected = draw()
    assert draw() != expected
    checkpoint.load_newest(Engine(), tmp_path)
    assert draw() == expected


def test_all_but_one_checkpoint_can_be_removed_later_and_unfinished_ones_included(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=9)
    (save(tmp_path, 4, keep=9) / checkpoint._MARKER).unlink()
    assert checkpoint.keep_only(tmp_path, 2)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-000002"]
    assert not checkpoint.keep_only(tmp_path, 5)
    assert checkpoint.keep_only(tmp_path, None) and not list(tmp_path.iterdir())
    assert checkpoint.keep_only(tmp_path / "nowhere", None)
