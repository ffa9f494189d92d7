"""The two linked folders, and the trap: a top-level package ``kernels`` would shadow Hugging Face's."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LINKED = ["kernels", "ds_configs"]


def run_python(code: str, *paths: Path) -> str:
    """Run code in a fresh interpreter outside the repository with ``paths`` as PYTHONPATH."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY.parent, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_kernels_is_no_package_of_its_own():
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", LINKED)
def test_the_folder_in_the_package_is_a_relative_link_to_the_one_outside(name):
    link = REPOSITORY / "unlearn_ds" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    assert link.resolve() == (REPOSITORY / name).resolve() and link.is_dir()


def test_a_bare_pythonpath_does_not_shadow_the_kernels_of_hugging_face():
    """A folder without ``__init__.py`` is at most a namespace package: no origin, and a real package wins over it."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    origin = run_python(code, REPOSITORY)
    assert origin == "None" or "site-packages" in Path(origin).parts


def test_a_real_package_called_kernels_wins_over_ours(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("real = True\n")
    assert run_python("import kernels; print(kernels.real)", REPOSITORY, tmp_path) == "True"


def test_our_kernels_and_configurations_are_reached_through_the_package():
    code = "import importlib.util as u; print(list(u.find_spec('unlearn_ds.kernels').submodule_search_locations)[0])"
    assert Path(run_python(code, REPOSITORY)).resolve() == (REPOSITORY / "kernels").resolve()


def test_no_file_imports_the_top_level_kernels():
    files = [
        p for folder in ("unlearn_ds", "kernels", "launchers", "tests") for p in (REPOSITORY / folder).rglob("*.py")
    ]
    assert len(files) > 15
    faults = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            faults += [
                f"{path.relative_to(REPOSITORY)}:{node.lineno}" for name in names if name.split(".")[0] == "kernels"
            ]
    assert not faults, "\n".join(faults)


def test_no_launcher_carries_the_name_of_a_module_that_somebody_imports():
    """``launchers/`` becomes ``sys.path[0]``: profile.py, deepspeed.py or types.py there would be imported instead."""
    names = {path.stem for path in (REPOSITORY / "launchers").glob("*.py")}
    assert names
    used = {"deepspeed", "torch", "transformers", "datasets", "slurm", "fire", "unlearn_ds", "kernels", "numpy"}
    assert not names & (set(sys.stdlib_module_names) | used)
