"""Ablations as the paper has them: one row of ``STUDIES`` a study, its variants as changes of knobs.

A variant is the run that the user's flags describe with the changes of its row; ``launchers/ablate.py`` runs them.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from unlearn_ds import arguments
from unlearn_ds.config import ObjectiveConfig, RunConfig, UsageError, fingerprint, replace
from unlearn_ds.exit_codes import FINISHED
from unlearn_ds.presets import PRESETS
from unlearn_ds.registry import check_name


class Spent(NamedTuple):
    """What the first variant took, once it is finished: optimizer steps, and response tokens by term of the loss."""

    steps: int
    response_tokens: Mapping[str, int]


Changes = Mapping[str, Any] | Callable[[RunConfig, Spent | None], Mapping[str, Any]]
"""Dotted knob -> value, or a function that gives it: of the run without changes, and of what the first variant took,
None until it is finished."""


class Study(NamedTuple):
    """``title``: one line. ``source``: where the paper (arXiv 2310.10683) or its code has it. ``variants``: label ->
    changes; the label is also the folder. ``needs``: knobs that must be above 0, or the variants would not differ."""

    title: str
    source: str
    variants: Mapping[str, Changes]
    needs: tuple[str, ...] = ()


FIXED_REPLY = "I can't help with that."


def _fixed_reply(base: RunConfig, spent: Spent | None) -> Mapping[str, Any]:
    return {"data.mismatch_data": None, "data.mismatch_text": base.data.mismatch_text or FIXED_REPLY}


def _times(factor: int) -> Changes:
    return lambda base, spent: {"optim.max_steps": factor * base.optim.max_steps}


def _rows(base: RunConfig, objective: ObjectiveConfig) -> dict[str, int]:
    """Rows of an optimizer step by term, those whose weight is 0 left out."""
    forget, retain = base.optim.batch_size, base.optim.retain_batch_size
    rows = {
        "forget": forget * (objective.eps_forget > 0),
        "mismatch": forget * objective.num_mismatch * (objective.eps_mismatch > 0),
        "retain": retain * (objective.eps_retain > 0),
    }
    return {term: n for term, n in rows.items() if n}


def _published(base: RunConfig, spent: Spent | None) -> Mapping[str, Any]:
    """The published objective and optimizer, as many forget and retain rows a step, as many response tokens in all.

    With K = 5 a step has more of them, so there are fewer steps. Until our run has told how long its rows are, all are
    taken as equally long.
    """
    preset = PRESETS[base.scenario]["opt-1.3b"]
    changes = {
        knob: value
        for knob, value in preset.items()
        if knob.startswith(("objective.", "optim.")) and knob not in ("optim.batch_size", "optim.max_steps")
    }
    ours = _rows(base, base.objective)
    steps, tokens = spent or Spent(base.optim.max_steps, {term: base.optim.max_steps * n for term, n in ours.items()})
    length = {term: tokens[term] / steps / n for term, n in ours.items()}
    mean = sum(tokens.values()) / steps / sum(ours.values())
    published = _rows(base, replace(base, **changes).objective)
    a_step = sum(n * length.get(term, mean) for term, n in published.items())
    return {**changes, "optim.max_steps": max(1, round(sum(tokens.values()) / a_step))}


def _published_at(share: float) -> Changes:
    """The published settings at a share of our learning rate."""
    return lambda base, spent: {**_published(base, spent), "optim.learning_rate": share * base.optim.learning_rate}


STUDIES: Mapping[str, Study] = {
    "mismatch": Study(
        "gradient ascent alone, and with random mismatch",
        "the paper's two methods, GA and GA+Mismatch, in its tables of results for all three scenarios",
        {"ascent-alone": {"objective.eps_mismatch": 0.0}, "with-mismatch": {}},
        needs=("objective.eps_mismatch",),
    ),
    "retain_loss": Study(
        "KL to the original model, and cross-entropy, on normal data",
        "the paper's ablation of the loss on normal data",
        {"kl": {"objective.name": "ga_mismatch"}, "cross-entropy": {"objective.name": "ga_mismatch_ce"}},
        needs=("objective.eps_retain",),
    ),
    "reply": Study(
        "random normal answers, and one fixed reply, as mismatch",
        "the paper's templated outputs; --mismatch_text gives another reply",
        {"random-answers": {"data.mismatch_text": None}, "fixed-reply": _fixed_reply},
        needs=("objective.eps_mismatch",),
    ),
    "longer": Study(
        "one, two and four times the optimizer steps",
        "the paper's advice to unlearn 3 to 5 times longer than until the loss jumps",
        {"1x": {}, "2x": _times(2), "4x": _times(4)},
    ),
    "bound": Study(
        "the ascent with and without --forget_bound",
        "ours: the ascent of the paper has no bound, and the one of its code never acts",
        {"bound": {}, "no-bound": {"objective.forget_bound": 0.0}},
        needs=("objective.forget_bound",),
    ),
    "published": Study(
        "our settings, and the published ones, for as many tokens",
        "the OPT-1.3B row of the paper's hyper-parameter tables, its code's optimizer, K = 5; answer masks repaired",
        {"ours": {}, "published": _published, "published-our-rate": _published_at(1)},
    ),
    "learning_rate": Study(
        "ours, and the published settings at shares of our rate, for as many tokens",
        "ours: what each forgets, and what that costs; settings, optimizer and mask repairs of the study 'published'",
        {
            "ours": {},
            "eighth": _published_at(1 / 8),
            "quarter": _published_at(1 / 4),
            "half": _published_at(1 / 2),
            "our-rate": _published_at(1),
        },
    ),
}


_OTHER_SEED = "-seed-"


def label(name: str) -> str:
    """The variant that a run of ``plan`` is one of: ``ours-seed-1`` -> ours."""
    return name.partition(_OTHER_SEED)[0]


def plan(name: str, flags: Mapping[str, Any], folder: Path, seeds: int = 1) -> dict[str, dict[str, Any]]:
    """Run -> dotted knob -> value of the run in ``folder/RUN``, as ``arguments.parse`` takes them.

    flags: those of ``launchers/train.py``, which hold for every variant. seeds: runs of each variant, whose seeds count
    up from the one of the flags; runs are named VARIANT, VARIANT-seed-1 and so on, and all variants of a seed come
    before the next seed. A variant that takes its steps from the first one's is planned anew once that is finished:
    ask again. Raises ``UsageError`` for an unknown study, for flags that ``parse`` refuses, and for flags
    under which variants would not differ or that none of them follows.
    """
    try:
        check_name("study", name, STUDIES)
    except ValueError as error:
        raise UsageError(str(error)) from None
    study = STUDIES[name]
    given = {arguments.FLAT.get(flag, flag): value for flag, value in flags.items() if flag not in arguments.IGNORED}
    base = arguments.parse(given)
    for knob in study.needs:
        if _value(base, knob) <= 0:
            raise UsageError(
                f"study '{name}' needs --{_flag(knob)} above 0; with these flags it is {_value(base, knob)}."
            )
    variants = {variant: {**given, **_changed(made, base)} for variant, made in study.variants.items()}
    runs = {variant: arguments.parse(knobs) for variant, knobs in variants.items()}
    for knob in given:
        if all(_value(run, knob) != _value(base, knob) for run in runs.values()):
            raise UsageError(f"study '{name}' sets --{_flag(knob)} itself; leave the flag out.")
    for one, other in itertools.combinations(runs, 2):
        if runs[one] == runs[other]:
            raise UsageError(f"study '{name}': with these flags '{one}' and '{other}' are the same run.")
    planned: dict[str, dict[str, Any]] = {}
    for seed in range(base.seed, base.seed + seeds):
        suffix, own = ("", {}) if seed == base.seed else (f"{_OTHER_SEED}{seed}", {"seed": seed})
        spent = None
        for n, (variant, made) in enumerate(study.variants.items()):
            run = variant + suffix
            planned[run] = {**given, **_changed(made, base, spent), **own, "output_dir": str(folder / run)}
            spent = _spent(planned[run]) if n == 0 else spent
    return planned


def _changed(made: Changes, base: RunConfig, spent: Spent | None = None) -> Mapping[str, Any]:
    return made(base, spent) if callable(made) else made


def _spent(knobs: Mapping[str, Any]) -> Spent | None:
    """What the run took; None unless it is finished."""
    run = arguments.parse(knobs)
    if state(run, set(knobs)) != "finished":
        return None
    lines = (Path(run.output_dir or "") / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    prefix = "response_tokens_"
    terms = {key.removeprefix(prefix): sum(step[key] for step in steps) for key in steps[0] if key.startswith(prefix)}
    return Spent(len(steps), terms)


CHOSEN = (
    "engine.ds_config", "model.activation_checkpointing", "optim.batch_size", "optim.gradient_accumulation_steps",
    "engine.reference", "optim.retain_batch_size",
)  # fmt: skip
"""Knobs that a run chooses by its machine where they are not given (``choose``, which needs torch)."""


def state(run: RunConfig, given: Collection[str] = ()) -> str:
    """What the output folder of a variant holds: "new" (no step yet), "unfinished", "finished", or "other" (another
    run, or this one with other data). given: knobs that the user or the study sets.

    Knobs that are not given may differ from the default: the machine of that run, which need not be this one, chose.
    """
    folder = Path(run.output_dir or "")
    if not any((folder / name).exists() for name in ("metrics.jsonl", "evaluation.json", "checkpoints", "model")):
        return "new"
    settings = _read(folder / "config.json")
    if not {"fingerprint", "engine", "model", "optim"} <= settings.keys():
        return "other"
    taken = {knob: _value(run, knob) for knob in CHOSEN if knob in given and _value(run, knob) != "auto"}
    for knob in CHOSEN:
        section, name = knob.split(".")
        taken.setdefault(knob, settings[section][name])
    if settings["fingerprint"] != fingerprint(replace(run, **taken)):
        return "other"
    stop = _read(folder / "evaluation.json").get("stop") or {}
    return "finished" if stop.get("exit_code") == FINISHED else "unfinished"


def help_text() -> str:
    """The help page of ``launchers/ablate.py``: every study with its title."""
    lines = [
        "usage: python launchers/ablate.py --study mismatch --scenario hallucination [--flag value ...]", "",
        "Runs the variants of a study one after another and compares them. A finished variant is",
        "not run again, an interrupted one goes on: give the same command again.", "",
        "studies:", *(f"  {name:<12} {study.title}" for name, study in STUDIES.items()), "",
        "  --study NAME         one of the above",
        "  --launch COMMAND     what starts a run, \"deepspeed --num_gpus 8\" for example [this python]",
        "  --output_dir FOLDER  folder of the study; each variant has its own in it [runs/ablation-STUDY]",
        "  --seeds N            runs of each variant, with seeds one apart: mean and spread are compared [1]",
        "  --overwrite          run every variant again",
        "  --dry_run            say what would be run, and stop", "",
        "Every other flag holds for all variants: see python launchers/train.py --help.",
    ]  # fmt: skip
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _value(run: RunConfig, knob: str) -> Any:
    return functools.reduce(getattr, knob.split("."), run)


def _flag(knob: str) -> str:
    return {dotted: flag for flag, dotted in arguments.FLAT.items()}.get(knob, knob)
