"""Whether the model and the data of a run can be read on this node, and how large the model is."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from unlearn_ds import checks, ds_json
from unlearn_ds.config import EMBEDDED_MODEL, RunConfig, fingerprint, looks_like_file, retain_names, to_dict
from unlearn_ds.cost import shapes
from unlearn_ds.local_files import embedded_folder, find_gguf, hub_folder, hub_is_off, hub_snapshot
from unlearn_ds.preflight.findings import Finding, Subject, fail, listed, ok, skipped, warn

FINGERPRINT = "fingerprint of flags and data"
_BY_CONTENT = ("data.forget_data", "data.retain_data", "data.mismatch_data", "data.harmless_data", "engine.ds_config",
               "engine.nvme_path")  # fmt: skip

EMBEDDED_PARAMETERS = 134_515_008
"""Of SmolLM2-135M, whose embeddings are tied (its model card on the hub)."""


def flags(subject: Subject) -> Finding:
    """The flags, against each other and against the files of this node."""
    checks.check(subject.config)
    return ok("flags agree with each other and with the files here")


def deepspeed_config(subject: Subject) -> Finding:
    name = subject.config.engine.ds_config
    stage = ds_json.stage(subject.ds_values)
    return ok(f"{name}: ZeRO-{stage}, {'bf16' if subject.bytes_per_weight == 2 else 'fp32'}")


def run_facts(subject: Subject) -> dict[str, str]:
    """What must be the same on every node, see ``settings``."""
    return settings(subject.config)


def settings(config: RunConfig) -> dict[str, str]:
    """The fingerprint of a run and its knobs by dotted name. Paths of files that the fingerprint reads are left out:
    nodes may keep the same content in other places."""
    found = {FINGERPRINT: fingerprint(config)}
    for name, value in to_dict(config).items():
        knobs = {f"{name}.{key}": knob for key, knob in value.items()} if isinstance(value, dict) else {name: value}
        found |= {f"--{key}": str(knob) for key, knob in knobs.items() if key not in _BY_CONTENT}
    return found


def model(subject: Subject) -> Finding:
    """The model's files, whole."""
    path = subject.config.model.path
    folder = model_folder(subject.config)
    if folder is None and path == EMBEDDED_MODEL:
        find_gguf()
        return ok(f"{path}, to be converted from its package")
    if folder is None:
        return _not_stored("model", path)
    problem = next(incomplete(folder), None)
    if problem:
        return fail(f"model {folder}: {problem}", "copy or download it again")
    return ok(f"{path}, {len(weight_files(folder))} weight file(s), all there" + _from_cache(path))


def _from_cache(name: str) -> str:
    return "" if looks_like_file(name) or name == EMBEDDED_MODEL else ", from the hub's cache"


def _not_stored(what: str, name: str) -> Finding:
    if hub_is_off():
        return fail(
            f"{what} {name} is not in {hub_folder()}, and HF_HUB_OFFLINE forbids to fetch it",
            f"fetch it where the hub is (hf download {'--repo-type dataset ' * (what == 'data')}{name}), or unset that",
        )
    return ok(f"{what} {name} is not on this node: it will be fetched from the hub")


