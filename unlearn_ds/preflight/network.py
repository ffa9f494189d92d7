"""The interface that collectives will use, the main rank's port, and reaching it from every node."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import subprocess
from contextlib import closing
from pathlib import Path

from unlearn_ds.preflight.findings import Finding, Subject, fail, listed, ok, on_cpu, skipped, warn

SECONDS = 3.0
"""Of one attempt to connect to the main rank's node."""
DEFAULT_PORT = 29500
"""DeepSpeed's and torchrun's."""
_SIOCGIFADDR, _SIOCGIFFLAGS, _IFF_UP = 0x8915, 0x8913, 1  # linux/sockios.h, linux/if.h
_LISTEN = "0A"  # state in /proc/net/tcp


def interfaces() -> dict[str, str]:
    """Name -> IPv4 address of each interface that is up; "" where it has only other addresses."""
    found = {}
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as asker:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            flags = struct.unpack_from("H", fcntl.ioctl(asker, _SIOCGIFFLAGS, request), 16)[0]
            if not flags & _IFF_UP:
                continue
            try:
                found[name] = socket.inet_ntoa(fcntl.ioctl(asker, _SIOCGIFADDR, request)[20:24])
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                found[name] = ""
    return found


def interface(subject: Subject) -> Finding:
    """Which interface gloo (on CPUs) or NCCL (on GPUs) will use: the named one, or the one they will find."""
    if not subject.several_nodes:
        return skipped("one node")
    library, variable = ("gloo", "GLOO_SOCKET_IFNAME") if on_cpu() else ("NCCL", "NCCL_SOCKET_IFNAME")
    there, named = interfaces(), os.environ.get(variable)
    if named:
        return judged_name(library, variable, named, there)
    if library == "gloo":
        return _found_for_gloo(variable, there, own_addresses(), subject.master)
    others = [name for name in there if name != "lo" and not name.startswith(("docker", "veth", "br-", "virbr"))]
    if len(others) > 1:
        return warn(
            f"NCCL will choose among {listed(others)}",
            f"export {variable}={towards(subject.master, there) or others[0]} if it takes the wrong one",
        )
    if not others:
        return fail("no interface but the loopback is up", "bring the network of this node up")
    return ok(f"{others[0]} ({there[others[0]]}), the only one")


def judged_name(library: str, variable: str, named: str, there: dict[str, str]) -> Finding:
    """The finding of a value of ``*_SOCKET_IFNAME``. NCCL takes prefixes, ``=exact`` and ``^all but``; gloo names."""
    excluded, exact = named.startswith("^"), named.startswith("=") or library == "gloo"
    wanted = [name for name in named.lstrip("^=").split(",") if name]
    matching = [n for n in there if any(n == w if exact else n.startswith(w) for w in wanted) != excluded]
    matching = [name for name in matching if name != "lo" or "lo" in wanted]
    if not matching:
        return fail(
            f"{variable}={named} names no interface that is up here ({listed(list(there))})",
            f"set {variable} to one of them; nodes whose interfaces have different names need a value each",
        )
    if there[matching[0]].startswith("127."):
        return fail(f"{variable}={named} is the loopback, which reaches no other node", f"set {variable} to another")
    return ok(f"{matching[0]} ({there[matching[0]] or 'IPv6'}), by {variable}")


def _found_for_gloo(variable: str, there: dict[str, str], own: list[str], master: str | None) -> Finding:
    """A run lets gloo take the interface that leads to the main node (``ranks.choose_interface``); where that is the
    loopback, as on a node that has its own name there, gloo is left with the host name."""
    if master is None:  # the deepspeed runner will give an address that is not of the loopback
        outside = [name for name, address in there.items() if address and not address.startswith("127.")]
        name = outside[0] if outside else None
    else:
        leading = address_towards(master)
        name = next((n for n, a in there.items() if a == leading and not a.startswith("127.")), None)
    if name is None:
        return _found_by_host_name(variable, there, own, master)
    return ok(f"{name} ({there[name]}), towards the main node")


