"""Before the first GPU-minute: will this run start, on every node? ``python -m unlearn_ds.doctor --help``.

Three ways in: the command (``main``), its short form before every training run (``before_run``), and what only shows
once all ranks are there (``same_on_all_ranks``). The checks are rows of ``registry.py`` and files of ``preflight/``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from unlearn_ds import arguments, ds_json, ranks, versions
from unlearn_ds.config import RunConfig, UsageError
from unlearn_ds.exit_codes import FINISHED, USAGE
from unlearn_ds.preflight import compare, files, hostfile, network, node, remote, table
from unlearn_ds.preflight.compare import MemoryPlan
from unlearn_ds.preflight.findings import Finding, Subject, go_through, of_this_rank, worst
from unlearn_ds.registry import LAUNCH_CHECKS, QUICK_CHECKS

BETWEEN = "\n       "
"""Of problems, which stand below each other behind "error: "."""
BEFORE_MEETING = {"stale locks", "port"}
"""Checks whose failure would let ranks wait for each other."""
PLAN_SECONDS = 22.0
"""For importing torch and transformers beside the examination of the nodes."""

HELP = """usage: python -m unlearn_ds.doctor [--hostfile FILE] [flags of launchers/train.py]

Examine the nodes of a run with these flags, without starting it. Exit code 0: it can start (warnings allowed); 2: not.
With a hostfile every node is examined over ssh, at most 20 s each; started as several ranks (torchrun, srun, mpirun)
the node of every rank is; otherwise this machine alone.

  --hostfile FILE     'HOST slots=N' lines, as DeepSpeed reads them
  --include, --exclude HOST[:SLOT,...]@HOST...   as the deepspeed launcher takes them
  --master_addr A     address of the first node; default: MASTER_ADDR, or the first of its hostname -I
  --master_port P     port of the main rank [29500]
  --ssh_port P        of the sshd of every node
  --bandwidth         measure all-reduce between the nodes, one rank each, in up to 90 s more; among launched ranks
                      it is the default (--bandwidth false)
  --json              print findings, facts and bandwidth as JSON
"""


class Options(NamedTuple):
    """The doctor's own flags, as text of the command line."""

    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    master_addr: str | None = None
    master_port: str | None = None
    ssh_port: str | None = None
    bandwidth: str | None = None
    json: str = "false"

    def port(self, name: str) -> int | None:
        text = self._asdict()[name]
        if text is None:
            return None
        if not text.isdigit() or not 0 < int(text) < 65536:
            raise UsageError(f"--{name} takes a port from 1 to 65535; got {text}.")
        return int(text)

    def on(self, name: str, default: bool = False) -> bool:
        text = self._asdict()[name]
        if text is not None and text.lower() not in ("true", "false"):
            raise UsageError(f"--{name} takes true or false; got {text}.")
        return default if text is None else text.lower() == "true"


class Result(NamedTuple):
    """All that an examination has found. measured: of the network; None where nothing was."""

    findings: list[Finding]
    reports: list[node.Report]
    measured: dict[str, Any] | None


def main(*positional: str, **flags: str) -> None:
    """Examine, print and leave with the exit code."""
    began = time.monotonic()
    if positional:
        raise UsageError(f"unexpected '{positional[0]}': flags are written --name value.")
    own = {name: str(value) for name, value in flags.items() if name in Options._fields}
    options, flags = Options(**own), {name: value for name, value in flags.items() if name not in own}
    options.on("json")
    if not options.hostfile:
        ranks.adopt()
    config = arguments.parse(flags)
    if config.engine.ds_config != "auto":
        ds_json.load(config.engine.ds_config)  # a mistake here is one on every node
    if not options.hostfile and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit(examine_ranks(config, flags, options, began))
    result = examine_nodes(config, flags, options)
    _show(result, options, time.monotonic() - began)
    sys.exit(_exit_code(result))


def examine_nodes(config: RunConfig, flags: dict[str, Any], options: Options) -> Result:
    """Examine the hosts of a hostfile over ssh; without one, or where it names this machine alone, without."""
    hosts = hostfile.read(options.hostfile) if options.hostfile else {}
    hosts = hostfile.chosen(hosts, options.include, options.exclude) if hosts else {socket.gethostname(): 0}
    ssh_port, here = options.port("ssh_port"), (socket.gethostname(), "localhost", "127.0.0.1")
    # A single host may still be another machine than this one.
    places = [remote.Place(name, len(hosts) > 1 or name not in here, ssh_port) for name in hosts]
    master = options.master_addr or os.environ.get("MASTER_ADDR")
    port = options.port("master_port") or (network.DEFAULT_PORT if options.hostfile else None)
    order = remote.Order(flags, places, list(hosts.values()), master, port)
    planning = _start_plan(flags, len(hosts), max(1, *hosts.values()) if hosts else 1)
    examined = remote.examine(order, options.on("bandwidth"))
    plan = _finish_plan(planning)
    subject = Subject(config, tuple(hosts), 0, 0, master, port)
    findings = go_through(LAUNCH_CHECKS, subject._replace(nodes=("this machine",) * len(hosts)))
    return _result(subject, findings, examined.reports, plan, examined.measured)


