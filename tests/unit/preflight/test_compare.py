"""What only shows when all nodes are laid side by side."""

import pytest

from unlearn_ds.preflight import compare
from unlearn_ds.preflight.compare import Examined, MemoryPlan
from unlearn_ds.preflight.findings import fail, ok
from unlearn_ds.preflight.node import Report, from_json, to_json

GIB = 2**30
NODES = ("n1", "n2", "n3")


def report(node, **more):
    facts = {
        "software": {"torch": "2.13.0", "commit": "abc"}, "devices": {"GPUs": "8 x H100"}, "run": {"fingerprint": "f"},
        "machine": {"host bytes": str(64 * GIB), "device bytes": "0", "ranks": "2"},
    }  # fmt: skip
    for name, values in more.pop("facts", {}).items():
        facts[name] = {**facts[name], **values}
    return Report(node, [], facts, **more)


@pytest.fixture
def cluster(subject):
    def make(*reports, plan=None, **flags):
        return Examined(subject(nodes=NODES[: len(reports)], **flags), [*reports], plan or MemoryPlan())

    return make


@pytest.mark.parametrize(
    ("check", "facts", "expected"),
    [
        (compare.software, {"software": {"torch": "2.12.0"}}, "torch 2.12.0 (others 2.13.0)"),
        (compare.software, {"software": {"commit": "abc+changes"}}, "commit abc+changes (others abc)"),
        (compare.devices, {"devices": {"GPUs": "7 x H100"}}, "GPUs 7 x H100 (others 8 x H100)"),
        (compare.devices, {"devices": {"driver": "570"}}, "driver 570 (others none)"),
        (compare.run, {"run": {"fingerprint": "g"}}, "fingerprint g (others f)"),
    ],
)
def test_the_node_that_differs_is_named_with_both_values(cluster, check, facts, expected):
    alike = [report("n1"), report("n2"), report("n3")]
    assert [found.status for found in check(cluster(*alike))] == ["ok"]
    for place in range(3):
        reports = [*alike]
        reports[place] = report(NODES[place], facts=facts)
        (found,) = check(cluster(*reports))
        assert (found.status, found.node, found.seen) == ("fail", NODES[place], expected)


def test_one_node_has_nothing_to_differ_from(cluster):
    for check in (compare.software, compare.devices, compare.run, compare.clocks, compare.shared_output,
                  compare.main_node):  # fmt: skip
        assert [found.status for found in check(cluster(report("n1")))] == ["skipped"], check


@pytest.mark.parametrize(
    ("skews", "named", "status"),
    [
        ((0.0, 0.2, 0.1), None, "ok"),
        ((0.0, 5.0, 0.1), "n2", "warn"),
        ((0.0, -300.0, 0.1), "n2", "fail"),
        ((40.0, 40.3, 40.1), None, "ok"),  # the asker's clock is wrong, not theirs
    ],
)
def test_a_clock_that_is_off_is_named(cluster, skews, named, status):
    reports = [report(node, skew=(skew, 0.01)) for node, skew in zip(NODES, skews, strict=True)]
    (found,) = compare.clocks(cluster(*reports))
    assert found.status == status and (named is None or found.node == named)


def test_a_slow_answer_is_no_wrong_clock(cluster):
    (found,) = compare.clocks(cluster(report("n1", skew=(0.0, 0.01)), report("n2", skew=(2.5, 2.4))))
    assert found.status == "ok"


@pytest.mark.parametrize(
    ("flags", "status"),
    [({}, "warn"), ({"save_every": "5"}, "fail"), ({"resume": "auto"}, "fail"),
     ({"stop": "rate:0.1", "eval_every": "5"}, "fail")],
)  # fmt: skip
def test_an_output_folder_that_is_not_shared_stops_runs_that_go_back(cluster, flags, status):
    apart = cluster(report("n1", sees=[0]), report("n2", sees=[1]), **flags)
    assert [(found.status, found.node) for found in compare.shared_output(apart)] == [(status, "n1"), (status, "n2")]
    assert "n2" in compare.shared_output(apart)[0].seen
    together = cluster(report("n1", sees=[0, 1]), report("n2", sees=[0, 1]), **flags)
    assert [found.status for found in compare.shared_output(together)] == ["ok"]


