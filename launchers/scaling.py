"""Step time from 8 to 1,024 GPUs by the cost model: ``python launchers/scaling.py --preset llama2-70b``."""

from __future__ import annotations

import sys

from unlearn_ds import config
from unlearn_ds.exit_codes import USAGE


def main(
    preset: str | None = None, cluster: str = "h100", scenario: str = "harmful", plot: str | None = None,
    lora_rank: int = 0, tokens: int = 4096,
) -> None:  # fmt: skip
    """Print a table of step times and, with --plot FILE.png, draw them.

    preset, cluster: names, several with commas. Clusters: h100, a100 (400 and 200 Gb/s between nodes for every GPU),
    h100-400g, a100-400g (400 Gb/s for all eight GPUs of a node together). lora_rank: 0 trains all weights, the default.
    tokens: of a GPU's micro-batch.
    """
    from unlearn_ds import scaling

    presets, clusters = (scaling.split(names) for names in (preset or scaling.PRESETS, cluster))
    found = {(p, c): scaling.lines(p, scenario, c, lora_rank, tokens) for p in presets for c in clusters}
    for (name, on), points in found.items():
        scaling.say(name, on, points)
    scaling.say_assumptions()
    if plot:
        scaling.draw(found, plot)


if __name__ == "__main__":
    import fire

    try:
        fire.Fire(main)
    except config.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE)
