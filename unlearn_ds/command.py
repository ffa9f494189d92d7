"""What the scripts of launchers/ share: from the words of a command line to a configuration, and to an exit code."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from unlearn_ds import arguments, checks, ds_json, local_files, ranks
from unlearn_ds.config import RunConfig, UsageError
from unlearn_ds.exit_codes import FAILED, FINISHED, INTERRUPTED, USAGE


def configured(flags: Mapping[str, Any]) -> RunConfig:
    """The configuration that flags make, checked, with what follows from model and machine filled in.

    Raises ``UsageError``, before any library is loaded where the flags alone show the mistake.
    """
    config = arguments.parse(flags)
    checks.check(config)
    if config.engine.ds_config != "auto":
        ds_json.load(config.engine.ds_config)
    # torch and what stands on it take seconds to import: not before the flags are known to be right.
    from unlearn_ds import dist, log

    if not config.log.verbose:
        log.quiet()
    if arguments.follows_plan(config):
        from unlearn_ds import choose, sizing

        if not config.dry_run:
            sizing.check_machine(config)
        config = choose.resolved(config, arguments.given(flags), sizing.machine(config))
    return arguments.for_machine(config, dist.computes_bf16())


def run(main: Callable[..., None]) -> None:
    """Call ``main`` with the words of the command line, as the rank that a launcher has made this process, and leave
    with the exit code of the run."""
    # What libraries make when they are imported lives as long as the process. Looking for garbage among it takes a
    # quarter of the start, until ``engine.start`` has garbage looked for again, and, if not frozen, seconds of the end.
    gc.disable()
    ranks.note_start()
    local_files.keep_ops_in_environment()
    code = FAILED
    try:
        code = _exit_code(main)
    finally:
        ranks.note_exit(code)
        gc.freeze()
    sys.exit(code)


def _exit_code(main: Callable[..., None]) -> int:
    import fire

    try:
        ranks.adopt()
        # Values stay text until the type of their knob is known: Fire would make a tuple of "Sorry, no".
        fire.Fire(fire.decorators.SetParseFn(str)(main))
    except UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once for all ranks of a machine
            print(f"error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a launcher may hand on what the terminal has sent already
        print("interrupted before anything was to be saved", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as leaving:
        return int(leaving.code or FINISHED)
    return FINISHED
