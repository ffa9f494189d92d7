"""Interfaces, the main rank's port and the way to it."""

import os
import socket
import subprocess
import sys

import pytest

from unlearn_ds.preflight import network

THERE = {"lo": "127.0.0.1", "eth0": "10.0.0.5", "eth1": "10.1.0.5", "ib0": "10.2.0.5", "v6": ""}


@pytest.mark.parametrize(
    ("library", "named", "expected"),
    [
        ("gloo", "eth0", "eth0 (10.0.0.5)"),
        ("gloo", "eth", None),
        ("gloo", "eth9,eth1", "eth1 (10.1.0.5)"),
        ("gloo", "v6", "v6 (IPv6)"),
        ("gloo", "lo", "loopback"),
        ("NCCL", "ib", "ib0 (10.2.0.5)"),
        ("NCCL", "=eth1", "eth1 (10.1.0.5)"),
        ("NCCL", "=eth", None),
        ("NCCL", "^eth,lo,v6", "ib0 (10.2.0.5)"),
        ("NCCL", "^docker", "eth0 (10.0.0.5)"),
    ],
)
def test_a_named_interface_is_understood_as_its_library_does(library, named, expected):
    found = network.judged_name(library, f"{library.upper()}_SOCKET_IFNAME", named, THERE)
    if expected is None:
        assert found.status == "fail" and f"_SOCKET_IFNAME={named}" in found.seen and "ib0" in found.seen
    else:
        assert found.status == ("fail" if expected == "loopback" else "ok") and expected in found.seen


@pytest.mark.parametrize("own", [["127.0.1.1"], [], ["10.9.9.9"]])
def test_a_host_name_that_leads_to_no_network_is_a_failure_with_the_variable_to_set(own):
    found = network._found_by_host_name("GLOO_SOCKET_IFNAME", THERE, own, None)
    assert found.status == "fail" and "GLOO_SOCKET_IFNAME=eth0" in found.do and socket.gethostname() in found.seen
    fine = network._found_by_host_name("GLOO_SOCKET_IFNAME", THERE, ["10.1.0.5"], None)
    assert fine.status == "ok" and "eth1 (10.1.0.5)" in fine.seen


@pytest.mark.parametrize(
    ("leading", "expected"),
    [("10.1.0.5", "eth1 (10.1.0.5), towards"), ("127.0.1.1", "GLOO_SOCKET_IFNAME"), (None, "set")],
)
def test_gloo_takes_the_interface_that_leads_to_the_main_node(monkeypatch, leading, expected):
    """On a node whose own name is the loopback in its hosts file the main node's name leads nowhere."""
    monkeypatch.setattr(network, "address_towards", lambda host: leading)
    found = network._found_for_gloo("GLOO_SOCKET_IFNAME", THERE, ["127.0.1.1"], "node1")
    assert found.status == ("ok" if leading == "10.1.0.5" else "fail") and expected in found.seen + found.do
    assert network._found_for_gloo("GLOO_SOCKET_IFNAME", THERE, ["127.0.1.1"], None).status == "ok"
    only = {"lo": "127.0.0.1"}
    assert network._found_for_gloo("GLOO_SOCKET_IFNAME", only, ["127.0.1.1"], None).status == "fail"


def test_the_address_towards_a_host_is_ours():
    assert network.address_towards("127.0.0.1") == "127.0.0.1"
    assert network.address_towards("no-such-host.invalid") is None


def test_interfaces_are_those_of_this_machine():
    assert network.interfaces()["lo"] == "127.0.0.1"
    assert set(network.interfaces()) <= {name for _, name in socket.if_nameindex()}


def test_interfaces_matter_among_several_nodes_only(clean, subject):
    assert network.interface(subject()).status == "skipped"
    clean.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    assert "nowhere0" in network.interface(subject(nodes=("a", "b"))).seen
    clean.delenv("DS_ACCELERATOR")
    clean.setattr(network, "on_cpu", lambda: False)
    clean.setattr(network, "interfaces", lambda: THERE)
    assert network.interface(subject(nodes=("a", "b"))).status == "warn"  # NCCL has a choice
    clean.setattr(network, "interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.5", "docker0": "172.17.0.1"})
    assert "eth0" in network.interface(subject(nodes=("a", "b"))).seen


def test_a_busy_port_is_named_with_the_process_that_has_it_and_a_free_one(subject):
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    port = int(holder.stdout.readline())
    try:
        found = network.port(subject(port=port))
        assert found.status == "fail" and f"port {port} is busy" in found.seen and f"pid {holder.pid}" in found.seen
        offered = int(found.do.rsplit(" ", 1)[1])
        assert offered != port and network.port(subject(port=offered)).status == "ok"
        assert network.port(subject(port=port, nodes=("a", "b"), index=1)).status == "skipped"
    finally:
        holder.communicate("\n")
    assert network.port(subject(port=port)).status == "ok"


def test_reaching_the_main_node_tells_refusal_silence_and_an_unknown_name_apart():
    with network.listen(0) as server:
        port = server.getsockname()[1]
        assert network.reach("127.0.0.1", port).status == "ok"
        assert network.reach("localhost", port).status == "ok"
    assert "refuses connections" in network.reach("127.0.0.1", port).seen
    assert "is not known here" in network.reach("no-such-host.invalid", port).seen


def test_a_main_node_that_never_answers_takes_no_longer_than_allowed():
    """A listener whose queue is full drops what comes, as a firewall does."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = server.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(address)
        found = network.reach(*address, seconds=0.3)
        for client in waiting:
            client.close()
    assert found.status == "fail" and "does not answer within 0.3 s" in found.seen


def test_the_first_address_is_that_of_the_runner():
    said = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    assert network.first_address() == (said[0] if said else None)
    assert os.path.exists("/proc/net/tcp")
