"""``torchrun`` without its report of a failed rank, which buries what the rank has said: torchrun.sh runs this."""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

if __name__ == "__main__":
    logging.disable(logging.ERROR)  # of this process alone: ranks are others
    try:
        run.main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()  # the others were ended for it
        if failure.exitcode < 0:  # a rank that ended by itself has said why
            print(f"error: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        sys.exit(1)  # supervise.py knows what each rank ended with
    except SignalException:
        sys.exit(1)
