"""``torchrun`` without its report of a failed rank, which buries what the rank has said: torchrun.sh runs this."""

from __future__ import annotations

import logging
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
    except (ChildFailedError, SignalException):
        sys.exit(1)  # supervise.py knows what each rank ended with
