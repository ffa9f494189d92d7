"""Room on the disks that a run writes to, and whether all nodes see one output folder."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from unlearn_ds import ds_json
from unlearn_ds.config import EMBEDDED_MODEL, stop_rules
from unlearn_ds.local_files import cache_folder, embedded_folder, hub_folder
from unlearn_ds.preflight.files import EMBEDDED_PARAMETERS, model_folder, num_parameters
from unlearn_ds.preflight.findings import Finding, Subject, fail, ok, size, skipped, warn

LEAST = 64 * 2**20
"""Bytes of logs, records and the report of any run, generously."""
ROOM = 1.2
"""Share of what is needed that should be free: file systems slow down, and other users write too."""
LEAST_INODES = 1000
SCRATCH = 2**30
"""Bytes that compilers and data readers may use in TMPDIR."""


class Need(NamedTuple):
    """Bytes that a run writes to a folder. certain: it will, rather than it may."""

    folder: Path
    num_bytes: int
    what: str
    certain: bool = True


def output_folder(subject: Subject) -> Path:
    return Path(subject.config.output_dir or ".").expanduser().absolute()


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def needs(subject: Subject) -> list[Need]:
    """What a run writes where, as far as the size of the model is known.

    A checkpoint holds an fp32 master and two moments, 12 bytes a parameter, and below ZeRO-3 the weights. A new one is
    written before the oldest is dropped. With LoRA, checkpoints hold adapters only.
    """
    config, parameters = subject.config, num_parameters(subject.config)
    out, cache = output_folder(subject), cache_folder()
    found = [Need(out, LEAST, "records"), Need(Path(os.environ.get("TMPDIR", "/tmp")), SCRATCH, "scratch files", False)]
    if parameters is None:
        return found + [Need(hub_folder(), SCRATCH, "a model of unknown size from the hub", False)]
    weights_too = ds_json.stage(subject.ds_values) < 3
    checkpoint = 0 if config.lora.rank else parameters * (12 + weights_too * subject.bytes_per_weight)
    weights = parameters * subject.bytes_per_weight
    if model_folder(config) is None and config.model.path != EMBEDDED_MODEL:
        found.append(Need(hub_folder(), 2 * parameters, "the model from the hub"))
    if config.checkpoint.save_every:
        count = config.checkpoint.keep + 1
        found.append(Need(out, count * checkpoint, f"{count} checkpoints"))
    else:
        found.append(Need(out, 2 * checkpoint, "two checkpoints, if signals stop the run", False))
    if {"rate", "patience"} & stop_rules(config.stop.rules).keys():
        found.append(Need(out, checkpoint, "the best state"))
    if config.checkpoint.export and (config.lora.export == "merged" or not config.lora.rank):
        found.append(Need(out, weights, "the exported model"))
    if config.memorize.enabled:
        found.append(Need(cache, weights, "the memorized model"))
    if config.model.path == EMBEDDED_MODEL and model_folder(config) is None:
        found.append(Need(embedded_folder(), 2 * EMBEDDED_PARAMETERS, "the converted sample model"))
    return [need for need in found if need.num_bytes]


def free(subject: Subject) -> Finding:
    """Free bytes of every disk that this run writes to."""
    return judged(needs(subject), _given_back(subject))


def judged(wanted: Iterable[Need], given_back: int = 0, room: float = ROOM) -> Finding:
    """The finding of some needs, by disk. given_back: bytes in the first folder that the run itself removes."""
    by_disk: dict[int, list[Need]] = defaultdict(list)
    for need in wanted:
        by_disk[existing(need.folder).stat().st_dev].append(need)
    problems, seen = [], []
    for number, disk in enumerate(by_disk.values()):
        there = os.statvfs(existing(disk[0].folder))
        left = there.f_bavail * there.f_frsize + (given_back if number == 0 else 0)
        sure, every = (sum(n.num_bytes for n in disk if n.certain or all_of_it) for all_of_it in (False, True))
        what = ", ".join(f"{size(n.num_bytes)} for {n.what}" for n in disk if n.num_bytes > LEAST) or size(every)
        text = f"{size(left)} free at {existing(disk[0].folder)}; the run writes {what}"
        do = f"free {size(max(room * every - left, 0))} there, name another folder, or write less (--checkpoint.*)"
        if left < sure:
            problems.append(fail(text, do))
        elif left < room * every:
            problems.append(warn(text, do))
        seen.append(text)
    problems.sort(key=lambda finding: finding.status)  # "fail" before "warn"
    return problems[0] if problems else ok("; ".join(seen))


def _given_back(subject: Subject) -> int:
    """Bytes of an earlier run in the output folder that this run replaces."""
    if not (subject.config.checkpoint.overwrite or subject.config.checkpoint.resume == "auto"):
        return 0
    written = [output_folder(subject) / name for name in ("checkpoints", "best", "model")]
    return sum(path.stat().st_size for folder in written for path in folder.rglob("*") if path.is_file())


def inodes(subject: Subject) -> Finding:
    """Files that can still be made in the output folder, the cache and TMPDIR."""
    return judged_inodes({existing(need.folder) for need in needs(subject)})


def judged_inodes(folders: Iterable[Path], least: int = LEAST_INODES) -> Finding:
    counts = {folder: os.statvfs(folder) for folder in folders}
    few = [f"{there.f_favail} at {folder}" for folder, there in counts.items() if there.f_files > 0 and
           there.f_favail < least]  # fmt: skip
    if few:
        return fail(f"inodes left: {', '.join(few)}", "remove small files there (df -i), or name another folder")
    if not any(there.f_files for there in counts.values()):
        return skipped("these file systems have no fixed number of inodes")
    return ok(f"at least {min(t.f_favail for t in counts.values() if t.f_files):,} inodes left")


def writable(subject: Subject) -> Finding:
    """Whether this user may write to the output folder, or make it."""
    folder = existing(output_folder(subject))
    if not folder.is_dir():
        return fail(f"{folder} is a file, so {output_folder(subject)} cannot be made", "name another --output_dir")
    if not os.access(folder, os.W_OK | os.X_OK):
        return fail(f"{folder} cannot be written to by this user", "chown it, or name another --output_dir")
    return ok(str(output_folder(subject)))


class Token:
    """A small file that this node leaves where its output goes, for the other nodes to find, until it is closed."""

    def __init__(self, subject: Subject, name: str):
        self._folder, self._name = existing(output_folder(subject)), name
        self._mine = self._folder / self._file(subject.index)
        self._mine.touch()

    def _file(self, index: int) -> str:
        return f".doctor-{self._name}-{index}"

    def seen(self, indices: Iterable[int]) -> list[int]:
        """Those of the nodes whose files lie here."""
        there = set(os.listdir(self._folder))
        return [index for index in indices if self._file(index) in there]

    def close(self) -> None:
        self._mine.unlink(missing_ok=True)