def test_a_node_that_does_not_reach_the_main_one_is_named(cluster):
    reports = report("n1", reach=ok("10.0.0.1:29500 answers")), report("n2", reach=fail("no way", "dig one"))
    (found,) = compare.main_node(cluster(*reports))
    assert (found.status, found.node, found.seen) == ("fail", "n2", "no way")
    assert compare.main_node(cluster(report("n1"), report("n2")))[0].status == "skipped"


@pytest.mark.parametrize(
    ("plan", "device_bytes", "status"),
    [
        (MemoryPlan(10 * GIB, 20 * GIB, 5 * GIB), 80 * GIB, "ok"),
        (MemoryPlan(10 * GIB, 90 * GIB, 5 * GIB), 80 * GIB, "warn"),  # only with activations
        (MemoryPlan(85 * GIB, 90 * GIB, 5 * GIB), 80 * GIB, "fail"),
        (MemoryPlan(10 * GIB, 20 * GIB, 40 * GIB), 80 * GIB, "fail"),  # two ranks share 64 GiB of host memory
        (MemoryPlan(10 * GIB, 20 * GIB, 5 * GIB), 0, "ok"),  # on CPUs both are host memory
        (MemoryPlan(10 * GIB, 40 * GIB, 5 * GIB), 0, "warn"),
        (MemoryPlan(40 * GIB, 40 * GIB, 5 * GIB), 0, "fail"),
        (MemoryPlan(missing="no model"), 0, "warn"),
    ],
)
def test_the_memory_plan_is_held_against_every_node(cluster, plan, device_bytes, status):
    machine = {"machine": {"device bytes": str(device_bytes)}}
    small = cluster(report("n1", facts={"machine": {"host bytes": str(999 * GIB), "device bytes": str(99 * GIB)}}),
                    report("n2", facts=machine), plan=plan)  # fmt: skip
    (found,) = compare.memory(small)
    assert found.status == status and (status == "ok" or plan.missing or found.node == "n2")


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        ({"host_memory": "600"}, "ok"), ({"host_memory": "400"}, "fail"), ({}, "ok"),  # without it nothing is known
        ({"host_memory": "600", "gpu_memory": "40"}, "fail"),
    ],
)  # fmt: skip
def test_a_plan_for_nodes_that_flags_describe_is_not_held_against_a_machine_without_gpus(cluster, flags, status):
    """A login node: 64 GiB, no GPU; eight ranks take 512 GiB of the host that will run."""
    plan = MemoryPlan(50 * GIB, 60 * GIB, 64 * GIB)
    described = {"gpu_memory": "80", "gpus_per_node": "8", "cluster.nodes": "1", **flags}
    (found,) = compare.memory(cluster(report("login"), plan=plan, **described))
    assert found.status == status
    here = cluster(report("n1", facts={"machine": {"device bytes": str(80 * GIB)}}), plan=plan, **described)
    assert compare.memory(here)[0].status == "fail"  # a node that has GPUs is one that will run


def test_nodes_without_an_answer_take_no_part(subject):
    silent = Report("n2", [fail("unreachable", "")._replace(check="reach", node="n2")], {})
    found = compare.compare(subject(nodes=NODES[:2]), [report("n1"), silent], MemoryPlan())
    assert {finding.check for finding in found} == set(compare.CLUSTER_CHECKS)
    assert all(finding.node in ("", "n1") for finding in found)
    assert compare.compare(subject(nodes=("n2",)), [silent], MemoryPlan()) == []


def test_reports_travel_as_json():
    import json

    whole = Report("n", [ok("a")], {"x": {"y": "z"}}, "10.0.0.1", 1234, (0.5, 0.1), [0, 1], fail("b", "c"))
    assert from_json(json.loads(json.dumps(to_json(whole)))) == whole
