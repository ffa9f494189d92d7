"""metrics.jsonl across a resume, and signals that are noted."""

import json
import os
import signal

import pytest

from unlearn_ds import log


def write_steps(folder, steps, first_step=0):
    with log.MetricsLog(folder, False, first_step) as metrics:
        for step in steps:
            metrics.write({"step": step, "loss": float(step)})
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_one_line(tmp_path):
    assert write_steps(tmp_path, [1, 2, 3]) == [1, 2, 3]


def test_a_resumed_run_cuts_what_came_after_its_checkpoint(tmp_path):
    write_steps(tmp_path, [1, 2, 3, 4])
    assert write_steps(tmp_path, [3, 4, 5], first_step=2) == [1, 2, 3, 4, 5]


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path):
    write_steps(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert write_steps(tmp_path, [3], first_step=2) == [1, 2, 3]


def test_a_new_run_keeps_nothing(tmp_path):
    write_steps(tmp_path, [1, 2])
    assert write_steps(tmp_path, [1]) == [1]


def test_without_a_folder_and_on_other_ranks_nothing_is_written(tmp_path, monkeypatch):
    with log.MetricsLog(None, True) as metrics:
        metrics.write({"step": 1})
    monkeypatch.setenv("RANK", "1")
    with log.MetricsLog(tmp_path, True) as metrics:
        metrics.write({"step": 1})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_and_its_echo_are_noted_and_a_later_one_acts(number, monkeypatch):
    def act(*_):
        raise InterruptedError

    handlers = {n: signal.getsignal(n) for n in log.StopSignal._SIGNALS}
    try:
        signal.signal(number, act)
        stop = log.StopSignal().watch()
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
        os.kill(os.getpid(), number)  # the same signal once more, from the launcher
        monkeypatch.setattr(log.StopSignal, "PATIENCE", -1.0)
        with pytest.raises(InterruptedError):
            os.kill(os.getpid(), number)
            signal.getsignal(number)
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)
