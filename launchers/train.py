"""Unlearn: ``deepspeed launchers/train.py --scenario hallucination``. ``--help`` lists every flag."""

from __future__ import annotations

import os
import sys
import time

from unlearn_ds import arguments, checks, config, ds_json, ranks

BEGAN = time.monotonic()
FINISHED, FAILED, USAGE = 0, 1, 2


def main(*positional: str, **flags: object) -> None:
    """Check everything that can be checked without a model, then run; leaves with the run's exit code."""
    if positional:
        raise config.UsageError(f"unexpected '{positional[0]}': flags are written --name value.")
    run = arguments.parse(flags)
    checks.check(run)
    if run.engine.ds_config != "auto":
        ds_json.load(run.engine.ds_config)
    # torch and what stands on it take seconds to import: not before the flags are known to be right.
    from unlearn_ds import dist, log, run_folder

    if not run.log.verbose:
        log.quiet()
    from unlearn_ds import choose, plan, sizing

    if not run.dry_run:
        sizing.check_machine(run)
    run = choose.resolved(run, arguments.given(flags), sizing.machine(run))
    run = arguments.for_machine(run, dist.computes_bf16())
    if run.dry_run:
        plan.dry_run(run)
        return
    run_folder.check(run)
    from unlearn_ds import doctor

    problems = doctor.before_run(run)
    from unlearn_ds import trainer

    code = trainer.train(run, problems)
    log.say(f"seconds     {time.monotonic() - BEGAN:.0f} from start to end")
    dist.shutdown()
    sys.exit(code)


def run_as_rank() -> int:
    """Run ``main`` on the command line as the rank that the launcher has made this process; returns the exit code."""
    import fire

    try:
        ranks.adopt()
        # Values stay text until the type of their knob is known: Fire would make a tuple of "Sorry, no".
        fire.Fire(fire.decorators.SetParseFn(str)(main))
    except config.UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once for all ranks of a machine
            print(f"error: {error}", file=sys.stderr)
        return USAGE
    except SystemExit as leaving:
        return int(leaving.code or FINISHED)
    return FINISHED


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(arguments.help_text())
        sys.exit(FINISHED)
    ranks.note_start()
    code = FAILED
    try:
        code = run_as_rank()
    finally:
        ranks.note_exit(code)
    sys.exit(code)