def own_addresses() -> list[str]:
    """IPv4 addresses that this machine's host name stands for; empty where it stands for none."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_STREAM)
    except socket.gaierror:
        return []
    return sorted({str(entry[4][0]) for entry in found})


def _found_by_host_name(variable: str, there: dict[str, str], own: list[str], master: str | None) -> Finding:
    """gloo listens where the host name points to; on the loopback, or on nothing of ours, no other node reaches it."""
    name, suggested = socket.gethostname(), towards(master, there)
    usable = [address for address in own if address in there.values() and not address.startswith("127.")]
    if usable:
        return ok(f"{next(n for n, a in there.items() if a == usable[0])} ({usable[0]}), where {name} points to")
    points = f"points to {listed(own)}" if own else "cannot be resolved"
    return fail(
        f"the host name {name} {points}, and gloo would listen there, out of reach of the other nodes",
        f"set {variable}={suggested or 'INTERFACE'} on every node (ssh: a line of .deepspeed_env)",
    )


def towards(master: str | None, there: dict[str, str]) -> str | None:
    """The interface that leads to the main rank's node: the one to suggest. Sends nothing."""
    outside = [name for name, address in there.items() if address and not address.startswith("127.")]
    leading = address_towards(master) if master else None
    return next((name for name in outside if there[name] == leading), outside[0] if outside else None)


def address_towards(host: str) -> str | None:
    """The address that this machine speaks to a host from; None where no route leads there. Sends nothing."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as asker:
        try:
            asker.connect((host, DEFAULT_PORT))
        except OSError:
            return None
        return str(asker.getsockname()[0])


def port(subject: Subject) -> Finding:
    """Whether the main rank will be able to listen on its port."""
    if subject.port is None or subject.index != 0:
        return skipped("not the node of the main rank, or no port is set yet")
    try:
        listen(subject.port).close()
    except OSError as error:
        return busy(subject.port, error)
    return ok(f"{subject.port} is free")


def busy(number: int, error: OSError) -> Finding:
    """The finding of a port that cannot be listened on."""
    if error.errno != errno.EADDRINUSE:
        return fail(f"port {number} cannot be listened on: {error}", "take a --master_port above 1024")
    holder = listener(number)
    return fail(
        f"port {number} is busy" + (f": {holder} listens there" if holder else ""),
        f"end that process, or take another, free now: --master_port {free_port()}",
    )


def listen(number: int) -> socket.socket:
    """A listening socket on every address, as torch's store opens it."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", number), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", number))


def free_port() -> int:
    with closing(listen(0)) as probe:
        return int(probe.getsockname()[1])


def listener(number: int) -> str | None:
    """Name and pid of the process that listens on a port; None where it is another user's."""
    sockets = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            words = line.split()
            if words[3] == _LISTEN and int(words[1].rpartition(":")[2], 16) == number:
                sockets.add(f"socket:[{words[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(descriptor) in sockets for descriptor in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:  # it has ended, or is another user's
            continue
    return None


def reach(address: str, number: int, seconds: float = SECONDS) -> Finding:
    """Whether a connection to the main rank's address and port comes about from here."""
    place = f"{address}:{number}"
    try:
        socket.create_connection((address, number), timeout=seconds).close()
    except socket.gaierror as error:
        return fail(f"the main node's name {address} is not known here ({error})", "give --master_addr as an address")
    except ConnectionRefusedError:
        return fail(
            f"{place} refuses connections from here", "--master_addr must be an address of the first node that is not "
            "its loopback",
        )  # fmt: skip
    except TimeoutError:
        return fail(
            f"{place} does not answer within {seconds:g} s from here",
            "open the firewall between the nodes, or give the --master_addr of a network that all share",
        )
    except OSError as error:
        return fail(f"{place} cannot be reached from here: {error.strerror}", "check routes and firewall of this node")
    return ok(f"{place} answers")


def first_address() -> str | None:
    """What DeepSpeed's runner takes as the address of the main node: the first of ``hostname -I``."""
    try:
        done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None)
