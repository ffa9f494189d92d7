"""Unlearning and RLHF to the same rate: ``deepspeed launchers/against_rlhf.py --scenario harmful``."""

from __future__ import annotations

import sys
from pathlib import Path

from unlearn_ds import command, config
from unlearn_ds.exit_codes import FINISHED
from unlearn_ds.rlhf import recipe

HELP = """usage: deepspeed launchers/against_rlhf.py --scenario harmful [--flag value ...]

Unlearns as train.py does, into OUTPUT_DIR/unlearning (a finished run there is taken). Then runs SFT, a reward model and
PPO by TRL from the same model, on the same prompts, until the same judge finds the same rate or PPO's passes are over.
Both are counted: seconds, FLOPs, and what they did to the model. Writes OUTPUT_DIR/rlhf.json and rlhf.png.

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
    from unlearn_ds import against_rlhf, dist, run_folder, trainer

    run_folder.check(run)
    against_rlhf.check(run)
    code = trainer.train(run)
    if code == FINISHED:
        against_rlhf.main(run, recipe.parse(own, run.optim.batch_size), folder)
    dist.shutdown()
    sys.exit(code)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(HELP.format(flags=recipe.help_text()))
    else:
        command.run(main)
