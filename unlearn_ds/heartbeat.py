"""A sign of life from every rank, so that a run on many nodes ends everywhere soon after one rank is lost.

A launcher ends the ranks of its own node. Those of other nodes wait in a collective operation until it times out,
minutes later and with a message about the network. Each rank therefore writes a counter into the store that the process
group met at, and watches the counter of the next rank: of any ranks that are gone, one has a neighbour that is not.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from types import TracebackType

import torch.distributed as torch_dist

from unlearn_ds import dist, ranks
from unlearn_ds.config import UsageError
from unlearn_ds.exit_codes import FAILED, LOST, USAGE

_DONE = b"done"


class Heartbeat:
    """Beats inside a ``with`` block that every rank enters; does nothing for one rank or ``seconds`` of 0.

    A rank whose counter has stood still for ``seconds`` is lost: the others say so and leave with ``LOST``. A rank that
    leaves the block by an exception tells the others why, and they leave too.
    """

    def __init__(self, seconds: int):
        self.seconds, self._interval = seconds, max(0.2, seconds / 6)
        self._watched = (dist.rank() + 1) % dist.world_size()
        self._stopping, self._over, self._last_words = threading.Event(), threading.Event(), ""
        self._thread: threading.Thread | None = None
        self._round = time.monotonic()

    def __enter__(self) -> Heartbeat:
        if self.seconds and dist.world_size() > 1:
            # A connection of its own: that of the process group is locked while its owner waits for a key.
            store = torch_dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=dist.timeout(1)
            )
            self._store = torch_dist.PrefixStore("unlearn_ds/heartbeat", store)
            self._name = f"rank {dist.rank()} on {socket.gethostname()}"
            self._store.set(f"name/{dist.rank()}", self._name)
            self._store.set(f"beat/{dist.rank()}", "0")
            dist.barrier()
            self._round = time.monotonic()
            self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._thread.start()
            threading.Thread(target=self._guard, name="heartbeat-guard", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        lost = error is not None and is_communication_error(error)
        if lost:
            # Some rank is gone, and the watch will know which: it ends this process.
            self._thread.join(self.seconds + 3 * self._interval)
        if error is not None:
            code = USAGE if isinstance(error, UsageError) else LOST if lost else FAILED
            self._last_words = json.dumps([code, f"{self._name} left: {type(error).__name__}: {error}"])
        self._stopping.set()
        self._thread.join()
        self._over.set()
        # Rank 0 holds the store: it leaves last.
        if error is None:
            dist.barrier()
        elif dist.rank() == 0:
            self._wait_for_others(2 * self._interval)

    def _watch(self) -> None:
        count, seen, since = 0, b"", time.monotonic()
        try:
            while not self._stopping.wait(self._interval):
                count += 1
                self._round = time.monotonic()
                self._store.set(f"beat/{dist.rank()}", str(count))
                if self._store.check(["last_words"]):
                    self._leave(*json.loads(self._store.get("last_words")))
                beat = self._store.get(f"beat/{self._watched}")
                if beat != seen:
                    seen, since = beat, time.monotonic()
                elif beat != _DONE and time.monotonic() - since > self.seconds:
                    name = self._store.get(f"name/{self._watched}").decode()
                    words = f"{name} has given no sign for {self.seconds} s: it was killed or its node is gone"
                    self._store.set("last_words", json.dumps([LOST, words]))
                    self._leave(LOST, words)
            if self._last_words:
                self._store.set("last_words", self._last_words)
            self._store.set(f"beat/{dist.rank()}", _DONE.decode())
        except torch_dist.DistError as error:
            first = str(error).splitlines()[0]
            self._leave(LOST, f"rank 0 at {os.environ['MASTER_ADDR']} is gone ({first})")

    def _guard(self) -> None:
        """Leave when the watch itself has stood still: the store of a node that is cut off sends no answer."""
        while not self._over.wait(self._interval):
            if time.monotonic() - self._round > self.seconds + 2 * self._interval:
                self._end(LOST, f"rank 0 at {os.environ['MASTER_ADDR']} has not answered for {self.seconds} s")

    def _leave(self, code: int, reason: str) -> None:
        """End this process from the watching thread, unless it is just leaving by itself: ranks fail together."""
        if not self._stopping.wait(2 * self._interval):
            self._end(code, reason)

    def _end(self, code: int, reason: str) -> None:
        again = " Run again with --resume auto." if code == LOST else ""
        print(f"error: {reason}.{again}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        ranks.note_exit(code)
        os._exit(code)  # the main thread may wait in a collective operation for ever

    def _wait_for_others(self, seconds: float) -> None:
        beats = [f"beat/{rank}" for rank in range(dist.world_size())]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(beat != _DONE for beat in self._store.multi_get(beats)):
            time.sleep(self._interval / 10)


def is_communication_error(error: BaseException) -> bool:
    """True for what a collective operation raises when another rank has gone; a ``UsageError`` may name gloo too."""
    if isinstance(error, UsageError):
        return False
    signs = ("gloo", "NCCL", "Connection reset", "Connection closed")
    return isinstance(error, torch_dist.DistError) or any(sign in str(error) for sign in signs)
