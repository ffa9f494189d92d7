"""Nodes behind an ssh that fails in every way ssh does, or runs what it is given on this machine."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unlearn_ds.config import UsageError
from unlearn_ds.doctor import main
from unlearn_ds.preflight import network, remote
from unlearn_ds.preflight.remote import Order, Place

REPOSITORY = Path(__file__).parents[3]
SSH = """#!/bin/sh
# Options come in pairs; then the host, then the command line.
while [ "${1#-}" != "$1" ]; do echo "$1 $2" >> OPTIONS; shift 2; done
host=$1; shift
case $host in
  refused) echo "ssh: connect to host refused port 22: Connection refused" >&2; exit 255;;
  gone) echo "ssh: connect to host gone port 22: No route to host" >&2; exit 255;;
  silent) echo "ssh: connect to host silent port 22: Connection timed out" >&2; exit 255;;
  frozen) echo "Connection timed out during banner exchange" >&2; exit 255;;
  unknown) echo "ssh: Could not resolve hostname unknown: Name or service not known" >&2; exit 255;;
  locked) echo "root@locked: Permission denied (publickey,password)." >&2; exit 255;;
  changed) echo "Host key verification failed." >&2; exit 255;;
  empty) cd / && exec sh -c 'cd /no/such/folder && true';;
  odd) echo "kex_exchange_identification: banner line too long" >&2; exit 255;;
  hangs) exec sleep 60;;
  stuck) exec env STUCK=1 sh -c "$*";;
  chatty*) echo "Welcome!"; echo "{not json";;
  old*) exec sh -c "$(echo "$*" | sed "s#PYTHONPATH=#PYTHONPATH=OLD:#")";;
