"""Examine all nodes at once, over ssh or on this machine, with a hard limit for each: none delays the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unlearn_ds.preflight.findings import Finding, fail, skipped, warn
from unlearn_ds.preflight.hostfile import handed_over
from unlearn_ds.preflight.node import MARK, Report, from_json

CONNECT_SECONDS = 5
FIRST_SECONDS = 15.0
"""For connecting and every check of one node."""
LOOK_SECONDS = 5.0
"""For what is looked at once all nodes are there."""
NUM_CLOCK_READINGS = 3
MEASURE_SECONDS = 90.0
"""For importing torch, forming a group and measuring the network."""

_FAILURES = (
    ("Connection refused", "ssh: connection refused, so no sshd listens there",
     "start it (systemctl start ssh), or give --ssh_port"),
    ("Could not resolve hostname", "ssh: the name is not known here", "put it into DNS, /etc/hosts or ~/.ssh/config"),
    ("Host key verification failed", "ssh: its host key is not the one known here, or none is",
     "compare the key, then ssh-keygen -R HOST and ssh-keyscan HOST >> ~/.ssh/known_hosts"),
    ("Permission denied", "ssh: login refused", "ssh-copy-id HOST: launchers log in by key, without a password"),
    ("No route to host", "unreachable: no route to host", "check that it is up and in this network"),
    ("Network is unreachable", "unreachable: no network leads there", "check routes and interfaces here"),
    ("during banner exchange", "ssh: its sshd takes the connection and says nothing",
     "restart it, and check the load of the node"),
    ("timed out", f"unreachable: no answer within {CONNECT_SECONDS} s", "check that it is up, its address, firewalls"),
    ("No module named", "its Python lacks this package", "use one environment at the same path on all nodes"),
    ("can't cd", "it has no such working directory", "put the project at one path on all nodes, or on a shared disk"),
    ("No such file or directory", "a path of this machine is missing there",
     "put project and environment at the same path on all nodes, or on a shared disk"),
)  # fmt: skip
"""Part of what ssh or the shell wrote, what it means, and what to do; the first that fits."""


class Place(NamedTuple):
    """How to reach a node: by ssh under its name, or on this machine."""

    node: str
    by_ssh: bool
    ssh_port: int | None = None

    def command(self, words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
        """The command line that runs ``words`` there, in the working directory of this process."""
        given = [f"{name}={value}" for name, value in environment.items()]
        line = f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join([*given, *words])}"
        if not self.by_ssh:
            return ["sh", "-c", line]
        port = ["-p", str(self.ssh_port)] if self.ssh_port else []
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
        return ["ssh", *options, *port, self.node, line]


class Silent(Exception):
    """A node that has not answered; ``finding`` says why."""

    def __init__(self, finding: Finding):
        super().__init__(finding.seen)
        self.finding = finding


class Talk:
    """Questions to one node and its answers."""

    def __init__(self, place: Place):
        self.place, self._doing, self._others = place, "connecting", [""]
        self._process: asyncio.subprocess.Process | None = None
        self._errors: asyncio.Task[bytes] | None = None

    async def start(self) -> None:
        environment = handed_over()
        # The rest travels with the order: a command line can be read by every user of the node.
        of_python = {name: value for name, value in environment.items() if name.startswith("PYTHON")}
        words = [sys.executable, "-u", "-m", "unlearn_ds.doctor", "--node"]
        self._process = await asyncio.create_subprocess_exec(
            *self.place.command(words, of_python), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, start_new_session=True, limit=2**24,
        )  # fmt: skip
        self._errors = asyncio.create_task(self._process.stderr.read())

    async def ask(self, question: dict[str, Any], key: str, deadline: float) -> Any:
        """The value of the first answer that has ``key``; raises ``Silent`` at the deadline (of ``time.monotonic``)."""
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                with contextlib.suppress(ConnectionError):  # what it has written tells more
                    self._process.stdin.write(json.dumps(question).encode() + b"\n")
                    await self._process.stdin.drain()
                while line := await self._process.stdout.readline():
                    text = line.decode(errors="replace").rstrip()
                    if not text.startswith(MARK):
                        self._others = [*self._others[-20:], text]
                        continue
                    answer = json.loads(text.removeprefix(MARK))
                    self._doing = answer.get("doing", self._doing)
                    if key in answer:
                        return answer[key]
                raise Silent(self._explained((await self._errors).decode(errors="replace"), await self._process.wait()))
        except TimeoutError:
            raise Silent(self._late()) from None

    def _late(self) -> Finding:
        if self._doing == "connecting":
            return fail(
                "no answer: connecting or starting Python there takes too long",
                f"try: ssh {self.place.node} {sys.executable} -V; check the load of the node and its disks",
            )
        return fail(
            f"no answer: it hangs while looking at '{self._doing}'",
            "log in and look: a disk or a driver there does not answer (df, nvidia-smi, dmesg)",
        )

    def _explained(self, errors: str, code: int) -> Finding:
        for part, seen, do in _FAILURES:
            if part in errors:
                return fail(seen, do.replace("HOST", self.place.node))
        lines = [line for line in (*errors.splitlines(), *self._others) if line.strip()]
        what = "ssh" if self.place.by_ssh else "its examination"
        return fail(
            f"{what} ended with exit code {code}: {lines[-1].strip() if lines else 'it said nothing'}",
            f"try by hand: ssh {self.place.node} hostname",
        )

    async def close(self) -> None:
        """End the examination there and every process of it here, at once if it does not end by itself."""
        if self._process is None:
            return
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        self._errors.cancel()


class Order(NamedTuple):
    """What nodes are examined for. ranks: of each node. master: address of the main rank's node, if it is given."""

    flags: dict[str, Any]
    places: list[Place]
    ranks: list[int]
    master: str | None
    port: int | None


