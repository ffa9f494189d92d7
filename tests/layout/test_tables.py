"""Every extension is one file and one row of text: no row without its file, no file without its row."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from unlearn_ds import registry

REPOSITORY = Path(__file__).parents[2]
TABLES = {name: table for name, table in vars(registry).items() if name.isupper() and isinstance(table, dict)}
ROWS = [(table, name, target) for table, rows in TABLES.items() for name, target in rows.items()]
ONE_FILE_A_ROW = {"objectives": "OBJECTIVES", "scenarios": "SCENARIOS"}


def file_of(module: str) -> Path:
    return REPOSITORY / Path(*module.split(".")).with_suffix(".py")


def test_there_are_rows():
    assert len(ROWS) > 8


@pytest.mark.parametrize(("table", "name", "target"), ROWS)
def test_every_row_resolves_to_a_file_of_this_project(table, name, target):
    module, colon, attribute = target.partition(":")
    assert colon and attribute.isidentifier(), f"{table}[{name!r}] must read module:attribute"
    assert file_of(module).is_file(), f"{table}[{name!r}] points to no file"
    assert importlib.util.find_spec(module) is not None
    assert registry.resolve(table, name, TABLES[table]) is not None


@pytest.mark.parametrize("folder", ONE_FILE_A_ROW)
def test_every_file_of_a_table_has_a_row(folder):
    files = {path.stem for path in (REPOSITORY / "unlearn_ds" / folder).glob("*.py")} - {"__init__"}
    assert files, f"found no file in {folder}/"
    pointed_to = {target.split(":")[0].rsplit(".", 1)[1] for target in TABLES[ONE_FILE_A_ROW[folder]].values()}
    assert files <= pointed_to, f"without a row in registry.{ONE_FILE_A_ROW[folder]}: {sorted(files - pointed_to)}"


def test_objectives_are_called_after_their_files():
    assert all(target == f"unlearn_ds.objectives.{name}:terms" for name, target in registry.OBJECTIVES.items())


def test_every_metric_file_has_a_row_and_says_its_version_and_direction():
    files = {path.stem for path in (REPOSITORY / "unlearn_ds/metrics").glob("*.py")} - {"__init__"}
    pointed_to = {t.split(":")[0].rsplit(".", 1)[1] for table in ("METRICS", "JUDGES") for t in TABLES[table].values()}
    assert files and files <= pointed_to, f"without a row: {sorted(files - pointed_to)}"
    for target in registry.METRICS.values():
        module = target.split(":")[0]
        if file_of(module).is_file():
            loaded = importlib.import_module(module)
            assert isinstance(loaded.version, int) and isinstance(loaded.higher_is_better, bool), module
