"""``python -m unlearn_ds.prepare``: what a first run would do once, done beforehand: convert the embedded model, let
DeepSpeed compile the one op that its CPU ranks use."""

from __future__ import annotations

from unlearn_ds import dist, embedded, log
from unlearn_ds.config import EMBEDDED_MODEL, EngineConfig


def main() -> None:
    log.quiet()
    from unlearn_ds import engine

    engine.start(EngineConfig())
    embedded.locate(EMBEDDED_MODEL)
    dist.shutdown()


if __name__ == "__main__":
    main()
