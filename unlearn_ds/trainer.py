"""``train(config)``: the whole run, from rows to report, readable from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unlearn_ds import (
    build,
    checkpoint,
    dist,
    doctor,
    ds_json,
    embedded,
    engine,
    export,
    log,
    own_answers,
    report,
    run_folder,
)
from unlearn_ds.config import RunConfig
from unlearn_ds.data import sources
from unlearn_ds.data.encode import Encoder
from unlearn_ds.evaluate import Evaluator
from unlearn_ds.exit_codes import FINISHED
from unlearn_ds.heartbeat import Heartbeat
from unlearn_ds.loop import Run
from unlearn_ds.memorize import memorized
from unlearn_ds.profiler import Profiler
from unlearn_ds.registry import SCENARIOS, resolve
from unlearn_ds.scenarios import ScenarioData

FEW = 10
"""Rows of a set below which a share moves in steps of more than 10 points."""


def train(config: RunConfig, problems: Sequence[str] = ()) -> int:
    """Join the other ranks and run. Returns the exit code. problems: what ``doctor.before_run`` has found here."""
    if not config.log.verbose:
        log.quiet()
    device = engine.start(config.engine)
    with Heartbeat(config.engine.heartbeat_seconds):
        if run_folder.is_finished(config):
            log.say(f"end         {config.output_dir} holds this run, finished")
            return FINISHED
        doctor.same_on_all_ranks(config, problems)
        return unlearn(config, device)


def unlearn(config: RunConfig, device: torch.device) -> int:
    """Evaluate, unlearn, evaluate again, save and report. Returns the exit code."""
    profiler = Profiler(config.log.profile, config.log.trace, engine.device_name(), engine.synchronize)
    folder = run_folder.open_run(config, engine.versions())
    values = ds_json.load(config.engine.ds_config)
    build.check_offload(config, values)
    scenario = resolve("scenario", config.scenario, SCENARIOS)
    stopping = build.stopping(config)

    path = embedded.locate(config.model.path)
    encoder = build.encoder(config, path)
    data = scenario.load(config, encoder)
    report_data(config, data, encoder, folder)
    evaluator = Evaluator(config.eval, scenario, data, encoder) if config.eval.enabled else None
    build.resolve_attention(config, path, values, device)
    stop = log.StopSignal().watch()
    taught = False
    if config.memorize.enabled:
        original = path
        path, outcome = memorized(config, path, values, encoder, data, evaluator, device, stop)
        taught = path != original
        if outcome.exit_code != FINISHED:
            log.say(f"end         while memorizing, step {outcome.step}: {outcome.reason}")
            return outcome.exit_code

    policy = build.policy(config, path, values, device)
    if data.uses_self:
        data.add_own_answers(own_answers.make(config, policy, encoder, data))
    loader = build.loader(config, encoder, data, data.forget["train"])
    reference = build.reference(config, path, values, policy, loader)
    judge = evaluator.judge_name if evaluator else None
    record = run_folder.EvaluationRecord(folder, config.scenario, scenario.label, judge, taught)
    record.values["metrics"] = evaluator.metrics if evaluator else {}

    run = Run(
        config, policy, loader, stop, stopping, reference, folder, evaluator, record, profiler=profiler
    )  # fmt: skip
    state = checkpoint.load_newest(policy, folder / "checkpoints") if config.checkpoint.resume == "auto" else None
    run.begin(state)
    outcome = run.fit(state or {"step": 0, "skipped_in_a_row": 0})
    log.say(f"end         step {outcome.step}: {outcome.reason}")
    if outcome.exit_code == FINISHED:
        outcome = run.finish(outcome)
        record.values["stop"] = {**outcome._asdict(), **stopping.summary()}
        if config.checkpoint.export:
            card = run_folder.model_card(config, record.values, encoder.template)
            with profiler.clock.phase("save"):
                if config.lora.export == "separate":
                    export.adapter(policy, folder / "model", encoder.tokenizer, card, base=path)
                else:
                    export.whole_model(policy, folder / "model", encoder.tokenizer, card)
    profiler.finish(folder)
    # Written last: what says that it has finished is not run again.
    record.end({**outcome._asdict(), **stopping.summary()})
    run_folder.main_only(report.write, folder)
    run_folder.main_only(say_results, folder, record.values)
    stop.unwatch()
    policy.close()
    return outcome.exit_code


def report_data(config: RunConfig, data: ScenarioData, encoder: Encoder, folder: Path) -> None:
    """Log what was read, write down what was rejected, and stop when that is too much."""
    if config.preset:
        log.say(f"preset      {config.preset}")
    for source in data.sources:
        log.say(f"data        {source.use}: {source.describe()}")
    run_folder.main_only(sources.write_rejected, data.sources, folder / "rejected.jsonl")
    sources.check_rejected(data.sources, config.data.max_rejected)
    log.say(
        f"rows        {len(data.forget['train'])} to unlearn, {len(data.forget['validation'])} for validation, "
        f"{len(data.forget['test'])} unseen, {len(data.normal['train'])} to retain; template: {encoder.template}"
    )
    both = {row.key for side in data.forget.values() for row in side}
    both &= {row.key for side in data.normal.values() for row in side}
    if both:
        log.say(
            f"warning     {len(both)} rows are to be forgotten and to be retained: leave them out of one of the two"
        )
    warning = sources.form_warning(data.forget["train"], data.normal["train"])
    if warning:
        log.say(f"warning     {warning}")
    drawn = config.optim.max_steps * config.optim.batch_size * config.optim.gradient_accumulation_steps
    drawn, asked = drawn * dist.world_size(), len(data.unlearned(config.eval.num_unlearned))
    if config.eval.enabled and drawn < asked:
        log.say(
            f"warning     {drawn} of the {asked} prompts that are evaluated as unlearned are trained on: more "
            "--max_steps, or fewer --eval.num_unlearned"
        )
    unseen, normal = len(data.forget["test"]), len(data.normal["test"])
    if config.eval.enabled and min(unseen, normal) < FEW:
        log.say(
            f"warning     only {unseen} unseen prompts and {normal} held-out normal rows are left to be evaluated: "
            "numbers of so few say little"
        )


def say_results(folder: Path, evaluation: dict[str, Any]) -> None:
    """The before/after table and where the rest lies."""
    if evaluation["after"]:
        report.print_table(evaluation)
    if (folder / "model").exists():
        log.say(f"model       {folder / 'model'}")
    log.say(f"report      {folder / 'report.html'}")
