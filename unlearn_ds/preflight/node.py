"""One node's part of an examination: it answers questions, one line of JSON each, until its input ends.

Lines go over the pipe of an ssh, or of a process here. What a login script prints in between carries no mark and is
passed over.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple, TextIO

from unlearn_ds import arguments
from unlearn_ds.config import UsageError
from unlearn_ds.preflight import disk, network
from unlearn_ds.preflight.findings import Finding, Subject, fail, go_through
from unlearn_ds.registry import NODE_CHECKS, NODE_FACTS, QUICK_CHECKS, resolve

MARK = "@doctor "
LIFE = 60
"""Seconds after which a node's part ends by itself, whatever it waits for."""


class Report(NamedTuple):
    """What a node has found. facts: subject -> name -> value, compared with those of other nodes.

    addresses: what the runner would take as the main node's address; a port that is free. skew: seconds by which its
    clock is ahead of the asker's, and how far that may be wrong. sees: nodes whose tokens lie in its output folder.
    """

    node: str
    findings: list[Finding]
    facts: dict[str, dict[str, str]]
    address: str | None = None
    free_port: int | None = None
    skew: tuple[float, float] | None = None
    sees: list[int] | None = None
    reach: Finding | None = None


def to_json(report: Report) -> dict[str, Any]:
    """Plain values of a report; ``from_json`` reads them."""
    return report._asdict()


def from_json(values: dict[str, Any]) -> Report:
    reach = values["reach"]
    return Report(**{
        **values, "findings": [Finding(*finding) for finding in values["findings"]],
        "skew": tuple(values["skew"]) if values["skew"] else None, "reach": Finding(*reach) if reach else None,
    })  # fmt: skip


def subject_of(order: dict[str, Any]) -> Subject:
    """The subject that an order describes; ``UsageError`` where its flags cannot be read on this node."""
    config = arguments.parse(order["flags"])
    nodes = tuple(order["nodes"])
    return Subject(config, nodes, order["index"], order["ranks"], order["master"], order["port"])


def examine(subject: Subject, doing: Callable[[str], None] = lambda name: None) -> Report:
    """All checks and facts of this node."""
    findings = go_through(QUICK_CHECKS | NODE_CHECKS, subject, doing)
    facts = {}
    for name, target in NODE_FACTS.items():
        doing(name)
        try:
            facts[name] = resolve("fact", name, {name: target})(subject)
        except (OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
            facts[name] = {}
            do = "look at it by hand"
            findings.append(Finding("warn", f"could not be looked at: {error}", do, name, subject.node))
    return Report(subject.node, findings, facts, network.first_address(), network.free_port())


class Examination:
    """The answers of one node to ``order``, ``time``, ``examine``, ``look`` and ``measure``."""

    def __init__(self, say: Callable[[dict[str, Any]], None]):
        self._say, self._left = say, ExitStack()
        self._subject: Subject | None = None
        self._token: disk.Token | None = None
        self._error = ""

    def answer(self, question: dict[str, Any]) -> None:
        answers = {
            "order": self._order, "time": self._time, "examine": self._examine, "look": self._look,
            "measure": self._measure,
        }  # fmt: skip
        answers[question["ask"]](question)

    def _order(self, question: dict[str, Any]) -> None:
        os.environ.update(question["environment"])
        try:
            self._subject = subject_of(question)
            self._token = disk.Token(self._subject, question["token"])
            self._left.callback(self._token.close)
        except (UsageError, OSError) as error:
            self._error = str(error)
        self._say({"ready": True})

    def _time(self, question: dict[str, Any]) -> None:
        self._say({"time": time.time()})

    def _examine(self, question: dict[str, Any]) -> None:
        if self._subject is None:
            finding = fail(self._error, "mend the flag or the file that it names")
            self._say({"report": to_json(Report("", [finding._replace(check="flags")], {}))})
            return
        report = examine(self._subject, lambda name: self._say({"doing": name}))
        if self._subject.index == 0 and self._subject.port is not None:
            report = self._hold_port(report, self._subject.port)
        self._say({"report": to_json(report)})

    def _hold_port(self, report: Report, port: int) -> Report:
        """Listen on the main rank's port, so that the other nodes can try to reach it."""
        try:
            self._left.enter_context(network.listen(port))
        except OSError:  # told by the check of the port
            return report
        return report

    def _look(self, question: dict[str, Any]) -> None:
        """What only shows once all nodes are there: their tokens, and the main node's port."""
        indices, deadline = question["tokens"], time.monotonic() + 2.0
        sees = self._token.seen(indices) if self._token else []
        while self._token and len(sees) < len(indices) and time.monotonic() < deadline:
            time.sleep(0.2)
            sees = self._token.seen(indices)
        reach = network.reach(*question["master"]) if question["master"] else None
        self._say({"look": {"sees": sees if self._token else None, "reach": reach}})

    def _measure(self, question: dict[str, Any]) -> None:
        """Be one rank of a measurement of the network; the group is named by the variables that torch reads."""
        signal.alarm(question["seconds"])
        os.environ.update(question["environment"])
        self._say({"doing": "bandwidth"})
        from unlearn_ds.preflight import group  # torch takes seconds to import

        self._say({"measured": group.measure_as_one_rank()})

    def __enter__(self) -> Examination:
        return self

    def __exit__(self, *_: object) -> None:
        self._left.close()


def serve(questions: TextIO = sys.stdin, answers: TextIO = sys.stdout) -> None:
    """Answer until the input ends: the asker is done with this node, or gone."""
    signal.alarm(LIFE)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, lambda *_: sys.exit(1))

    def say(values: dict[str, Any]) -> None:
        print(MARK + json.dumps(values), file=answers, flush=True)

    with Examination(say) as examination:
        for line in questions:
            if line.strip():
                examination.answer(json.loads(line))