def examine_ranks(config: RunConfig, flags: dict[str, Any], options: Options, began: float) -> int:
    """Examine the node of every rank that a launcher has started; the main rank prints. Returns the exit code of all.

    Where the ranks cannot come together each first rank of a node prints what it has found itself.
    """
    subject = of_this_rank(config)
    first, is_main = os.environ.get("LOCAL_RANK", "0") == "0", os.environ["RANK"] == "0"
    planning = _start_plan(flags, len(subject.nodes), max(1, subject.ranks)) if is_main else None
    report = node.examine(subject) if first else None
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of addresses without a name
    from unlearn_ds.preflight import group  # torch takes seconds to import, and the examination needs none

    problem = group.join()
    if problem:
        plan = _finish_plan(planning) if planning else MemoryPlan(missing="the main rank does it")
        if report:
            told = [problem._replace(check="process group", node=subject.node)]
            _show(_result(subject, told, [report], plan, None), options, time.monotonic() - began)
        return USAGE
    subject, reports = group.gather(subject, report)
    measured = group.bandwidth()._asdict() if options.on("bandwidth", default=True) else None
    code = FINISHED
    if planning:
        result = _result(subject, [], reports, _finish_plan(planning), measured)
        code = _exit_code(result)
        _show(result, options, time.monotonic() - began)
    # No rank leaves before the main one has printed: launchers end all others when one leaves with an error.
    return group.leave(code)


def _result(
    subject: Subject, findings: list[Finding], reports: list[node.Report], plan: MemoryPlan, measured: Any
) -> Result:
    """Put the findings together, nodes that have not answered first."""
    of_nodes = [finding for report in reports for finding in report.findings]
    silent = [finding for finding in of_nodes if finding.check == "reach"]
    others = [finding for finding in of_nodes if finding.check != "reach"]
    findings = [*silent, *findings, *others, *compare.compare(subject, reports, plan)]
    if isinstance(measured, Finding):
        findings, measured = [*findings, measured._replace(check="bandwidth")], None
    if measured and "error" in measured:
        findings.append(Finding("fail", measured["error"], measured["do"], "bandwidth"))
    return Result(findings, reports, measured)


def _exit_code(result: Result) -> int:
    return USAGE if worst(result.findings) == "fail" else FINISHED


def _show(result: Result, options: Options, seconds: float) -> None:
    counts = {status: sum(finding.status == status for finding in result.findings) for status in ("fail", "warn")}
    summary = (
        f"doctor      {counts['fail']} problem(s) that would stop a run, {counts['warn']} warning(s); "
        f"{max(1, len(result.reports))} node(s) in {seconds:.1f} s"
    )
    if options.on("json"):
        print(json.dumps({
            "exit_code": _exit_code(result), "seconds": round(seconds, 1), "bandwidth": result.measured,
            "findings": [finding._asdict() for finding in result.findings],
            "nodes": {report.node: report.facts for report in result.reports},
        }, indent=1))  # fmt: skip
    else:
        table.show(result.findings, result.measured, summary)


class Planning(NamedTuple):
    """The process that works out the memory plan, and when (``time.monotonic``) nobody waits for it any more."""

    process: subprocess.Popen[str]
    deadline: float