class Examined(NamedTuple):
    """A report of each node, in the order of the places; of one that does not answer, that finding alone. measured: of
    the network, as ``group.Measured`` has it, or a finding why there is nothing; None when nobody asked."""

    reports: list[Report]
    measured: dict[str, Any] | Finding | None


def examine(order: Order, measure: bool = False) -> Examined:
    return asyncio.run(_examine(order, measure))


async def _examine(order: Order, measure: bool) -> Examined:
    talks, token = [Talk(place) for place in order.places], secrets.token_hex(4)
    deadline = time.monotonic() + FIRST_SECONDS
    try:
        reports = await asyncio.gather(*(_first(order, n, talk, token, deadline) for n, talk in enumerate(talks)))
        there = [n for n, report in enumerate(reports) if report.facts]
        if len(order.places) > 1:
            question = {"ask": "look", "tokens": there, "master": _master(order, reports)}
            looked = await asyncio.gather(*(_look(talks[n], reports[n], question) for n in there))
            reports = [*reports]
            for n, report in zip(there, looked, strict=True):
                reports[n] = report
        measured = await _measure([talks[n] for n in there], [reports[n] for n in there], order) if measure else None
        return Examined(list(reports), measured)
    finally:
        await asyncio.gather(*(talk.close() for talk in talks))


async def _first(order: Order, index: int, talk: Talk, token: str, deadline: float) -> Report:
    nodes = [place.node for place in order.places]
    question = {
        "ask": "order", "flags": order.flags, "nodes": nodes, "index": index, "ranks": order.ranks[index],
        "master": order.master, "port": order.port, "token": token, "environment": handed_over(),
    }  # fmt: skip
    try:
        await talk.start()
        await talk.ask(question, "ready", deadline)
        readings = [await _clock(talk, deadline) for _ in range(NUM_CLOCK_READINGS)]
        report = from_json(await talk.ask({"ask": "examine"}, "report", deadline))
    except Silent as silent:
        return Report(nodes[index], [silent.finding._replace(check="reach", node=nodes[index])], {})
    except FileNotFoundError as error:
        missing = fail(f"no program '{error.filename}' here", "apt-get install openssh-client")
        return Report(nodes[index], [missing._replace(check="reach", node=nodes[index])], {})
    return report._replace(
        node=nodes[index],
        findings=[finding._replace(node=nodes[index]) for finding in report.findings],
        skew=min(readings, key=lambda reading: reading[1]),
    )


async def _clock(talk: Talk, deadline: float) -> tuple[float, float]:
    """Seconds by which the node's clock is ahead of ours, and half the round trip: the most that this may be wrong."""
    sent, began = time.time(), time.monotonic()
    theirs = await talk.ask({"ask": "time"}, "time", deadline)
    half = (time.monotonic() - began) / 2
    return theirs - (sent + half), half


def _master(order: Order, reports: Sequence[Report]) -> tuple[str, int] | None:
    """Where the main node listens during the examination: nowhere, when it cannot or has not answered."""
    held = any(finding.check == "port" and finding.status == "ok" for finding in reports[0].findings)
    address = order.master or reports[0].address
    return (address, order.port) if held and address and order.port else None


async def _look(talk: Talk, report: Report, question: dict[str, Any]) -> Report:
    try:
        answer = await talk.ask(question, "look", time.monotonic() + LOOK_SECONDS)
    except Silent as silent:
        return report._replace(findings=[*report.findings, silent.finding._replace(check="reach", node=report.node)])
    reach = Finding(*answer["reach"]) if answer["reach"] else None
    return report._replace(sees=answer["sees"], reach=reach)


async def _measure(talks: list[Talk], reports: list[Report], order: Order) -> dict[str, Any] | Finding:
    """All-reduce among one rank of each node that has answered."""
    if len(talks) < 2:
        return skipped("one node")
    address, port = order.master or reports[0].address, reports[0].free_port
    deadline = time.monotonic() + MEASURE_SECONDS
    if not address:
        return warn("not measured: the main node has no address but its loopback", "give --master_addr")
    ask = {"ask": "measure", "seconds": int(MEASURE_SECONDS)}
    group = {
        "WORLD_SIZE": str(len(talks)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }  # fmt: skip
    questions = [{**ask, "environment": {**group, "RANK": str(rank)}} for rank in range(len(talks))]
    asked = (talk.ask(question, "measured", deadline) for talk, question in zip(talks, questions, strict=True))
    answers = await asyncio.gather(*asked, return_exceptions=True)
    for report, answer in zip(reports, answers, strict=True):
        if isinstance(answer, Silent):
            return answer.finding._replace(node=report.node)
        if isinstance(answer, BaseException):
            raise answer
    return answers[0]
