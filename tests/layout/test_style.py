"""Limits that keep files readable, and nothing that only works on one machine."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
LONGEST_FILE, LONGEST_FUNCTION = 400, 100
FOLDERS = ("unlearn_ds", "kernels", "launchers", "tests", "ds_configs")
SUFFIXES = (".py", ".json", ".sh", ".md", ".ini", ".toml", ".cfg", ".j2", ".yaml", ".yml")
MACHINE_PATH = re.compile(
    r"(?<![\w.])/(?:home|root|Users|work|mnt|scratch|workspace|nfs|export)/[\w.]|[A-Z]:\\\\?Users"
)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


PACKAGE = python_files("unlearn_ds", "kernels", "launchers")


def where(path: Path, line: int = 0) -> str:
    return f"{path.relative_to(REPOSITORY)}" + (f":{line}" if line else "")


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_files_were_read():
    assert len(PACKAGE) > 15 and sum(len(functions(path)) for path in PACKAGE) > 60


def test_no_file_has_more_than_400_lines():
    counts = {where(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE}
    assert not {name: count for name, count in counts.items() if count > LONGEST_FILE}


def test_no_function_has_more_than_100_lines():
    long = {
        f"{where(path, f.lineno)} {f.name}": f.end_lineno - f.lineno + 1
        for path in PACKAGE
        for f in functions(path)
        if f.end_lineno - f.lineno + 1 > LONGEST_FUNCTION
    }
    assert not long


def test_no_path_of_one_machine_is_written_anywhere():
    top = [path for path in REPOSITORY.iterdir() if path.is_file() and path.suffix in (*SUFFIXES, "")]
    inside = [p for folder in FOLDERS for p in (REPOSITORY / folder).rglob("*") if p.suffix in SUFFIXES and p.is_file()]
    files = [path for path in {*top, *inside} if path.name != Path(__file__).name and ".pytest_cache" not in path.parts]
    assert len(files) > 20
    faults = [
        f"{where(path, number)}: {line.strip()[:80]}"
        for path in sorted(files)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert not faults, "\n" + "\n".join(faults)


def test_no_exception_is_swallowed():
    faults = []
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ExceptHandler):
                continue
            broad = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            )
            if broad and all(isinstance(statement, (ast.Pass, ast.Continue)) for statement in node.body):
                faults.append(where(path, node.lineno))
    assert not faults, "\n".join(faults)


def test_tests_have_no_packages_and_no_two_helpers_of_one_name():
    assert not list((REPOSITORY / "tests").rglob("__init__.py"))
    assert len(python_files("tests")) > 10
