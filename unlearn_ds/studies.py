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
from unlearn_ds.config import RunConfig, UsageError, fingerprint, replace
from unlearn_ds.exit_codes import FINISHED
from unlearn_ds.presets import PRESETS
from unlearn_ds.registry import check_name

Changes = Mapping[str, Any] | Callable[[RunConfig], Mapping[str, Any]]
"""Dotted knob -> value, or a function of the run without changes that gives it."""


class Study(NamedTuple):
    """``title``: one line. ``source``: where the paper (arXiv 2310.10683) or its code has it. ``variants``: label ->
    changes; the label is also the folder. ``needs``: knobs that must be above 0, or the variants would not differ.
    ``as_many_tokens``: the other variants take as many steps as give them the response tokens of the first."""

    title: str
    source: str
    variants: Mapping[str, Changes]
    needs: tuple[str, ...] = ()
    as_many_tokens: bool = False


FIXED_REPLY = "I can't help with that."


def _fixed_reply(base: RunConfig) -> Mapping[str, Any]:
    return {"data.mismatch_data": None, "data.mismatch_text": base.data.mismatch_text or FIXED_REPLY}


def _times(factor: int) -> Changes:
    return lambda base: {"optim.max_steps": factor * base.optim.max_steps}


def _published(base: RunConfig) -> Mapping[str, Any]:
    """The published objective and optimizer, as many forget and retain rows a step, about as many rows of all terms.

    With K = 5 a step has more of them, so there are fewer steps.
    """
    preset = PRESETS[base.scenario]["opt-1.3b"]
    changes = {
        knob: value
        for knob, value in preset.items()
        if knob.startswith(("objective.", "optim.")) and knob not in ("optim.batch_size", "optim.max_steps")
    }
    return {**changes, "optim.max_steps": _steps(base, replace(base, **changes), _rows(base))}


def _rows(run: RunConfig) -> dict[str, int]:
    """Rows of an optimizer step of one rank by term, terms of weight 0 left out."""
    objective, forget, retain = run.objective, run.optim.batch_size, run.optim.retain_batch_size
    rows = {
        "forget": forget * (objective.eps_forget > 0),
        "mismatch": forget * objective.num_mismatch * (objective.eps_mismatch > 0),
        "retain": retain * (objective.eps_retain > 0),
    }
    return {term: n for term, n in rows.items() if n}


def _steps(base: RunConfig, other: RunConfig, tokens: Mapping[str, float]) -> int:
    """Steps after which ``other`` has had as many response tokens as ``base`` in all of its steps.

    tokens: response tokens of a step of ``base`` by term, or its rows where all are taken as equally long. Rows of a
    term that only ``other`` has are as long as those to retain, from which mismatch answers come.
    """
    rows = {term: n for term, n in _rows(base).items() if term in tokens}
    length = {term: tokens[term] / n for term, n in rows.items()}
    unknown = length.get("retain", sum(tokens[term] for term in rows) / max(1, sum(rows.values())))
    a_step = sum(n * length.get(term, unknown) for term, n in _rows(other).items())
    return max(1, round(base.optim.max_steps * sum(tokens.values()) / max(1, a_step)))


def _published_at(share: float) -> Changes:
    """The published settings at a share of our learning rate."""
    return lambda base: {**_published(base), "optim.learning_rate": share * base.optim.learning_rate}


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
        "our settings, and the published ones, for as many response tokens",
        "the OPT-1.3B row of the paper's hyper-parameter tables, its code's optimizer, K = 5; answer masks repaired",
        {"ours": {}, "published": _published, "published-our-rate": _published_at(1)},
        as_many_tokens=True,
    ),
    "learning_rate": Study(
        "the published settings at shares of our learning rate, beside ours",
        "ours: what each forgets, and what that costs; settings, optimizer and mask repairs of the study 'published'",
        {
            "ours": {},
            "eighth": _published_at(1 / 8),
            "quarter": _published_at(1 / 4),
            "half": _published_at(1 / 2),
            "our-rate": _published_at(1),
        },
        as_many_tokens=True,
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
    before the next seed. Raises ``UsageError`` for an unknown study, for flags that ``parse`` refuses, and for flags
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
    changes = {variant: made(base) if callable(made) else made for variant, made in study.variants.items()}
    variants = {variant: {**given, **changed} for variant, changed in changes.items()}
    runs = {variant: arguments.parse(knobs) for variant, knobs in variants.items()}
    for knob in given:
        if all(_value(run, knob) != _value(base, knob) for run in runs.values()):
            raise UsageError(f"study '{name}' sets --{_flag(knob)} itself; leave the flag out.")
    for one, other in itertools.combinations(runs, 2):
        if runs[one] == runs[other]:
            raise UsageError(f"study '{name}': with these flags '{one}' and '{other}' are the same run.")
    planned = {}
    for seed in range(base.seed, base.seed + seeds):
        for variant, knobs in variants.items():
            run, own = (variant, {}) if seed == base.seed else (f"{variant}{_OTHER_SEED}{seed}", {"seed": seed})
            planned[run] = {**knobs, **own, "output_dir": str(folder / run)}
    return planned


def settled(name: str, runs: Mapping[str, Mapping[str, Any]], run: str) -> Mapping[str, Any]:
    """Knobs of one run of ``plan``, once the first run is finished: how long its rows are decides the steps of others.

    Steps stay as planned, for as many rows, until then and where ``--stop`` ends runs. Every seed takes the same steps.
    Raises ``UsageError`` where the first run does not say how many response tokens each term had.
    """
    first = next(iter(runs))
    base = arguments.parse(runs[first])
    follows = STUDIES[name].as_many_tokens and label(run) != first and not base.stop.rules
    if not follows or state(base, set(runs[first])) != "finished":
        return runs[run]
    lines = (Path(base.output_dir or "") / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps, prefix = [json.loads(line) for line in lines], "response_tokens_"
    terms = [key for key in steps[-1] if key.startswith(prefix)]
    if not terms or any(key not in step for step in steps for key in terms):
        raise UsageError(
            f"{base.output_dir} was run by an earlier version, which did not count the response tokens of each term: "
            "remove it, and it is run again."
        )
    tokens = {key.removeprefix(prefix): sum(step[key] for step in steps) / len(steps) for key in terms}
    return {**runs[run], "optim.max_steps": _steps(base, arguments.parse(runs[run]), tokens)}


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
