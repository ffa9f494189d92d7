"""Compare the variants of a study: ``python launchers/ablate.py --study mismatch --scenario hallucination``."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlearn_ds import arguments, checks, config, ds_json, studies
from unlearn_ds.exit_codes import FINISHED, USAGE

TRAIN = Path(__file__).with_name("train.py")
OWN = ("output_dir", "dry_run", "resume", "checkpoint.resume")
"""Flags of ``train.py`` that mean the study here; an interrupted variant goes on without being asked."""


def main(*positional: str, study: str = "", launch: str = "", seeds: str = "1", **flags: object) -> None:
    """Run what is not finished yet, then compare; leaves with the exit code of the first variant that fails."""
    if positional:
        raise config.UsageError(f"unexpected '{positional[0]}': flags are written --name value.")
    if "LOCAL_RANK" in os.environ:
        raise config.UsageError(
            'start the study with python; --launch "deepspeed --num_gpus 8" says how each variant is started.'
        )
    if not str(seeds).isdigit() or int(seeds) < 1:
        raise config.UsageError(f"--seeds takes a whole number above 0; got '{seeds}'.")
    dry_run = str(flags.get("dry_run", False)).lower() != "false"
    folder = Path(str(flags.get("output_dir") or f"runs/ablation-{study}"))
    given = {name: value for name, value in flags.items() if name not in OWN}
    runs = studies.plan(study, given, folder, int(seeds))
    for name in runs:
        check(studies.settled(study, runs, name))
    for n, name in enumerate(runs, 1):
        knobs = studies.settled(study, runs, name)  # again: what has finished since may decide its steps
        state = check(knobs)
        line = command(launch, {**knobs, **({"checkpoint.resume": "auto"} if state == "unfinished" else {})})
        say(f"variant     {n}/{len(runs)} {name}: {state}, {knobs['output_dir']}")
        if dry_run:
            say(f"            {shlex.join(line)}")
        elif state != "finished" and (code := run(line)):
            say(
                f"error       {name} ended with exit code {code}: see above, and {knobs['output_dir']}. "
                "What is finished is kept; the same command goes on from here."
            )
            sys.exit(code)
    if dry_run:
        return
    # torch and what stands on it take seconds to import, and memory: not while variants run.
    from unlearn_ds import comparison, log

    log.quiet()
    compared = comparison.read(folder, list(runs))
    comparison.print_table(compared)
    page = comparison.write(folder, study, studies.STUDIES[study].title, studies.STUDIES[study].source, compared)
    say(f"report      {page}")


def check(knobs: Mapping[str, Any]) -> str:
    """Refuse what cannot work before the first variant starts; return the state of the variant's folder."""
    run = arguments.parse(knobs)
    checks.check(run)
    if run.engine.ds_config != "auto":
        ds_json.load(run.engine.ds_config)
    if not run.eval.enabled:
        raise config.UsageError("--eval.enabled false: a study compares evaluations; leave the flag out.")
    if run.checkpoint.overwrite:
        return "new"
    state = studies.state(run, set(knobs))
    if state == "other":
        raise config.UsageError(
            f"{run.output_dir} holds a run with other settings or data. Replace the study by --overwrite, or choose "
            "another folder with --output_dir."
        )
    return state


def command(launch: str, knobs: Mapping[str, Any]) -> list[str]:
    """Command line of one variant."""
    return [*(shlex.split(launch) or [sys.executable]), str(TRAIN), *(f"--{k}={value}" for k, value in knobs.items())]


def run(line: list[str]) -> int:
    """Run one variant to its end and return its exit code, as a shell gives it; hands on the signals that a run saves
    its state on."""
    process = subprocess.Popen(line)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in numbers}
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    import fire

    if {"-h", "--help"} & set(sys.argv[1:]):
        print(studies.help_text())
        sys.exit(FINISHED)
    try:
        # Values stay text until the type of their knob is known, as in train.py.
        fire.Fire(fire.decorators.SetParseFn(str)(main))
    except config.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE)
