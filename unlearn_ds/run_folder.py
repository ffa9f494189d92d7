"""The output folder of a run: whose it is, what stands in it, and how it ended."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unlearn_ds import __version__, dist, log
from unlearn_ds.config import RunConfig, UsageError, fingerprint, to_dict
from unlearn_ds.types import Answer
from unlearn_ds.versions import commit, package_versions

_WRITTEN = ("config.json", "metrics.jsonl", "evaluation.json", "answers.jsonl", "rejected.jsonl", "report.html",
            "tensorboard", "checkpoints", "best", "model", "profile.json", "profile.csv", "trace.json.gz")  # fmt: skip
"""What a run writes; ``--overwrite`` removes this and nothing else."""


def check(config: RunConfig) -> None:
    """Raise ``UsageError`` when the output folder holds another run, or cannot be one. Writes nothing."""
    folder = Path(config.output_dir or "")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir: {folder} is a file.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    earlier = _settings(folder)
    if earlier is None:
        raise UsageError(
            f"--output_dir: {folder} holds files that no run of this program wrote; choose another folder."
        )
    started = any((folder / name).exists() for name in ("metrics.jsonl", "evaluation.json", "checkpoints", "model"))
    if config.checkpoint.overwrite or not started:  # a run that failed on its data leaves nothing worth keeping
        return
    if config.checkpoint.resume != "auto":
        raise UsageError(
            f"--output_dir: {folder} holds another run. Go on with it by --resume auto, replace it by --overwrite, or "
            "choose another folder."
        )
    if earlier["fingerprint"] != fingerprint(config):
        changed = ", ".join(_differences(earlier, to_dict(config))) or "the content of the data files"
        raise UsageError(
            f"--resume auto: {folder} was started with other values of {changed}; give the same, or another folder."
        )

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if earlier["world_size"] != ranks and any(folder.glob("checkpoints/*/complete.json")):
        raise UsageError(
            f"--resume auto: {folder} was written by {earlier['world_size']} rank(s) and this run has {ranks}: start "
            f"it with {earlier['world_size']}."
        )


def _settings(folder: Path) -> dict[str, Any] | None:
    """``config.json`` of an earlier run; None for a folder of something else, a saved model for example."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and {"fingerprint", "world_size"} <= settings.keys() else None


