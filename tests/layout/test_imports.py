"""Who may import whom: the table of DESIGN.md, section 3, read from the source. Imports in functions count too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = "unlearn_ds"

LEVELS = {
    0: [
        "__init__",
        "config",
        "checks",
        "registry",
        "types",
        "presets",
        "studies",
        "arguments",
        "ds_json",
        "workspace",
        "rectangles",
        "versions",
        "local_files",
        "ranks",
        "machine",
        "exit_codes",
        "kernels",
    ],  # fmt: skip
    1: ["dist", "log", "ops", "cost", "attention", "stopping"],
    2: [
        "heartbeat",
        "optimizer",
        "model",
        "lora",
        "matrices",
        "reference",
        "embedded",
        "drawing",
        "data",
        "objectives",
        "metrics",
    ],
    3: [
        "scenarios",
        "engine",
        "checkpoint",
        "profiler",
        "report",
        "run_folder",
        "generate",
        "preflight",
        "projection",
        "sizing",
    ],
    4: ["evaluate", "choose", "scaling", "build", "prepare", "own_answers", "export", "comparison"],
    5: ["loop", "plan", "doctor", "rlhf"],
    6: ["memorize", "command"],
    7: ["trainer", "throughput", "against_rlhf"],
}
LEVEL_OF = {room: level for level, rooms in LEVELS.items() for room in rooms}

NEIGHBOURS = {("reference", "data.packing"), ("model", "lora"), ("matrices", "lora")}
"""(room, module) of one level that may be imported all the same."""

LAUNCHERS_MAY_IMPORT = {
    "command",
    "trainer",
    "throughput",
    "against_rlhf",
    "rlhf",
    "projection",
    "doctor",
    "plan",
    "choose",
    "sizing",
    "scaling",
    "cost",
    "dist",
    "log",
    "run_folder",
    "comparison",
    *LEVELS[0],
}

WITHOUT_TORCH = {"config", "checks", "registry", "presets", "studies", "arguments", "ds_json", "stopping", "ranks",
                 "versions", "local_files", "machine", "exit_codes"}  # fmt: skip
"""The command line must answer before torch is loaded."""

THIRD_PARTY = {0: {"torch", "triton", "psutil"}, 1: {"torch", "triton", "rich", "tqdm", "tensorboard", "flash_attn"}}
"""What the lowest levels may import beside the standard library; the others are free but for deepspeed."""


class Import(NamedTuple):
    """``module`` imports ``target`` (dotted names) at ``where`` (file:line)."""

    module: str
    target: str
    where: str


def room_of(module: str) -> str:
    """Room of a dotted name below the package: ``data.packing`` lies in ``data``."""
    return module.split(".")[0] or "__init__"


def sources() -> dict[str, Path]:
    """Module name below the package -> file; kernels lie behind a symbolic link that a glob does not follow."""
    roots = {"": REPOSITORY / PACKAGE, "kernels.": REPOSITORY / "kernels"}
    found = {}
    for prefix, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root).with_suffix("")
            # Benchmarks are scripts that stand above the whole package, and the wheel leaves them out.
            if (prefix and relative.parts[0] != "bench") or (not prefix and relative.parts[0] != "kernels"):
                found[prefix + ".".join(relative.parts)] = path
    return {name.removesuffix(".__init__") if name != "__init__" else "": path for name, path in found.items()}


SOURCES = sources()
LAUNCHERS = sorted((REPOSITORY / "launchers").rglob("*.py"))


def imported_names(node: ast.AST, module: str, is_package: bool) -> list[str]:
    """Absolute dotted names that a statement imports; ``import_module("...")`` counts as one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = [PACKAGE, *module.split(".")] if module else [PACKAGE]
            parts = parts[: len(parts) - node.level + is_package]
            base = ".".join([*parts, base] if base else parts)
        # "from unlearn_ds import ops" imports a module, "from unlearn_ds.ops import masked_loss" a name of one.
        return [f"{base}.{a.name}" if is_module(f"{base}.{a.name}") else base for a in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


def is_module(dotted: str) -> bool:
    package, _, rest = dotted.partition(".")
    return package == PACKAGE and (rest in SOURCES or any(name.startswith(f"{rest}.") for name in SOURCES))


def imports(path: Path, module: str) -> Iterator[Import]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        for target in imported_names(node, module, path.name == "__init__.py"):
            yield Import(module, target, f"{path.relative_to(REPOSITORY)}:{getattr(node, 'lineno', 0)}")


ALL = [found for module, path in SOURCES.items() for found in imports(path, module)]
OURS = [found for found in ALL if found.target.split(".")[0] == PACKAGE]


def below_package(target: str) -> str:
    return target.partition(".")[2]


def test_files_were_read():
    assert len(SOURCES) > 15 and len(OURS) > 30
    assert {"config", "ops", "data.packing", "objectives.ga_mismatch", "model"} <= SOURCES.keys()
    assert Import("model", f"{PACKAGE}.ops", f"{PACKAGE}/model.py") in {
        found._replace(where=found.where.split(":")[0]) for found in OURS
    }


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("from unlearn_ds import ops, dist", ["unlearn_ds.ops", "unlearn_ds.dist"]),
        ("from unlearn_ds.ops import masked_loss", ["unlearn_ds.ops"]),
        ("from unlearn_ds.data import packing", ["unlearn_ds.data.packing"]),
        ("def f():\n    import deepspeed.comm", ["deepspeed.comm"]),
        ("from . import sources", ["unlearn_ds.data.sources"]),
        ("from ..ops import masked_loss", ["unlearn_ds.ops"]),
        ("importlib.import_module('deepspeed')", ["deepspeed"]),
    ],
)
def test_every_way_to_import_is_seen(statement, expected):
    seen = [name for node in ast.walk(ast.parse(statement)) for name in imported_names(node, "data.packing", False)]
    assert seen == expected


