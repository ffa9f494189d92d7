"""The commands of launchers/README.md can be given as they stand there."""

from __future__ import annotations

import re
import shlex

import pytest
from harness import REPOSITORY

from unlearn_ds import arguments

PAGE = (REPOSITORY / "launchers" / "README.md").read_text()
COMMANDS = re.findall(r"^bash launchers/hostfile\.sh hosts (.*)$", PAGE, re.MULTILINE)


def parsed(command):
    words = shlex.split(command)
    return arguments.parse(dict(zip((w.removeprefix("--") for w in words[::2]), words[1::2], strict=True)))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_understood(command):
    assert parsed(command).output_dir.startswith("/shared/")


def test_every_scenario_has_one_for_every_size():
    wanted = {
        (scenario, preset)
        for scenario in ("harmful", "copyright", "hallucination")
        for preset in ("llama2-7b", "llama2-70b", "llama3-8b", "llama3-70b")
    }
    assert {(run.scenario, run.preset) for run in map(parsed, COMMANDS)} == wanted


def test_every_launcher_is_on_the_page():
    scripts = [path for kind in ("*.sh", "*.sbatch", "k8s/*.yaml") for path in (REPOSITORY / "launchers").glob(kind)]
    assert len(scripts) >= 7
    missing = [path.name for path in scripts if str(path.relative_to(REPOSITORY / "launchers")) not in PAGE]
    assert missing == []