def model_folder(config: RunConfig) -> Path | None:
    """Local folder that the model is read from; None where it has to be fetched or converted first."""
    if config.model.path == EMBEDDED_MODEL:
        return embedded_folder() if (embedded_folder() / "config.json").is_file() else None
    if looks_like_file(config.model.path):
        return Path(config.model.path).expanduser()
    return hub_snapshot("models", config.model.path, config.model.revision)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors, or torch's own where there are none."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def incomplete(folder: Path) -> Iterator[str]:
    """What is missing of a saved model or cut short, one sentence each."""
    if not (folder / "config.json").is_file():
        yield "config.json is missing"
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        yield "no tokenizer beside it"
    for index in (*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")):
        wanted = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing and index.name.startswith(("model.", "pytorch_model.")):
            yield f"{len(missing)} of {len(wanted)} weight files are missing: {listed(missing)}"
    files = weight_files(folder)
    if not files:
        yield "no weights (*.safetensors or *.bin)"
    for path in files:
        if path.suffix == ".safetensors":
            yield from _cut_short(path)


def _cut_short(path: Path) -> Iterator[str]:
    try:
        length, header = read_header(path)
    except ValueError as error:
        yield str(error)
        return
    whole = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if path.stat().st_size != whole:
        yield f"{path.name} has {path.stat().st_size} bytes of {whole}"


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Length in bytes and entries of the header of a safetensors file; no tensor is read.

    Raises ``ValueError`` for a file that has none.
    """
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length < 2**27:  # the format allows headers of 100 MB
            raise ValueError(f"{path} is no safetensors file")
        entries = json.loads(stream.read(length))
    return length, {name: value for name, value in entries.items() if name != "__metadata__"}


def num_parameters(config: RunConfig) -> int | None:
    """Parameters of the model by the headers of its files, of a preset's model before it is fetched too; else None."""
    if config.model.path == EMBEDDED_MODEL:
        return EMBEDDED_PARAMETERS
    folder = model_folder(config)
    if folder is None or not folder.is_dir():
        known = shapes.public(config.model.path)
        return known.total if known else None
    files = weight_files(folder)
    if files and files[0].suffix == ".bin":
        return sum(path.stat().st_size for path in files) // 2  # mostly saved in two bytes a weight
    found = [tensor["shape"] for path in files for tensor in read_header(path)[1].values()]
    return sum(math.prod(shape) for shape in found)


def data(subject: Subject) -> Finding:
    """The data files and the hub ids of a run."""
    names = data_names(subject.config)
    if not names:
        sample = subject.config.data.source == "sample"
        return ok("the sample data, from the package" if sample else "the paper's public datasets, from the hub")
    findings = [_data_source(name) for name in names]
    for finding in findings:
        if finding.status == "fail":
            return finding
    return ok("; ".join(finding.seen for finding in findings))


def data_names(config: RunConfig) -> list[str]:
    """Files and hub ids that a run reads its rows from; empty for the sample."""
    given = config.data
    named = (given.forget_data, given.mismatch_data, given.harmless_data)
    return [name for name in (*named, *retain_names(given)) if name]


def _data_source(name: str) -> Finding:
    if not looks_like_file(name):
        repository = name.partition(":")[0]
        stored = hub_snapshot("datasets", repository)
        return ok(f"{repository} is in the hub's cache") if stored else _not_stored("data", repository)
    path = Path(name).expanduser()
    if not path.exists():
        return fail(f"data {name} is not on this node", "copy it to the same path, or put it on a shared disk")
    if not os.access(path, os.R_OK):
        return fail(f"data {name} may not be read by this user", f"chmod a+r {name}")
    return ok(f"{name} can be read")


def hub(subject: Subject, seconds: float = 3.0) -> Finding:
    """Whether the hub answers, where something has to be fetched from it."""
    wanted = [] if model_folder(subject.config) or subject.config.model.path == EMBEDDED_MODEL else ["the model"]
    wanted += [
        name
        for name in data_names(subject.config)
        if not looks_like_file(name) and not hub_snapshot("datasets", name.partition(":")[0])
    ]
    if subject.config.data.source == "full":
        wanted.append("--data full")
    if not wanted or hub_is_off():
        return skipped("nothing has to be fetched")
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return skipped("behind a proxy: not tried")
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=seconds).close()
    except OSError as error:
        return fail(
            f"{address.hostname} cannot be reached ({error}), and {listed(wanted)} must be fetched from it",
            "fetch on a node with the hub and set HF_HOME to the shared folder, or name local files",
        )
    if subject.several_nodes:
        return warn(
            f"{address.hostname} answers; every node will fetch {listed(wanted)} for itself",
            "fetch it once into a folder that all nodes share, and set HF_HOME to it",
        )
    return ok(f"{address.hostname} answers; {listed(wanted)} will be fetched")
