"""Checks that look at all nodes together. A node that has not answered has no facts and takes no part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from unlearn_ds.config import stop_rules
from unlearn_ds.preflight.findings import Finding, Subject, fail, listed, ok, size, skipped, warn
from unlearn_ds.preflight.node import Report
from unlearn_ds.registry import CLUSTER_CHECKS, resolve

SKEW_WARNS, SKEW_FAILS = 1.0, 60.0
"""Seconds between the clocks of two nodes. From the first on, logs of nodes cannot be laid side by side; a minute
breaks what rests on file times on a shared disk: ninja rebuilds for ever, caches take new files for old."""


class MemoryPlan(NamedTuple):
    """Bytes that one rank holds on its device, states alone and all, and in host memory; why there is no plan."""

    device_states: int = 0
    device: int = 0
    host: int = 0
    missing: str = ""


class Examined(NamedTuple):
    """The nodes that have answered, the run, and its memory plan."""

    subject: Subject
    reports: list[Report]
    plan: MemoryPlan


def compare(subject: Subject, reports: Sequence[Report], plan: MemoryPlan) -> list[Finding]:
    """The findings of every check of ``CLUSTER_CHECKS``; each names the nodes that it is about."""
    cluster, found = Examined(subject, [report for report in reports if report.facts], plan), []
    for name, target in CLUSTER_CHECKS.items() if cluster.reports else ():
        found += [finding._replace(check=name) for finding in resolve("check", name, {name: target})(cluster)]
    return found


def _differing(cluster: Examined, subject: str, do: str, status: str = "fail") -> list[Finding]:
    """A finding for each node whose facts are not those of most nodes, naming both values."""
    if len(cluster.reports) == 1:
        return [skipped("one node")]
    names = dict.fromkeys(name for report in cluster.reports for name in report.facts.get(subject, {}))
    usual = {name: _usual(cluster, subject, name) for name in names}
    found = []
    for report in cluster.reports:
        values = {name: report.facts.get(subject, {}).get(name, "none") for name in names}
        other = [f"{name} {values[name]} (others {usual[name]})" for name in names if values[name] != usual[name]]
        if other:
            found.append(Finding(status, listed(other, most=6), do, node=report.node))
    return found or [ok("; ".join(f"{name} {value}" for name, value in usual.items() if not name.startswith("--")))]


def _usual(cluster: Examined, subject: str, name: str) -> str:
    """What most nodes say; the main node, where as many say one thing as another."""
    values = [report.facts.get(subject, {}).get(name, "none") for report in cluster.reports]
    return Counter(values).most_common(1)[0][0]


def software(cluster: Examined) -> list[Finding]:
    """One Python, one set of packages, one commit, one code."""
    return _differing(cluster, "software", "install the same environment and check out the same commit on this node")


def devices(cluster: Examined) -> list[Finding]:
    """The same number and model of GPUs, and the same driver, CUDA and NCCL."""
    return _differing(cluster, "devices", "run on like nodes (--include, --exclude), and update driver or packages")


def run(cluster: Examined) -> list[Finding]:
    """The same flags and the same data by content."""
    return _differing(cluster, "run", "copy the same data files and DeepSpeed JSON to this node, or share a disk")


def clocks(cluster: Examined) -> list[Finding]:
    """Clocks that agree, corrected for the time that asking takes."""
    known = [(report, report.skew) for report in cluster.reports if report.skew]
    if len(known) < 2:
        return [skipped("one node")]
    skews = sorted([0.0, *(skew for _, (skew, _) in known)])  # the asker's own clock has a voice too
    middle = skews[len(skews) // 2]
    found = []
    for report, (skew, error) in known:
        apart = abs(skew - middle) - error  # what is certain of it
        if apart > SKEW_WARNS:
            text = f"its clock is {abs(skew - middle):.1f} s {'ahead' if skew > middle else 'behind'} (+-{error:.2f})"
            do = "start chrony or systemd-timesyncd on this node"
            found.append((fail if apart > SKEW_FAILS else warn)(text, do)._replace(node=report.node))
    largest = max(abs(skew - middle) for _, (skew, _) in known)
    return found or [ok(f"at most {largest:.2f} s apart")]


def shared_output(cluster: Examined) -> list[Finding]:
    """Whether all nodes see one output folder, which resuming and stop rules that go back need."""
    known = [report for report in cluster.reports if report.sees is not None]
    if len(known) < 2:
        return [skipped("one node")]
    config = cluster.subject.config
    goes_back = {"rate", "patience"} & stop_rules(config.stop.rules).keys()
    needed = config.checkpoint.save_every > 0 or config.checkpoint.resume == "auto" or bool(goes_back)
    names = {cluster.subject.nodes.index(report.node): report.node for report in known}
    found = []
    for report in known:
        hidden = [name for index, name in names.items() if index not in report.sees]
        if hidden:
            text = f"{config.output_dir} here is not the folder of {listed(hidden)}"
            do = "give an --output_dir on a disk that all nodes share" + (
                "" if needed else ": --resume auto would find only a part of a checkpoint on each node"
            )
            found.append((fail if needed else warn)(text, do)._replace(node=report.node))
    return found or [ok(f"all nodes see one {config.output_dir}")]


def main_node(cluster: Examined) -> list[Finding]:
    """The main rank's address and port, tried from every node while the main node listened there."""
    if len(cluster.reports) == 1:
        return [skipped("one node")]
    tried = [(report, report.reach) for report in cluster.reports if report.reach]
    bad = [reach._replace(node=report.node) for report, reach in tried if reach.status != "ok"]
    if bad:
        return bad
    if not tried:
        return [skipped("not tried: the main node could not listen, or has not answered")]
    return [ok(f"{tried[0][1].seen} to all {len(tried)} nodes")]


def memory(cluster: Examined) -> list[Finding]:
    """The memory plan of one rank against every node. The plan takes rows as long as ``--data.max_length`` allows, so
    what only activations exceed is a warning."""
    plan = cluster.plan
    if plan.missing:
        return [warn(f"not worked out: {plan.missing}", "python launchers/train.py --dry_run with the same flags")]
    described, found = cluster.subject.config.cluster, []
    machines = [{name: int(value) for name, value in report.facts["machine"].items()} for report in cluster.reports]
    if described.gpu_memory and not any(facts.get("device bytes") for facts in machines):
        # GPUs are described and none is here: this is no machine that will run, and what it has says nothing of those.
        gpu, host = (int(gib * 2**30) for gib in (described.gpu_memory, described.host_memory))
        machines = [{"ranks": described.gpus_per_node or 1, "host bytes": host or 2**63, "device bytes": gpu}]
    for report, facts in zip(cluster.reports, machines, strict=False):
        if not facts:  # told where they were looked for
            continue
        ranks, host, device = facts["ranks"], facts["host bytes"], facts["device bytes"]
        on_host = ranks * (plan.host + (0 if device else plan.device))
        states = ranks * (plan.host + (0 if device else plan.device_states))
        there = f", {size(host)} there" if host < 2**63 else " on every node"
        text = [f"{size(on_host)} of host memory for {ranks} rank(s){there}"]
        if device:
            text.insert(0, f"{size(plan.device)} on a device of {size(device)}")
        impossible = states > host or (device and plan.device_states > device)
        tight = on_host > host or (device and plan.device > device)
        if impossible or tight:
            do = "more ranks, --ds_config with offload, --activation_checkpointing or a smaller --batch_size; --dry_run"
            found.append((fail if impossible else warn)(", ".join(text), do)._replace(node=report.node))
    return found or [ok(f"a rank holds {size(plan.device)} on its device and {size(plan.host)} of host memory")]