def test_every_module_has_a_level():
    assert [
        f"{path.relative_to(REPOSITORY)} has no level" for m, path in SOURCES.items() if room_of(m) not in LEVEL_OF
    ] == []


def may_import(module: str, target: str) -> bool:
    room, other = room_of(module), room_of(target)
    mine, theirs = LEVEL_OF[room], LEVEL_OF.get(other, -1)
    return room == other or theirs < mine or theirs == mine == 0 or (room, target) in NEIGHBOURS


def test_a_room_imports_only_lower_levels():
    faults = []
    for module, target, where in OURS:
        if room_of(module) in LEVEL_OF and not may_import(module, below_package(target)):
            levels = LEVEL_OF[room_of(module)], LEVEL_OF.get(room_of(below_package(target)))
            faults.append(f"{where}: {module} (level {levels[0]}) imports {target} (level {levels[1]})")
    assert faults == []


def test_launchers_import_only_the_front_rooms():
    assert LAUNCHERS
    assert [
        f"{found.where} imports {found.target}"
        for path in LAUNCHERS
        for found in imports(path, "")
        if found.target.split(".")[0] == PACKAGE and room_of(below_package(found.target)) not in LAUNCHERS_MAY_IMPORT
    ] == []


def test_nothing_imports_a_launcher_or_a_test():
    assert [
        f"{f.where} imports {f.target}" for f in ALL if f.target.split(".")[0] in ("launchers", "tests", "conftest")
    ] == []


def test_only_the_engine_imports_deepspeed():
    everyone = ALL + [found for path in LAUNCHERS for found in imports(path, "launchers")]
    users = {found.module for found in everyone if found.target.split(".")[0] == "deepspeed"}
    assert "engine" in users or "engine" not in SOURCES
    assert [
        f"{f.where} imports {f.target}"
        for f in everyone
        if f.target.split(".")[0] == "deepspeed" and f.module != "engine"
    ] == []


def test_the_command_line_needs_no_torch():
    assert [
        f"{f.where} imports {f.target}" for f in ALL if f.module in WITHOUT_TORCH and f.target.split(".")[0] == "torch"
    ] == []


def test_the_lowest_levels_import_only_torch_and_what_they_are_for():
    faults = []
    for module, target, where in ALL:
        top, level = target.split(".")[0], LEVEL_OF.get(room_of(module))
        if level in THIRD_PARTY and top != PACKAGE and top not in sys.stdlib_module_names | THIRD_PARTY[level]:
            faults.append(f"{where}: {module} (level {level}) imports {target}")
    assert faults == []
