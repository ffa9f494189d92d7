"""``torchrun`` without its report of a failed rank, which buries what the rank has said: torchrun.sh runs this."""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.utils.logging import get_logger

if __name__ == "__main__":
    for name in ("multiprocessing.api", "agent.server.api", "rendezvous.dynamic_rendezvous"):
        get_logger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main()
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0:  # a rank that ended by itself has said why
                print(f"error: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        sys.exit(1)  # supervise.py knows what each rank ended with
    except SignalException:
        sys.exit(1)
