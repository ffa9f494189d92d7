"""The wheel holds what a run needs, kernels and configurations included, and nothing that shadows others."""

import shutil
import subprocess
import sys
import zipfile

import pytest


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    leave = shutil.ignore_patterns(".*", "runs", "tests", "build", "*.egg-info", "__pycache__")
    shutil.copytree(repository, source, symlinks=True, ignore=leave)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source],
        check=True, capture_output=True,
    )  # fmt: skip
    (path,) = folder.glob("*.whl")
    return path


def test_what_a_run_needs_is_in_the_wheel(wheel, repository):
    names = set(zipfile.ZipFile(wheel).namelist())
    for pattern in (
        "unlearn_ds/**/*.py", "ds_configs/*.json", "ds_configs/reference/*.json", "unlearn_ds/sample/*.jsonl",
        "unlearn_ds/sample/*.txt", "unlearn_ds/*.j2",
    ):  # fmt: skip
        files = [path.relative_to(repository) for path in repository.glob(pattern)]
        assert files, pattern
        inside = {str(path) if path.parts[0] == "unlearn_ds" else f"unlearn_ds/{path}" for path in files}
        assert {name for name in inside if "/bench/" not in name} <= names


def test_nothing_but_the_package_is_in_the_wheel(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"unlearn_ds", next(top for top in tops if top.endswith(".dist-info"))}


def test_the_unpacked_wheel_answers_by_itself(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import unlearn_ds; from unlearn_ds import arguments, checks, ds_json; from unlearn_ds.scenarios import SAMPLE;"
        "run = arguments.parse({}); checks.check(run); ds_json.load('zero3');"
        "assert (SAMPLE / 'normal.jsonl').is_file(); print(unlearn_ds.__file__)"
    )
    # -I and our own path first: the editable installation of this environment must not answer instead.
    start = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder)];"
        f"sys.path.insert(0, {str(tmp_path)!r});"
    )
    done = subprocess.run([sys.executable, "-I", "-c", start + code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "unlearn_ds" / "__init__.py")