esac
exec sh -c "$*"
"""


@pytest.fixture
def ssh(tmp_path, clean):
    """Put the ssh above on the path; in its ``old`` nodes another release of transformers is installed."""
    old = tmp_path / "old" / "transformers-4.0.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "ssh"
    script.write_text(SSH.replace("OLD", str(old.parent)).replace("OPTIONS", str(tmp_path / "options")))
    script.chmod(0o755)
    clean.setenv("PATH", f"{script.parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    clean.setenv("PYTHONPATH", str(REPOSITORY))
    outside = [name for name, address in network.interfaces().items() if address and not address.startswith("127.")]
    clean.setenv("GLOO_SOCKET_IFNAME", outside[0] if outside else "lo")
    return tmp_path


def examine(*names, port=None, master=None, by_ssh=True, **flags):
    """Reports by name of nodes behind that ssh."""
    flags = {"output_dir": "out", "model": "org/name", **flags}
    order = Order(flags, [Place(name, by_ssh) for name in names], [1] * len(names), master, port)
    return {report.node: report for report in remote.examine(order).reports}


@pytest.mark.parametrize(
    ("host", "seen", "do"),
    [
        ("refused", "connection refused, so no sshd listens", "systemctl start ssh"),
        ("gone", "no route to host", "is up"),
        ("silent", "no answer within 5 s", "firewalls"),
        ("frozen", "takes the connection and says nothing", "load"),
        ("unknown", "name is not known", "/etc/hosts"),
        ("locked", "login refused", "ssh-copy-id locked"),
        ("changed", "host key", "ssh-keygen -R changed"),
        ("empty", "no such working directory", "shared disk"),
        ("odd", "exit code 255: kex_exchange_identification: banner line too long", "ssh odd hostname"),
    ],
)
def test_each_way_in_which_ssh_fails_is_told_by_name(ssh, host, seen, do):
    (finding,) = examine(host)[host].findings
    assert (finding.check, finding.node, finding.status) == ("reach", host, "fail")
    assert seen in finding.seen and do in finding.do


def test_good_nodes_answer_whatever_happens_to_others(ssh):
    reports = examine("chatty", "refused", "old1", "plain", port=_free(), master="127.0.0.1")
    assert [report.facts != {} for report in reports.values()] == [True, False, True, True]
    assert reports["old1"].facts["software"]["transformers"] == "4.0.0"
    assert reports["plain"].facts["software"]["transformers"] != "4.0.0"
    assert all(reports[name].sees == [0, 2, 3] for name in ("chatty", "old1", "plain"))
    assert all(reports[name].reach.status == "ok" for name in ("chatty", "old1", "plain"))
    assert all(abs(reports[name].skew[0]) <= reports[name].skew[1] + 0.05 for name in ("chatty", "old1", "plain"))
    assert not list(ssh.glob(".doctor*")) and not (ssh / "out").exists()
    options = (ssh / "options").read_text()
    assert "-o BatchMode=yes" in options and "-o ConnectTimeout=5" in options


def _free():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def test_a_node_that_hangs_says_where_and_is_ended_with_its_processes(ssh, monkeypatch):
    """One before its Python starts, one in a check, as df does on a disk whose server is gone."""
    monkeypatch.setattr(remote, "FIRST_SECONDS", 5.0)
    monkeypatch.delenv("DS_ACCELERATOR")
    (ssh / "bin" / "nvidia-smi").write_text('#!/bin/sh\n[ -z "$STUCK" ] || exec sleep 60\nexit 9\n')
    (ssh / "bin" / "nvidia-smi").chmod(0o755)
    began = time.monotonic()
    reports = examine("hangs", "stuck", "plain")
    assert time.monotonic() - began < 12 and reports["plain"].facts
    assert "connecting or starting Python" in reports["hangs"].findings[0].seen
    assert "it hangs while looking at 'GPUs'" in reports["stuck"].findings[0].seen
    assert {report.findings[0].check for name, report in reports.items() if name != "plain"} == {"reach"}
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if _command(p) == b"sleep\x0060\x00"]
    assert not [p for p in left if _of_this_test(p)]


def _command(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _of_this_test(path):
    try:
        return b"UNLEARN_DS_CACHE=" + os.environ["UNLEARN_DS_CACHE"].encode() in (path.parent / "environ").read_bytes()
    except OSError:
        return False


def test_a_busy_port_is_the_main_nodes_to_tell(ssh):
    with network.listen(0) as server:
        reports = examine("plain", "other", port=server.getsockname()[1])
    of_port = {name: f.status for name, report in reports.items() for f in report.findings if f.check == "port"}
    assert of_port == {"plain": "fail", "other": "skipped"}
    assert all(report.reach is None for report in reports.values())


def test_without_ssh_this_machine_is_examined_in_the_same_way(ssh):
    (report,) = examine("here", by_ssh=False).values()
    assert report.facts and not (ssh / "options").exists()
    assert {"flags", "free disk", "packages"} <= {finding.check for finding in report.findings}


def test_a_missing_ssh_is_told(ssh, monkeypatch):
    monkeypatch.setenv("PATH", str(ssh / "nowhere"))
    assert "no program 'ssh'" in examine("plain")["plain"].findings[0].seen


def test_a_flag_that_a_node_cannot_read_is_its_failure(ssh):
    found = examine("plain", max_steps="many")["plain"].findings
    assert [(f.check, f.status) for f in found] == [("flags", "fail")] and "--max_steps" in found[0].seen


def doctor(folder, *words):
    """The command itself, with a hub that answers."""
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as hub:
        done = subprocess.run(
            [sys.executable, "-m", "unlearn_ds.doctor", *map(str, words)], cwd=folder, capture_output=True, text=True,
            env={**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}"}, timeout=60,
        )  # fmt: skip
    assert time.monotonic() - began < 30 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_the_command_names_node_and_fault_and_ends_with_2(ssh):
    (ssh / "hosts").write_text("plain slots=1\n\n# the rest\nrefused slots=1\nold1 slots=1\n")
    lock = ssh / "TORCH_EXTENSIONS_DIR" / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    with network.listen(0) as server:
        port = server.getsockname()[1]
        done = doctor(
            ssh, "--hostfile", "hosts", "--scenario", "hallucination", "--model", "org/name", "--master_port", port
        )
    assert done.returncode == 2, done.stdout
    failing = [line.split() for line in done.stdout.splitlines() if line.startswith("fail")]
    assert {("reach", "refused"), ("port", "plain")} <= {(words[1], words[2]) for words in failing}
    assert f"rm {lock}" in done.stdout and f"port {port} is busy" in done.stdout
    assert any(words[1:4] == ["same", "software", "old1"] and "4.0.0" in words for words in failing)


@pytest.mark.slow
def test_the_command_ends_with_0_where_all_is_well_and_speaks_json(ssh):
    (ssh / "hosts").write_text("plain slots=1\nother slots=1\n")
    flags = ["--hostfile", "hosts", "--model", "org/name", "--master_addr", "127.0.0.1", "--master_port", _free()]
    if os.environ["GLOO_SOCKET_IFNAME"] == "lo":
        pytest.skip("this machine has no network, so no run of several nodes could start here")
    done = doctor(ssh, *flags, "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["exit_code"] == 0, done.stdout
    assert set(told["nodes"]) == {"plain", "other"} and told["nodes"]["plain"]["software"]["python"]
    assert {finding["status"] for finding in told["findings"]} == {"ok", "skipped", "warn"}


@pytest.mark.parametrize(
    ("words", "flags", "expected"),
    [
        ((), {"hostfile": "nowhere"}, "no such file: nowhere"),
        ((), {"master_port": "70000"}, "--master_port"),
        ((), {"scenari": "harmful"}, "--scenario"),
        ((), {"json": "maybe"}, "true or false"),
        (("hosts",), {}, "unexpected 'hosts'"),
    ],
)
def test_a_wrong_flag_of_the_command_is_told_before_any_node_is_asked(ssh, words, flags, expected):
    with pytest.raises(UsageError, match=expected):
        main(*words, **flags)
    assert not (ssh / "options").exists()


def test_a_mistake_on_the_command_line_is_one_sentence_and_exit_code_2(ssh):
    done = doctor(ssh, "--hostfile", "nowhere")
    assert done.returncode == 2 and done.stderr == "error: --hostfile: no such file: nowhere\n" and not done.stdout
