"""Unlearn: ``deepspeed launchers/train.py --scenario hallucination``. ``--help`` lists every flag."""

from __future__ import annotations

import sys
import time

from unlearn_ds import arguments, command, config

BEGAN = time.monotonic()


def main(*positional: str, **flags: object) -> None:
    """Check everything that can be checked without a model, then run; leaves with the run's exit code."""
    if positional:
        raise config.UsageError(f"unexpected '{positional[0]}': flags are written --name value.")
    run = command.configured(flags)
    from unlearn_ds import dist, log, run_folder

    if run.dry_run:
        from unlearn_ds import plan

        sys.exit(plan.dry_run(run))
    run_folder.check(run)
    from unlearn_ds import doctor

    problems = doctor.before_run(run)
    from unlearn_ds import trainer

    code = trainer.train(run, problems)
    log.say(f"seconds     {time.monotonic() - BEGAN:.0f} from start to end")
    dist.shutdown()
    sys.exit(code)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(arguments.help_text())
    else:
        command.run(main)
