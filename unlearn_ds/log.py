"""What the user sees and what scripts read: console, metrics.jsonl, TensorBoard; and silence for what helps nobody."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_QUIET_LOGGERS = ("DeepSpeed", "sacrebleu", "transformers", "torch.distributed", "sentence_transformers", "absl")


def quiet() -> None:
    """Silence third-party warnings that a user can do nothing about.

    Call before deepspeed is imported, for what it says while it looks for a device, and once more after, because it
    sets the level of its logger on import.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|deepspeed|transformers|trl|accelerate)\..*")
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # It logs what it then raises, and we tell what it raised.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)


def is_main() -> bool:
    """True in the process that talks to the user; every launcher sets RANK."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print one line for the user, once for all ranks."""
    if is_main():
        console().print(text, markup=False, highlight=False, soft_wrap=True)


def console():
    """The terminal; plain text where there is none."""
    from rich.console import Console

    return Console()


class MetricsLog:
    """``metrics.jsonl`` and TensorBoard scalars of one run; only the main rank writes.

    On resume the lines after the checkpoint's step are cut, so that a step never stands there twice.
    """

    def __init__(self, folder: Path | None, tensorboard: bool, first_step: int = 0):
        self._file = self._board = None
        if folder is None or not is_main():
            return
        path = folder / "metrics.jsonl"
        kept = []
        if first_step and path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= first_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one step; numbers also go to TensorBoard under their names."""
        if self._file is None:
            return
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        self.scalars("train", values, values["step"])

    def scalars(self, group: str, values: Mapping[str, Any], step: int) -> None:
        """Write every number of ``values`` to TensorBoard as ``group/name``."""
        if self._board is None:
            return
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
                self._board.add_scalar(f"{group}/{name}", value, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> int:
    """Step of a line; a line cut short by a crash counts as later than any step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return 2**63


class Progress:
    """A progress bar with the three losses and the time left; silent on other ranks and when switched off."""

    def __init__(self, total: int, start: int, label: str, shown: bool):
        self._bar = None
        if shown and is_main():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, desc=label, unit="step", dynamic_ncols=True, mininterval=0.5)

    def update(self, losses: Mapping[str, float], total: int) -> None:
        if self._bar is not None:
            self._bar.total = total
            self._bar.set_postfix({name: f"{value:.3g}" for name, value in losses.items()}, refresh=False)
            self._bar.update(1)

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            say(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class StopSignal:
    """Once it watches, SIGTERM, SIGUSR1 and SIGINT are noted instead of obeyed: ``asked`` turns true, and the loop
    ends its next step, saves and leaves. One more acts as usual once ``PATIENCE`` seconds have gone by: a signal to a
    whole group of processes arrives twice, from the sender and handed on by the launcher."""

    PATIENCE = 5.0
    _SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.asked = False
        self._first = math.inf

    def watch(self) -> StopSignal:
        """Start to note signals."""
        self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def unwatch(self) -> None:
        """Let signals act as they did before: there is nothing left to save."""
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, _frame: object) -> None:
        if time.monotonic() - self._first > self.PATIENCE:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        if not self.asked and is_main():
            # Not print: the signal may have come in the middle of one, which a buffered stream answers with an error.
            os.write(1, b"\nsignal      noted: the state is saved after this step; again in 5 s to end at once\n")
        self.asked, self._first = True, min(self._first, time.monotonic())
