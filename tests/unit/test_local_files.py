"""Folders of models that several runs may make at once."""

import pytest

from unlearn_ds import local_files


def made(folder, text):
    folder = local_files.partial(folder)
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(("replace", "left"), [(True, "second"), (False, "first")])
def test_a_whole_folder_is_replaced_or_kept_and_nothing_lies_beside_it(tmp_path, replace, left):
    target = tmp_path / "cache" / "model"
    first, second = made(target, "first"), made(target, "second")
    assert first != second
    local_files.put(first, target, replace)
    local_files.put(second, target, replace)
    assert (target / "config.json").read_text() == left
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_folder_that_is_not_whole_is_replaced_even_in_a_cache(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("half")
    local_files.put(made(tmp_path / "model", "whole"), tmp_path / "model", replace=False)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
