"""The one table: what is fine once, what is not a line a node."""

from unlearn_ds.preflight import table
from unlearn_ds.preflight.findings import Finding


def lines_of(capsys, findings, measured=None):
    table.show(findings, measured, "summary")
    return capsys.readouterr().out.splitlines()


def test_what_is_fine_everywhere_is_one_line_and_each_failure_has_its_own(capsys):
    findings = [Finding("ok", "70 GiB free", "", "free disk", f"n{i}") for i in range(4)]
    findings += [Finding("fail" if i == 2 else "ok", f"lock {i}", "rm it", "stale locks", f"n{i}") for i in range(4)]
    findings += [Finding("fail", "full", "free it", "inodes", f"n{i}") for i in range(2)]
    lines = lines_of(capsys, findings)
    of_disks = [line.split() for line in lines if "free disk" in line]
    assert of_disks == [["ok", "free", "disk", "4", "nodes", "70", "GiB", "free"]]
    of_locks = [line for line in lines if "stale locks" in line]
    assert len(of_locks) == 2 and "3 other nodes" in of_locks[0] and "(and 2 more like it)" in of_locks[0]
    assert of_locks[1].split() == ["fail", "stale", "locks", "n2", "lock", "2", "->", "rm", "it"]
    assert len([line for line in lines if "inodes" in line]) == 2 and lines[-1] == "summary"


def test_a_line_stays_one_line_in_a_file_and_brackets_are_text(capsys):
    lines = lines_of(capsys, [Finding("fail", "[red]" + "x" * 3000, "rm [y]", "check", "n")])
    assert len(lines) == 3 and lines[1].endswith("x -> rm [y]") and "[red]xxx" in lines[1]


def test_what_no_node_needed_is_one_line_by_reason(capsys):
    findings = [Finding("skipped", "one node", "", check, node) for check in ("clocks", "hub") for node in ("a", "b")]
    findings += [Finding("skipped", "not the main node", "", "port", "b"), Finding("ok", "free", "", "port", "a")]
    findings += [Finding("skipped", "no GPU", "", "GPUs", "a")]
    lines = lines_of(capsys, findings)
    assert lines[-2] == "skipped     clocks, hub (one node); GPUs (no GPU)"
    assert lines[1].split() == ["ok", "port", "a", "free"] and len(lines) == 4


def test_bandwidth_is_listed_by_size(capsys):
    measured = {"backend": "gloo", "world_size": 4, "sizes": [1024, 2**26], "seconds": [0.001, 0.1],
                "bus": [1.5e6, 1e9]}  # fmt: skip
    lines = lines_of(capsys, [], measured)
    assert lines[1] == "all-reduce over gloo among 4 ranks:"
    assert lines[2].split()[:2] == ["1", "KiB"] and lines[3].split()[-2:] == ["1.000", "GB/s"]
