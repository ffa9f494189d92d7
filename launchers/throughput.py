"""A few measured steps, and the whole run beside RLHF: ``deepspeed launchers/throughput.py --scenario hallucination``.

``--table`` prints what common sizes and recipes cost beside RLHF, ``--calibration`` how well RLHF's cost is known; both
without a model.
"""

from __future__ import annotations

import sys

from unlearn_ds import command, config
from unlearn_ds.cost import devices, rlhf

HELP = """usage: deepspeed launchers/throughput.py --scenario hallucination [--flag value ...]

  --steps N           optimizer steps to take; the first ones are not counted [8]
  --against NAME      RLHF that the plot's title names: {names} [step3]
  --device NAME       devices that RLHF is modelled on: {devices} [the measured one, or A100-80G]
  --num_devices N     how many of them [8]
  --measure_rlhf      also take the steps of SFT, reward model and PPO, by TRL, on the same prompts and devices
  --table             print the analytic table of models and recipes, and stop
  --calibration       print published figures of RLHF beside the model's, and stop

and every flag of train.py (its --help lists them); --max_steps is the length of the run that is projected. Without
--output_dir the measurement lies in runs/throughput: throughput.json, throughput.png, with --profile profile.json."""


def main(
    *positional: str, steps: str = "8", against: str = "step3", device: str = "", num_devices: str = "8",
    measure_rlhf: str = "false", table: str = "false", calibration: str = "false", **flags: object,
) -> None:  # fmt: skip
    """Check the flags, then print a table, or measure and compare."""
    if positional:
        raise config.UsageError(f"unexpected '{positional[0]}': flags are written --name value.")
    for flag, value in (("--steps", steps), ("--num_devices", num_devices)):
        if not str(value).isdigit() or int(value) < 1:
            raise config.UsageError(f"{flag} takes a whole number above 0; got '{value}'.")
    if against not in rlhf.DENOMINATORS:
        raise config.UsageError(f"--against must be one of {', '.join(rlhf.DENOMINATORS)}; got '{against}'.")
    if device and device not in devices.MEMORY_TB_PER_SECOND:
        raise config.UsageError(f"--device must be one of {', '.join(devices.MEMORY_TB_PER_SECOND)}; got '{device}'.")
    if _is_set("--table", table) or _is_set("--calibration", calibration):
        from unlearn_ds import projection

        projection.print_table(device or "A100-80G") if _is_set("--table", table) else projection.print_calibration()
        return
    with_rlhf = _is_set("--measure_rlhf", measure_rlhf)
    run = command.configured({"output_dir": "runs/throughput", **flags})
    if run.dry_run:
        from unlearn_ds import plan

        sys.exit(plan.dry_run(run))
    from unlearn_ds import dist, throughput

    throughput.main(run, int(steps), against, device, int(num_devices), with_rlhf)
    dist.shutdown()


def _is_set(flag: str, value: str) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise config.UsageError(f"{flag} is given without a value, or with true or false; got '{value}'.")
    return str(value).lower() == "true"


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(HELP.format(names=", ".join(rlhf.DENOMINATORS), devices=", ".join(devices.MEMORY_TB_PER_SECOND)))
    else:
        command.run(main)
