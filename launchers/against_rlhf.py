"""Unlearning and RLHF to the same rate: ``deepspeed launchers/against_rlhf.py --scenario harmful``."""

from __future__ import annotations

import sys
from pathlib import Path

from unlearn_ds import command, config
from unlearn_ds.exit_codes import FINISHED
from unlearn_ds.rlhf import recipe

HELP = """usage: deepspeed launchers/against_rlhf.py --scenario harmful [--flag value ...]

Unlearns as train.py does, into OUTPUT_DIR/unlearning (a finished run there is taken). Then runs SFT, a reward model and
PPO by TRL from the same model, on the same prompts, until the same judge finds the same rate during PPO or its passes
are over. Both are counted: seconds, FLOPs, what they did to the model, and where RLHF first reached the rate. Writes
OUTPUT_DIR/rlhf.json and rlhf.png; the models of the stages stay in OUTPUT_DIR/sft, reward_model and ppo.

{flags}

and every flag of train.py (its --help lists them). The harmful and hallucination scenarios have what RLHF needs: an
answer that is preferred to the bad one. pip install "unlearn_ds[rlhf]" brings TRL."""


def main(*positional: str, **flags: object) -> None:
    """Check the flags, unlearn, and align the same model by RLHF; leaves with the exit code of the unlearning run."""
    if positional:
        raise config.UsageError(f"unexpected '{positional[0]}': flags are written --name value.")
    own = {name: flags.pop(name) for name in list(flags) if name.startswith(recipe.PREFIX)}
    recipe.parse(own, batch=1)
    folder = Path(str(flags.pop("output_dir", "runs/against_rlhf")))
    run = command.configured({"resume": "auto", **flags, "output_dir": str(folder / "unlearning")})
    if run.dry_run:
        from unlearn_ds import plan

        sys.exit(plan.dry_run(run))
    from unlearn_ds import against_rlhf, dist, doctor, run_folder, trainer

    run_folder.check(run)
    problems = doctor.before_run(run)
    how = recipe.parse(own, run.optim.batch_size, run.optim.gradient_accumulation_steps)
    ready = against_rlhf.check(run, how)
    code = trainer.train(run, problems)
    if code == FINISHED:
        against_rlhf.main(run, ready, how, folder)
    dist.shutdown()
    sys.exit(code)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(HELP.format(flags=recipe.help_text()))
    else:
        command.run(main)