def _start_plan(flags: dict[str, Any], num_nodes: int, ranks_per_node: int) -> Planning:
    """Work the memory plan out beside the nodes: its imports take longer than they do, and a process may be ended."""
    ranks = {"WORLD_SIZE": str(num_nodes * ranks_per_node), "LOCAL_SIZE": str(ranks_per_node)}
    process = subprocess.Popen(
        [sys.executable, "-m", "unlearn_ds.doctor", "--plan"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env={**os.environ, **ranks},
    )  # fmt: skip
    process.stdin.write(json.dumps(flags))
    process.stdin.close()
    return Planning(process, time.monotonic() + PLAN_SECONDS)


def _finish_plan(planning: Planning) -> MemoryPlan:
    process = planning.process
    try:
        process.wait(timeout=max(0.0, planning.deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return MemoryPlan(missing=f"it took longer than {PLAN_SECONDS:g} s")
    answers = [line for line in process.stdout.read().splitlines() if line.startswith(node.MARK)]
    if not answers:
        return MemoryPlan(missing=f"its process ended with exit code {process.returncode}")
    return MemoryPlan(**json.loads(answers[-1].removeprefix(node.MARK)))


def planned(config: RunConfig, given: set[str]) -> MemoryPlan:
    """What one of the ranks that the environment tells of holds, by the memory plan of ``--dry_run``.

    given: knobs that flags set; with a preset of a large model the others follow from the plan.
    """
    from unlearn_ds import choose, dist, sizing
    from unlearn_ds.cost import shapes

    if files.model_folder(config) is None and shapes.public(config.model.path) is None:
        return MemoryPlan(missing="the model is not on this machine yet")
    ranks = sizing.machine(config)
    if arguments.follows_plan(config):
        if ranks.device_bytes is None:
            return MemoryPlan(missing="no GPU on this machine to plan for; --gpu_memory GiB tells that of the nodes")
        config = choose.resolved(config, given, ranks)
    config = arguments.for_machine(config, dist.computes_bf16())
    plan = sizing.plan_of(config, ranks)
    kept = ("weights", "gradients", "optimizer", "reference")
    states = sum(line.num_bytes for line in plan.lines if line.where == "device" and line.what.startswith(kept))
    return MemoryPlan(states, plan.peak("device"), plan.peak("host"))


def _answer_plan() -> None:
    """The process of ``_start_plan``: flags on the input, the plan on the output."""
    try:
        flags = json.loads(sys.stdin.read())
        found = planned(arguments.parse(flags), arguments.given(flags))
    except (OSError, ValueError) as error:  # a model that cannot be read is told by the checks of its files
        found = MemoryPlan(missing=str(error).splitlines()[0])
    print(node.MARK + json.dumps(found._asdict()))


def before_run(config: RunConfig) -> list[str]:
    """The checks that take milliseconds, on the first rank of each node.

    Raises ``UsageError`` with all problems at once. Among several nodes a problem that does not keep ranks from meeting
    is returned instead: a node that left now would be waited for, so ``same_on_all_ranks`` tells it everywhere.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return []
    subject = of_this_rank(config)
    findings = go_through(QUICK_CHECKS, subject)
    named = f"{subject.node}: " if subject.several_nodes else ""
    for finding in findings:
        if finding.status == "warn":
            print(f"warning     {named}{finding.seen}; {finding.do}", flush=True)
    failed = [finding for finding in findings if finding.status == "fail"]
    problems = [f"{named}{finding.seen}. To do: {finding.do}" for finding in failed]
    if problems and (not subject.several_nodes or {finding.check for finding in failed} & BEFORE_MEETING):
        raise UsageError(BETWEEN.join(problems))
    return problems


def same_on_all_ranks(config: RunConfig, problems: Sequence[str] = ()) -> None:
    """Raise ``UsageError`` on all ranks for what ``before_run`` has found on any node, and, naming nodes, where code,
    packages or the run differ among them.

    The process group must be there. The first rank of each node tells; one node alone has nobody to differ from.
    """
    from unlearn_ds import dist

    if dist.world_size() == dist.local_world_size():
        return
    everywhere = [problem for told in dist.gather_objects(list(problems)) for problem in told]
    if everywhere:
        raise UsageError(BETWEEN.join(everywhere))
    mine = None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        about = {**versions.package_versions(), "deepspeed": versions.installed("deepspeed")}
        about |= {"commit": versions.commit() or "none", "code": versions.code_digest()}
        mine = (socket.gethostname(), about | files.settings(config))
    told = [entry for entry in dist.gather_objects(mine) if entry]
    differences = differing(told)
    if differences:
        raise UsageError("the nodes of this run are not alike: " + "; ".join(differences))


def differing(told: list[tuple[str, dict[str, str]]]) -> list[str]:
    """For each name whose value is not the same everywhere: the values, with the nodes that have them."""
    found = []
    for name in told[0][1]:
        nodes_of: dict[str, list[str]] = {}
        for host, values in told:
            nodes_of.setdefault(values.get(name, "none"), []).append(host)
        if len(nodes_of) > 1:
            shown = ", ".join(f"{value} on {' '.join(dict.fromkeys(hosts))}" for value, hosts in nodes_of.items())
            found.append(f"{name} is {shown}")
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["--node"]:
        node.serve()
    elif sys.argv[1:] == ["--plan"]:
        _answer_plan()
    elif {"-h", "--help"} & set(sys.argv[1:]):
        print(HELP)
    else:
        import fire

        try:
            fire.Fire(fire.decorators.SetParseFn(str)(main))
        except UsageError as problem:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # once for all ranks of a machine
                print(f"error: {problem}", file=sys.stderr)
            sys.exit(USAGE)