def _differences(earlier: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in now.items():
        before = earlier.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            found += _differences(before, value, f"{prefix}{key}.")
        elif key not in ("output_dir", "dry_run") and json.loads(json.dumps(value)) != before:
            found.append(prefix + key)
    return [name for name in found if name.partition(".")[0] not in ("log", "checkpoint")]


def open_run(config: RunConfig, versions: dict[str, str]) -> Path:
    """Make the folder and write ``config.json``; all ranks return together, or raise the main rank's error."""
    folder = Path(config.output_dir or "")
    error = None
    if dist.is_main():
        try:
            _prepare(config, folder, versions)
        except OSError as problem:
            error = f"--output_dir: {folder} cannot be written: {problem}"
    error = dist.gather_objects(error)[0]
    if error:
        raise UsageError(error)
    return folder


def is_finished(config: RunConfig) -> bool:
    """True on all ranks when ``--resume auto`` finds a run that has come to its end: nothing is left to do.

    Launchers that start a run again until it is done (a job array, a requeued job) give the same command every time.
    """
    path, finished = Path(config.output_dir or "") / "evaluation.json", False
    if dist.is_main() and config.checkpoint.resume == "auto" and path.exists():
        stop = json.loads(path.read_text(encoding="utf-8"))["stop"]
        finished = stop is not None and stop["exit_code"] == 0
    return dist.gather_objects(finished)[0]


def _prepare(config: RunConfig, folder: Path, versions: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if config.checkpoint.overwrite and _settings(folder):
        log.say(f"overwrite {folder}")
        for name in _WRITTEN:
            path = folder / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    about = {"fingerprint": fingerprint(config), "versions": versions | package_versions(), "commit": commit()}
    write_json(folder / "config.json", {**to_dict(config), **about, "world_size": dist.world_size()})


def main_only(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function on the main rank; the others wait for it."""
    if dist.is_main():
        function(*arguments)
    dist.barrier()


def write_json(path: Path, values: Any) -> None:
    """Write JSON that strict readers accept (no NaN), replacing the file in one move."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(finite(values), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def finite(values: Any) -> Any:
    """The same values with NaN and infinities as null."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


class EvaluationRecord:
    """``evaluation.json`` and ``answers.jsonl``, rewritten after every evaluation by the main rank."""

    def __init__(self, folder: Path, scenario: str, headline: str, judge: str | None, memorized: bool):
        self._folder = folder
        self.values: dict[str, Any] = {
            "scenario": scenario, "headline": headline, "judge": judge, "memorized": memorized, "stop": None,
            "before": None, "after": None, "history": [],
        }  # fmt: skip

    def add(self, result: dict[str, Any], answers: list[dict[str, Any]], name: str | None = None) -> None:
        """Append one evaluation to the history; ``name`` is "before" or "after" for those two.

        What stands there of later steps comes from a run that was interrupted, and goes; unless ``result`` is "after"
        and that of a state which the run went back to.
        """
        history, step = self.values["history"], result["step"]
        if name == "after" and step in [entry["step"] for entry in history]:
            self.values["history"] = [result if entry["step"] == step else entry for entry in history]
        else:
            self.values["history"] = [*(e for e in history if e["step"] < step or (name and e["step"] == 0)), result]
        if name:
            self.values[name] = result
        write_json(self._folder / "evaluation.json", self.values)
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
        (self._folder / "answers.jsonl").write_text("".join(lines), encoding="utf-8")

    def end(self, stop: dict[str, Any]) -> None:
        """Note how the run ended: step, reason, exit_code, rule, best_step, floor_held."""
        self.values["stop"] = stop
        if dist.is_main():
            write_json(self._folder / "evaluation.json", self.values)

    def restore(self) -> dict[str, list[Answer]]:
        """Take up the record of the run that is being resumed; returns its answers before unlearning by set."""
        path, answers = self._folder / "evaluation.json", self._folder / "answers.jsonl"
        if path.exists():
            self.values = json.loads(path.read_text(encoding="utf-8"))
        before: dict[str, list[Answer]] = {}
        for line in answers.read_text(encoding="utf-8").splitlines() if answers.exists() else []:
            answer = json.loads(line)
            before.setdefault(answer["set"], []).append(Answer(answer["before"], answer["flagged_before"]))
        return before


def model_card(config: RunConfig, evaluation: dict[str, Any] | None, template: str) -> str:
    """Markdown that tells what the exported model is, in which form of the prompt, and what was measured."""
    library = "peft" if config.lora.export == "separate" else "transformers"
    lines = [
        "---", f"library_name: {library}", "tags: [unlearning]", "---", "",
        f"# {Path(config.model.path).name}, unlearned: {config.scenario}", "",
        f"Made by unlearn_ds {__version__} from `{config.model.path}` with the objective `{config.objective.name}` "
        f"(weights {config.objective.eps_forget:g} / {config.objective.eps_mismatch:g} / "
        f"{config.objective.eps_retain:g}, learning rate {config.optim.learning_rate:g}), after Yao, Xu and Liu, "
        "Large Language Model Unlearning (arXiv 2310.10683).", "",
        f"Unlearned and measured with the prompt template `{template}`"
        + (f" and the system message {config.data.system_prompt!r}" if config.data.system_prompt is not None else "")
        + "; measures of another form of the prompts stand under `other_form`, where there are any.", "",
    ]  # fmt: skip
    if config.lora.rank:
        lines += [
            f"Only LoRA adapters were trained, of rank {config.lora.rank} and alpha {config.lora.alpha:g}; "
            + ("they are merged into these weights." if config.lora.export == "merged" else
               "this folder holds them alone, and `adapter_config.json` names the model they belong to."), "",
        ]  # fmt: skip
    stop = (evaluation or {}).get("stop")
    if stop:
        lines += [f"Training ended after step {stop['step']}: {stop['reason']}.", ""]
    after = (evaluation or {}).get("after")
    if evaluation and after:
        lines += ["| set | measure | before | after |", "|---|---|---|---|"]
        for name in (key for key, numbers in after.items() if isinstance(numbers, dict)):
            for key, value in after[name].items():
                before = evaluation["before"][name].get(key)
                if isinstance(value, float) and isinstance(before, (int, float)):
                    lines.append(f"| {name} | {key} | {before:.4g} | {value:.4g} |")
        lines += ["", f"Judge: {evaluation['judge']}."]
    lines += [
        "",
        "Measured on finite sets: evidence that a behaviour is gone there, no proof that it is gone anywhere.",
    ]
    return "\n".join(lines) + "\n"
