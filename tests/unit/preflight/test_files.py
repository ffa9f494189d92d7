"""Model and data files: whole, cut short, missing, in the hub's cache or to be fetched."""

import json
import shutil
import socket
import struct
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from unlearn_ds import arguments
from unlearn_ds.preflight import files
from unlearn_ds.preflight.findings import go_through


def safetensors(path: Path, **shapes: list[int]) -> None:
    """A file of the format with bf16 zeros."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        count = 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + count]}
        at += count
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


@pytest.fixture
def model(tmp_path):
    """A model of two files with an index."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    safetensors(folder / names[0], a=[3, 4])
    safetensors(folder / names[1], b=[5, 2], c=[1, 1])
    index = {"weight_map": {"a": names[0], "b": names[1], "c": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_whole_model_is_fine_and_its_parameters_are_counted(model, subject, clean):
    of_model = subject(model=str(model))
    assert files.model(of_model).status == "ok" and "2 weight file(s)" in files.model(of_model).seen
    assert files.num_parameters(of_model.config) == 3 * 4 + 5 * 2 + 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: (m / "model-00002-of-00002.safetensors").unlink(), "1 of 2 weight files are missing"),
        (lambda m: (m / "config.json").unlink(), "config.json"),
        (lambda m: (m / "tokenizer.json").unlink(), "tokenizer"),
        (lambda m: (m / "model-00001-of-00002.safetensors").write_bytes(b""), "no safetensors file"),
        (lambda m: _cut(m / "model-00001-of-00002.safetensors"), "bytes of"),
    ],
)
def test_what_is_missing_or_cut_short_is_named(model, subject, clean, change, expected):
    change(model)
    found = files.model(subject(model=str(model)))
    assert found.status == "fail" and expected in found.seen and str(model) in found.seen


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_a_file_of_the_formats_own_library_is_read(model, subject, clean):
    for path in model.glob("model*"):
        path.unlink()
    weights = {"a": numpy.zeros((7, 3), numpy.float16), "b": numpy.zeros(5, numpy.float32)}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    of_model = subject(model=str(model))
    assert files.model(of_model).status == "ok"
    assert files.num_parameters(of_model.config) == 7 * 3 + 5


def in_hub_cache(folder: Path, kind: str, name: str, source: Path | None = None) -> Path:
    """Lay a repository into a cache as huggingface_hub does."""
    root = folder / f"{kind}--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0123abc")
    snapshot = root / "snapshots" / "0123abc"
    shutil.copytree(source, snapshot) if source else snapshot.mkdir(parents=True)
    return snapshot


def test_a_hub_model_is_looked_for_in_the_cache_and_offline_must_be_there(model, subject, clean, tmp_path):
    of_model = subject(model="org/name")
    assert "will be fetched" in files.model(of_model).seen
    clean.setenv("HF_HUB_OFFLINE", "1")
    found = files.model(of_model)
    assert found.status == "fail" and "org/name" in found.seen and "hf download org/name" in found.do
    clean.setenv("HF_HOME", str(tmp_path / "hf"))
    snapshot = in_hub_cache(tmp_path / "hf" / "hub", "models", "org/name", model)
    assert files.model_folder(of_model.config) == snapshot
    assert files.model(of_model).status == "ok" and "hub's cache" in files.model(of_model).seen
    other = subject(model="org/name", **{"model.revision": "v2"})
    assert files.model(other).status == "fail"


def test_the_cache_is_where_the_hubs_own_library_looks(clean, tmp_path):
    import subprocess
    import sys

    from unlearn_ds import local_files

    clean.setenv("HF_HOME", str(tmp_path / "elsewhere"))
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(local_files.hub_folder())


def test_data_is_named_with_what_is_wrong_with_it(subject, clean, tmp_path):
    retain = tmp_path / "retain.csv"
    retain.touch()
    flags = {"forget_data": str(tmp_path / "gone.jsonl"), "retain_data": str(retain)}
    found = files.data(subject(**flags))
    assert found.status == "fail" and "gone.jsonl" in found.seen
    (tmp_path / "gone.jsonl").touch()
    assert files.data(subject(**flags)).status == "ok"
    clean.setenv("HF_HUB_OFFLINE", "1")
    hub = subject(**{**flags, "forget_data": "org/rows:qa"})
    assert "--repo-type dataset org/rows" in files.data(hub).do
    in_hub_cache(files.hub_folder(), "datasets", "org/rows")
    assert files.data(hub).status == "ok"
    assert "sample" in files.data(subject()).seen


def test_the_hub_is_tried_where_something_has_to_be_fetched(subject, clean):
    with socket.create_server(("127.0.0.1", 0)) as server:
        clean.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert files.hub(subject(model="org/name")).status == "ok"
        assert files.hub(subject(model="org/name", nodes=("a", "b"))).status == "warn"
    found = files.hub(subject(model="org/name"))
    assert found.status == "fail" and "127.0.0.1 cannot be reached" in found.seen and "the model" in found.seen
    assert files.hub(subject()).status == "skipped"


def test_a_mistake_in_flags_or_json_is_a_failure_with_its_sentence(subject, clean, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text('{"elasticity": {}}')
    table = {"flags": "unlearn_ds.preflight.files:flags", "json": "unlearn_ds.preflight.files:deepspeed_config"}
    flags, json_ = go_through(table, subject(ds_config=str(bad), max_steps="0"))
    assert (flags.status, json_.status) == ("fail", "fail")
    assert "--max_steps" in flags.seen and "elasticity" in json_.seen
    assert [f.status for f in go_through(table, subject())] == ["ok", "ok"]


def test_settings_of_a_run_differ_by_content_not_by_path(tmp_path):
    for folder, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / folder).mkdir()
        for name in ("f.jsonl", "r.jsonl"):
            (tmp_path / folder / name).write_text(text)

    def of(folder, **more):
        paths = {f"{kind}_data": str(tmp_path / folder / f"{kind[0]}.jsonl") for kind in ("forget", "retain")}
        return files.settings(arguments.parse({**paths, "output_dir": "out", **more}))

    assert of("a") == of("b") != of("c")
    usual, other = of("a"), of("a", save_every="3")
    assert {name for name in usual if usual[name] != other[name]} == {"--checkpoint.save_every"}


def test_the_size_of_a_presets_model_is_known_before_it_is_fetched(subject):
    assert files.num_parameters(subject(preset="llama3-70b").config) == pytest.approx(70.55e9, rel=1e-3)
    assert files.num_parameters(subject(model="nobody/knows-this").config) is None
