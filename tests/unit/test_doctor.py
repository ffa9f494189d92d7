"""The doctor's short form before a run, and what is compared once all ranks are there."""

import socket
import subprocess
import sys
import time

import pytest

from unlearn_ds import arguments, dist, doctor
from unlearn_ds.config import UsageError, replace
from unlearn_ds.preflight import findings


@pytest.fixture
def config(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT",
                 "HF_HUB_OFFLINE"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    (tmp_path / "ops" / "cpu_adam").mkdir(parents=True)
    return arguments.parse({"output_dir": str(tmp_path / "out"), "model": "org/name"})


def test_a_run_without_problems_says_nothing(config, capsys):
    doctor.before_run(config)
    assert capsys.readouterr().out == ""


def test_all_problems_are_told_at_once_and_no_other_rank_repeats_them(config, tmp_path, monkeypatch):
    (tmp_path / "ops" / "cpu_adam" / "lock").touch()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with pytest.raises(UsageError) as raised:
        doctor.before_run(config)
    lines = str(raised.value).splitlines()
    assert len(lines) == 2 and f"rm {tmp_path / 'ops' / 'cpu_adam' / 'lock'}" in lines[0] and "org/name" in lines[1]
    monkeypatch.setenv("LOCAL_RANK", "1")
    doctor.before_run(config)


def test_the_main_rank_refuses_a_busy_port_and_torchruns_agent_may_have_it(config, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_SIZE", "1"), ("MASTER_PORT", str(port))):
            monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match=f"{socket.gethostname()}: port {port} is busy"):
            doctor.before_run(config)
        # Two runs on the GPUs of one machine: deepspeed gives a single rank the same port too.
        monkeypatch.setenv("WORLD_SIZE", "1")
        with pytest.raises(UsageError, match=f"^port {port} is busy"):
            doctor.before_run(config)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        doctor.before_run(config)


def test_a_problem_of_one_of_several_nodes_is_told_on_all_once_they_have_met(config, tmp_path, monkeypatch):
    """A node that left before would be waited for."""
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_SIZE", "2"), ("HF_HUB_OFFLINE", "1"),
                        ("HF_HOME", str(tmp_path / "hf"))):  # fmt: skip
        monkeypatch.setenv(name, value)
    problems = doctor.before_run(config)
    assert len(problems) == 1 and problems[0].startswith(f"{socket.gethostname()}: ") and "org/name" in problems[0]
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    monkeypatch.setattr(dist, "local_world_size", lambda: 2)
    monkeypatch.setattr(dist, "gather_objects", lambda mine: [[], [], problems, []])
    with pytest.raises(UsageError, match="org/name"):
        doctor.same_on_all_ranks(config, [])


def test_warnings_are_a_line_each(config, monkeypatch, capsys):
    warning = findings.warn("little of it", "get more")
    monkeypatch.setattr(doctor, "go_through", lambda table, subject: [warning, findings.ok("fine")])
    doctor.before_run(config)
    assert capsys.readouterr().out == "warning     little of it; get more\n"


def test_the_short_form_takes_less_than_a_third_of_a_second(config):
    doctor.before_run(config)  # imports what it needs
    took = []
    for _ in range(5):
        began = time.process_time()
        doctor.before_run(config)
        took.append(time.process_time() - began)
    assert min(took) < 0.3


def test_a_node_answers_without_torch():
    code = (
        "import sys, unlearn_ds.doctor; from unlearn_ds.registry import *; from unlearn_ds.registry import resolve\n"
        "tables = QUICK_CHECKS | NODE_CHECKS | LAUNCH_CHECKS | NODE_FACTS | CLUSTER_CHECKS\n"
        "print(len([resolve('check', n, tables) for n in tables]), {'torch', 'transformers', 'fire'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, _, modules = done.stdout.strip().partition(" ")
    assert int(count) > 20 and modules == "set()"


def test_what_differs_among_nodes_is_told_with_the_nodes():
    usual = {"torch": "2.13", "--seed": "0"}
    told = [("n1", usual), ("n2", {**usual, "torch": "2.12"}), ("n3", {"torch": "2.13"})]
    assert doctor.differing(told) == ["torch is 2.13 on n1 n3, 2.12 on n2", "--seed is 0 on n1 n2, none on n3"]
    assert doctor.differing(told[:1] * 3) == []


def test_ranks_of_two_nodes_that_differ_all_leave_with_the_difference(config, monkeypatch):
    """The gathering itself is torch's; here the other node answers what it is told to."""
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "local_world_size", lambda: 1)
    told = []
    monkeypatch.setattr(dist, "gather_objects", lambda mine: told.append(mine) or [mine, mine])
    doctor.same_on_all_ranks(config)
    (host, values), others = told[-1], {**told[-1][1], "--seed": "5"}
    assert host == socket.gethostname() and values["torch"] and values["code"]
    monkeypatch.setattr(dist, "gather_objects", lambda mine: [mine, ("n2", others)] if mine else [[], []])
    with pytest.raises(UsageError, match=rf"not alike: --seed is 0 on {host}, 5 on n2"):
        doctor.same_on_all_ranks(config)


@pytest.mark.slow
def test_the_memory_plan_is_that_of_the_dry_run(tiny_model_dir, config, monkeypatch):
    """Slow for the libraries that it imports."""
    from unlearn_ds import sizing

    monkeypatch.setenv("WORLD_SIZE", "2")
    of_model = replace(config, **{"model.path": str(tiny_model_dir), "engine.ds_config": "zero3"})
    found = doctor.planned(of_model, {"model.path", "engine.ds_config"})
    plan = sizing.plan_of(of_model, sizing.machine(of_model))
    assert 0 < found.device_states < found.device and found.host > 0 and not found.missing
    assert (found.device, found.host) == (plan.peak("device"), plan.peak("host"))
    assert "not on this machine" in doctor.planned(config, set()).missing


def test_the_help_names_every_flag_of_its_own():
    assert all(f"--{name}" in doctor.HELP for name in doctor.Options._fields)
