"""The hostfile, its filters, and the variables that reach the nodes."""

import pytest

from unlearn_ds.config import UsageError
from unlearn_ds.preflight import hostfile

HOSTS = {"a": 8, "b": 8, "c": 4}


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# our nodes\n\n a slots=8\nb   slots=8  # the new one\nc slots=4\n")
    assert hostfile.read(str(path)) == HOSTS


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a slots=8\nb\n", "line 2 .* 'b'"), ("a slots=8\na slots=8\n", "names a twice"), ("# none\n", "names no host")],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, text, expected):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UsageError, match=expected):
        hostfile.read(str(tmp_path / "hosts"))
    with pytest.raises(UsageError, match="no such file"):
        hostfile.read(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        (None, None, HOSTS),
        ("a@c", None, {"a": 8, "c": 4}),
        ("b:0,1", None, {"b": 2}),
        (None, "b", {"a": 8, "c": 4}),
        (None, "b:0,1@c:3", {"a": 8, "b": 6, "c": 3}),
    ],
)
def test_filters_leave_hosts_and_slots(include, exclude, left):
    assert hostfile.chosen(HOSTS, include, exclude) == left


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [("d", None, "'d' is none of a, b, c"), ("a", "b", "give one"), (None, "a@b@c", "leave no host")],
)
def test_filters_that_cannot_be_meant_are_refused(include, exclude, expected):
    with pytest.raises(UsageError, match=expected):
        hostfile.chosen(HOSTS, include, exclude)


@pytest.mark.parametrize("line", ["", "# a comment", "NAME", "a b=c"])
def test_lines_that_stop_the_runner_are_named(clean, subject, tmp_path, line):
    path = tmp_path / "HOME" / ".deepspeed_env"
    path.write_text("GLOO_SOCKET_IFNAME=eth0\nOPTIONS=a=b\n")
    assert hostfile.environment_file(subject()).status == "ok"
    path.write_text(f"GLOO_SOCKET_IFNAME=eth0\n{line}\nX=1\n")
    found = hostfile.environment_file(subject())
    assert found.status == "fail" and f"{path}:2" in found.seen
    assert hostfile.from_files()["X"] == "1"


def test_the_runner_itself_stops_at_such_a_line(clean, tmp_path):
    """Should a later DeepSpeed skip blank lines, this check can go."""
    import importlib.util
    from pathlib import Path

    runner = Path(importlib.util.find_spec("deepspeed").origin).parent / "launcher" / "runner.py"
    text = runner.read_text()
    assert "key, val = var.split('=', maxsplit=1)" in text
    assert f"EXPORT_ENVS = {[*hostfile.HANDED_ON]}" in text


def test_both_files_and_the_name_in_the_environment_are_looked_at(clean, tmp_path):
    assert hostfile.environment_files() == []
    (tmp_path / "HOME" / "vars").write_text("A=1\nB=1\n")
    (tmp_path / "vars").write_text("B=2\n")
    clean.setenv("DS_ENV_FILE", "vars")
    assert hostfile.from_files() == {"A": "1", "B": "2"}


def test_variables_that_do_not_reach_the_nodes_are_a_warning(clean, subject, tmp_path):
    clean.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert hostfile.exported(subject()).status == "skipped"
    several = subject(nodes=("a", "b"))
    found = hostfile.exported(several)
    assert found.status == "warn" and "GLOO_SOCKET_IFNAME" in found.seen and "PYTHONPATH" not in found.seen
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\n")
    assert "GLOO_SOCKET_IFNAME" not in hostfile.exported(several).seen


def test_another_launcher_says_what_it_hands_on(clean, subject, tmp_path):
    (tmp_path / ".deepspeed_env").write_text("\n")
    several = subject(nodes=("a", "b"))
    names = "PATH LD_LIBRARY_PATH TMPDIR XDG_CACHE_HOME DS_ACCELERATOR GLOO_ TORCH_ OMP_ UNLEARN_DS_ HF_ NCCL_ TRITON_"
    clean.setenv("UNLEARN_DS_FORWARDED", names + " CUDA_DEVICE_MAX_CONNECTIONS PYTORCH_ HTTPS_PROXY https_proxy")
    assert hostfile.exported(several).status == "ok"
    assert hostfile.environment_file(several).status == "skipped"
    clean.setenv("UNLEARN_DS_FORWARDED", names.replace("GLOO_ ", ""))
    clean.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert "GLOO_SOCKET_IFNAME" in hostfile.exported(several).seen
