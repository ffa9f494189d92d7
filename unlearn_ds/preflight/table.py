"""One table of all findings: a line for what is fine everywhere, a line a node for what is not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from unlearn_ds.preflight.findings import STATUSES, Finding, size

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_WIDE = 4096
"""Columns where nobody looks at a terminal: a line of a file stays one line, for grep."""


def grouped(findings: Sequence[Finding]) -> list[Finding]:
    """Findings as lines: what is the same on several nodes once, with their number, and checks in their order.

    What was skipped is left to ``not_needed``."""
    lines = []
    for check in dict.fromkeys(finding.check for finding in findings):
        about = [finding for finding in findings if finding.check == check]
        for status in (status for status in STATUSES if status != "skipped"):
            some = [finding for finding in about if finding.status == status]
            if status in ("warn", "fail"):
                lines += some
            elif some:
                lines.append(_together(some, len(about)))
    return lines


def _together(some: list[Finding], num_all: int) -> Finding:
    """One line for harmless findings of one check; those that say the same are told once."""
    if len(some) == 1:
        return some[0]
    texts = [*dict.fromkeys(finding.seen for finding in some)]
    more = f" (and {len(texts) - 1} more like it)" if len(texts) > 1 else ""
    where = f"{len(some)} nodes" if len(some) == num_all else f"{len(some)} other nodes"
    return some[0]._replace(node=where, seen=texts[0] + more)


def not_needed(findings: Sequence[Finding]) -> str:
    """One line of the checks that no node needed, by reason."""
    looked_at = {finding.check for finding in findings if finding.status != "skipped"}
    checks_of: dict[str, list[str]] = {}
    for check, why in dict.fromkeys((f.check, f.seen) for f in findings if f.check not in looked_at):
        checks_of.setdefault(why, []).append(check)
    return "; ".join(f"{', '.join(checks)} ({why})" for why, checks in checks_of.items())


def show(findings: Sequence[Finding], measured: dict[str, Any] | None, summary: str) -> None:
    """Print the table, what was measured of the network, and one line that sums up."""
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else _WIDE, markup=False, highlight=False, emoji=False)
    with console.capture() as printed:
        _print(console, findings, measured, terminal)
    print("\n".join(line.rstrip() for line in printed.get().splitlines()))  # rich fills the last column with spaces
    print(summary, flush=True)


def _print(console: Console, findings: Sequence[Finding], measured: dict[str, Any] | None, terminal: bool) -> None:
    table = Table("", "check", "node", "seen, and what to do", box=None, pad_edge=False, header_style="bold")
    table.columns[3].overflow = "fold"
    for line in grouped(findings):
        text = line.seen + (f" -> {line.do}" if line.do else "")
        table.add_row(line.status, line.check, line.node, text, style=_COLOURS[line.status] if terminal else None)
    console.print(table)
    skipped = not_needed(findings)
    if skipped:
        console.print(f"skipped     {skipped}")
    if measured and "error" not in measured:
        console.print(f"all-reduce over {measured['backend']} among {measured['world_size']} ranks:")
        for num_bytes, seconds, bus in zip(measured["sizes"], measured["seconds"], measured["bus"], strict=True):
            console.print(f"  {_whole(num_bytes):>9}  {seconds * 1e3:10.2f} ms  busbw {bus / 1e9:9.3f} GB/s")


def _whole(num_bytes: int) -> str:
    return f"{num_bytes // 2**10} KiB" if num_bytes < 2**20 else size(num_bytes)
