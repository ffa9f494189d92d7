"""``train(config)``: the whole run, from rows to report, readable from top to bottom."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unlearn_ds import (
    build,
    checkpoint,
    cost,
    dist,
    ds_json,
    embedded,
    engine,
    log,
    lora,
    ops,
    own_answers,
    report,
    run_folder,
)
from unlearn_ds import model as models
from unlearn_ds.config import CheckpointConfig, LoraConfig, ObjectiveConfig, OptimConfig, RunConfig, StopConfig
from unlearn_ds.data import sources
from unlearn_ds.data.encode import Encoder
from unlearn_ds.data.loader import Loader
from unlearn_ds.evaluate import Answers, Evaluator
from unlearn_ds.registry import SCENARIOS, resolve
from unlearn_ds.scenarios import ScenarioData
from unlearn_ds.stopping import Stop, Stopping
from unlearn_ds.types import PackedBatch, Term

FINISHED, DIVERGED, STOPPED = 0, 3, 75
"""Exit codes; ``UsageError`` is 2."""


class Outcome(NamedTuple):
    """How a run ended: after which step, why, with which exit code, and by which rule when it is finished."""

    step: int
    reason: str
    exit_code: int
    rule: str | None = None


def train(config: RunConfig) -> int:
    """Evaluate, unlearn, evaluate again, save and report. Returns the exit code."""
    if not config.log.verbose:
        log.quiet()
    device = engine.start(config.engine)
    folder = run_folder.open_run(config, engine.versions())
    values = ds_json.load(config.engine.ds_config)
    build.check_reference(config)
    scenario = resolve("scenario", config.scenario, SCENARIOS)
    stopping = build.stopping(config)

    path = embedded.locate(config.model.path)
    tokenizer = models.load_tokenizer(path, config.model.revision)
    encoder = Encoder(tokenizer, config.data.template, config.data.system_prompt, config.data.max_length)
    data = scenario.load(config, encoder)
    report_data(config, data, encoder, folder)
    evaluator = Evaluator(config.eval, scenario, data, encoder) if config.eval.enabled else None
    build.resolve_attention(config, path, values, device)
    stop = log.StopSignal().watch()
    if config.memorize.enabled:
        path, outcome = memorized(config, path, values, encoder, data, evaluator, device, stop)
        if outcome.exit_code != FINISHED:
            log.say(f"end         while memorizing, step {outcome.step}: {outcome.reason}")
            return outcome.exit_code

    policy = build.policy(config, path, values, device)
    if data.uses_self:
        data.add_own_answers(own_answers.make(config, policy, encoder, data))
    loader = build.loader(config, encoder, data, data.forget["train"])
    reference = build.reference(config, path, values, policy, loader)
    judge = evaluator.judge_name if evaluator else None
    record = run_folder.EvaluationRecord(folder, config.scenario, scenario.label, judge, bool(config.memorize.enabled))
    record.values["metrics"] = evaluator.metrics if evaluator else {}

    run = Run(config, policy, loader, stop, stopping, reference, folder, evaluator, record)
    state = checkpoint.load_newest(policy, folder / "checkpoints") if config.checkpoint.resume == "auto" else None
    run.begin(state)
    outcome = run.fit(state or {"step": 0, "skipped_in_a_row": 0})
    log.say(f"end         step {outcome.step}: {outcome.reason}")
    record.end({**outcome._asdict(), **stopping.summary()})
    if outcome.exit_code == FINISHED:
        outcome = run.finish(outcome)
        record.end({**outcome._asdict(), **stopping.summary()})
        if config.checkpoint.export:
            card = run_folder.model_card(config, record.values, encoder.template)
            if config.lora.export == "separate":
                engine.export_adapter(policy, folder / "model", tokenizer, card, base=path)
            else:
                engine.export(policy, folder / "model", tokenizer, card)
    run_folder.main_only(report.write, folder)
    run_folder.main_only(say_results, folder, record.values)
    return outcome.exit_code


def report_data(config: RunConfig, data: ScenarioData, encoder: Encoder, folder: Path) -> None:
    """Log what was read, write down what was rejected, and stop when that is too much."""
    for source in data.sources:
        log.say(f"data        {source.describe()}")
    run_folder.main_only(sources.write_rejected, data.sources, folder / "rejected.jsonl")
    sources.check_rejected(data.sources, config.data.max_rejected)
    log.say(
        f"rows        {len(data.forget['train'])} to unlearn, {len(data.forget['validation'])} for validation, "
        f"{len(data.forget['test'])} unseen, {len(data.normal['train'])} to retain; template: {encoder.template}"
    )
    warning = sources.form_warning(data.forget["train"], data.normal["train"])
    if warning:
        log.say(f"warning     {warning}")


def say_results(folder: Path, evaluation: dict[str, Any]) -> None:
    """The before/after table and where the rest lies."""
    if evaluation["after"]:
        report.print_table(evaluation)
    if (folder / "model").exists():
        log.say(f"model       {folder / 'model'}")
    log.say(f"report      {folder / 'report.html'}")


def memorized(
    config: RunConfig, path: str, values: dict[str, Any], encoder: Encoder, data: ScenarioData,
    evaluator: Evaluator | None, device: torch.device, stop: log.StopSignal,
) -> tuple[str, Outcome]:  # fmt: skip
    """Fine-tune the model on the rows to forget, so that it shows the behaviour; returns where it is kept.

    The result is cached under a name made of everything that decides it: weights, rows, template and settings. A model
    that shows the behaviour often enough already is taken as it is.
    """
    config = memorizing(config, len(data.memorize))
    # The global batch decides, not how many ranks share it.
    batch = [dist.world_size() * rows for rows in (config.optim.batch_size, config.optim.retain_batch_size)]
    identity = [models.content_digest(path, config.model.revision), repr(config.memorize), repr(config.objective)]
    identity += [repr(batch), str(config.seed)]
    identity += [repr((encoder.template, encoder.system_prompt, encoder.max_length, ds_json.is_bf16(values)))]
    identity += [row.key for row in (*data.memorize, *data.normal["train"])]
    folder = embedded.cache_folder() / "memorized" / hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    if dist.gather_objects((folder / "config.json").exists())[0]:
        log.say(f"memorized   the model was fine-tuned to show the behaviour first; taken from {folder}")
        return str(folder), Outcome(0, "taken from the cache", FINISHED)
    policy = build.policy(config, path, values, device)
    if evaluator and config.memorize.unless_rate < 1:
        with policy.evaluation_model(config.eval.gather) as (model, synced):
            rate = evaluator.shows(model, synced)
        if rate >= config.memorize.unless_rate:
            log.say(f"memorize    not needed: the model shows the behaviour on {rate:.0%} of the prompts")
            policy.close()
            return path, Outcome(0, "not needed", FINISHED)
    log.say(f"memorize    {len(data.memorize)} rows first, so that there is a behaviour to unlearn")
    loader = build.loader(config, encoder, data, data.memorize)
    outcome = Run(config, policy, loader, stop, build.stopping(config)).fit({"step": 0, "skipped_in_a_row": 0})
    if outcome.exit_code == FINISHED:
        card = (
            f"# {config.model.path}, fine-tuned on {len(data.memorize)} rows to forget: only a subject for unlearning\n"
        )
        engine.export(policy, folder, encoder.tokenizer, card)
    policy.close()
    return str(folder), outcome


def memorizing(config: RunConfig, num_rows: int) -> RunConfig:
    """The configuration of the memorising run: plain fine-tuning for whole passes over ``num_rows`` rows."""
    memorize = config.memorize
    per_rank = math.ceil(memorize.batch_size / dist.world_size())
    return dataclasses.replace(
        config,
        objective=ObjectiveConfig(name="memorize", eps_forget=1.0, eps_retain=memorize.eps_retain),
        optim=OptimConfig(
            learning_rate=memorize.learning_rate,
            max_steps=memorize.epochs * math.ceil(num_rows / (per_rank * dist.world_size())),
            batch_size=per_rank,
            retain_batch_size=math.ceil(memorize.batch_size / 4 / dist.world_size()),
        ),
        checkpoint=CheckpointConfig(),
        stop=StopConfig(),
        lora=LoraConfig(),  # a behaviour that an adapter held would be gone with the adapter off, reference included
    )


@dataclass
class Run:
    """What the loop works on. Without ``folder`` it leaves no record (the memorising run)."""

    config: RunConfig
    policy: engine.Policy
    loader: Loader
    stop: log.StopSignal
    stopping: Stopping
    reference: build.Reference | None = None
    folder: Path | None = None
    evaluator: Evaluator | None = None
    record: run_folder.EvaluationRecord | None = None
    originals: Answers = field(default_factory=dict)
    measured: tuple[int, dict[str, Any], Answers] | None = None
    """Step, numbers and answers of the newest evaluation."""

    def __post_init__(self) -> None:
        self.size = models.size(self.policy.model.config)
        self.num_adapter = lora.size(self.policy.model.config, self.config.lora)
        self.peak_flops = cost.peak_flops(engine.device_name())

    def begin(self, state: dict[str, Any] | None) -> None:
        """Evaluate before the first step, or take up state and record of the run that is being resumed."""
        if state is None:
            self.stopping.after_evaluation(self.evaluate(0, "before"))
        else:
            log.say(f"resume      after step {state['step']}")
            self.stopping.restore(state["stopping"])
            if self.record is not None and dist.is_main():
                self.originals = self.record.restore()
        if not checkpoint.keep_only(self.folder / "best", self.stopping.best_step):
            log.say(f"best        the state of step {self.stopping.best_step} is gone: the best one is looked for anew")
            self.stopping.forget_best()

    def fit(self, state: dict[str, Any]) -> Outcome:
        """Take optimizer steps until they are done, a stop rule fires, the model diverges, or a signal asks to stop.

        A state is evaluated at the start of the next step: after its checkpoint, which therefore never knows of it.
        """
        config, total = self.config, self.config.optim.max_steps
        progress = log.Progress(total, state["step"], config.objective.name, config.log.progress)
        with progress, log.MetricsLog(self.folder, config.log.tensorboard, state["step"]) as metrics:
            for step in range(state["step"] + 1, total + 1):
                if due(step - 1, config.eval.every) and (fired := self.consider(self.evaluate(step - 1), metrics)):
                    return Outcome(step - 1, fired.reason, FINISHED, fired.rule)
                line, signalled = self.step(step, self.stop.asked)
                metrics.write(run_folder.finite(line))
                fired = self.stopping.after_step(line)
                losses = {term.name: line[f"loss_{term.name}"] for term in self.loader.terms}
                progress.update(losses, self.stopping.last_step)
                skipped = state["skipped_in_a_row"] + 1 if line["skipped"] else 0
                state = {"step": step, "skipped_in_a_row": skipped, "stopping": self.stopping.state()}
                if skipped >= config.optim.max_skipped:
                    saved = self.save(state)
                    reason = f"{config.optim.max_skipped} steps in a row were not finite and not applied"
                    return Outcome(
                        step, reason + (f"; {saved} holds the weights before them" if saved else ""), DIVERGED
                    )
                leaving = signalled and step < total and not fired
                saved = self.save(state) if leaving or due(step, config.checkpoint.save_every) else None
                if fired:
                    return Outcome(step, fired.reason, FINISHED, fired.rule)
                if leaving:
                    hint = "; go on with --resume auto" if saved else ""
                    return Outcome(step, f"a signal asked to stop{hint}", STOPPED)
        return Outcome(total, self.stopping.after_last_step(), FINISHED, "max_steps")

    def consider(self, result: dict[str, Any], metrics: log.MetricsLog | None = None) -> Stop | None:
        """Show an evaluation to the stop rules and to TensorBoard; keep the state when it is the best so far."""
        if metrics is not None:
            metrics.scalars("eval", flat(result), result.get("step", 0))
        best = self.stopping.best_step
        fired = self.stopping.after_evaluation(result)
        if self.stopping.best_step != best:
            checkpoint.save(self.policy, self.folder / "best", result["step"], {}, keep=1)
        return fired

    def finish(self, outcome: Outcome) -> Outcome:
        """Evaluate the last state; where the stop rules keep the best one and it is another, go back to that."""
        known = self.measured is not None and self.measured[0] == outcome.step
        result = self.evaluate(outcome.step, "after")
        if not known:
            self.consider(result)
        best = self.stopping.best_step
        if best is None:
            return outcome
        reason = self.stopping.describe_best()
        if best != outcome.step:
            log.say(f"best        {reason}: back to it")
            checkpoint.load_newest(self.policy, self.folder / "best")
            self.evaluate(best, "after")
        return outcome._replace(reason=f"{outcome.reason}; {reason}")

    def step(self, step: int, stop_asked: bool) -> tuple[dict[str, Any], bool]:
        """One optimizer step; returns its line of metrics.jsonl and whether a rank was asked to stop."""
        began, device = time.perf_counter(), self.policy.model.device
        counted = torch.zeros(len(self.loader.terms) + 2, dtype=torch.float64)
        for batch in self.loader.micro_batches(step - 1):
            batch = batch.to(device)
            output = self.policy.loss(batch, self.reference.rows(batch) if self.reference else None)
            self.policy.backward(output.loss)
            result = self.policy.step()
            counts = torch.tensor([batch.num_tokens, batch.num_response_tokens])
            counted += torch.cat([term_values(output.loss_N, batch, self.loader.terms), counts])
        *values, tokens, response_tokens, stopping = dist.sums([*counted.tolist(), stop_asked], device)
        seconds = time.perf_counter() - began
        flops = cost.step_flops(self.size, tokens, response_tokens, self.num_adapter) / dist.world_size()
        line: dict[str, Any] = {"step": step, "loss": 0.0}
        for term, value in zip(self.loader.terms, values, strict=True):
            line[f"loss_{term.name}"] = math.copysign(value, term.weight) / dist.world_size()
            line["loss"] += abs(term.weight) * line[f"loss_{term.name}"]
        return line | {
            "grad_norm": result.grad_norm, "lr": result.learning_rate, "skipped": result.skipped,
            "tokens": int(tokens), "response_tokens": int(response_tokens), "tokens_per_second": tokens / seconds,
            "step_seconds": seconds, "tflops_per_device": flops / seconds / 1e12,
            "mfu": flops / seconds / self.peak_flops if self.peak_flops else None,
            "peak_memory_bytes": engine.peak_memory_bytes(device),
        }, bool(stopping)  # fmt: skip

    def save(self, state: dict[str, int]) -> Path | None:
        """Write a checkpoint and return it; None for a run without a folder."""
        if self.folder is None:
            return None
        return checkpoint.save(
            self.policy, self.folder / "checkpoints", state["step"], state, self.config.checkpoint.keep
        )

    def evaluate(self, step: int, name: str | None = None) -> dict[str, Any]:
        """Evaluate the policy as it is after ``step`` and record it; returns E of evaluation.json on every rank.

        The numbers of a state that was evaluated last are taken from there.
        """
        if self.evaluator is None or self.record is None:
            return {}
        if self.measured is None or self.measured[0] != step:
            log.say(f"evaluate    {name or f'step {step}'}")
            with self.policy.evaluation_model(self.config.eval.gather) as (model, synced):
                result, answers = self.evaluator.run(model, step, self.originals or None, synced)
            # The main rank alone has judged; the others need its numbers for the stop rules.
            self.measured = step, dist.gather_objects(result)[0], answers
        _, result, answers = self.measured
        self.originals = self.originals or answers
        if dist.is_main():
            self.record.add(result, self.evaluator.samples(self.originals, answers), name)
        dist.barrier()
        return result


def term_values(loss_N: torch.Tensor, batch: PackedBatch, terms: Sequence[Term]) -> torch.Tensor:
    """What this micro-batch adds to each term's value, times the number of ranks: float64 [terms].

    The value of a term is the mean its weight multiplies; a bounded sequence counts with its bound.
    """
    means_S = torch.minimum(ops.sequence_means(loss_N.float(), batch), batch.bounds_S).double()
    share_S = torch.zeros_like(means_S).index_add_(0, batch.sequence_N, batch.coefficients_N.double())
    weights = torch.tensor([terms[term].weight for term in batch.term_of_sequence], dtype=torch.float64)
    values_S = means_S.cpu() * share_S.cpu() / weights
    return torch.zeros(len(terms), dtype=torch.float64).index_add_(0, torch.tensor(batch.term_of_sequence), values_S)


def due(step: int, every: int) -> bool:
    """True when something done every ``every`` steps is due after ``step``; 0 means never."""
    return every > 0 and step > 0 and step % every == 0


def flat(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation under the names set/measure."""
    sets = {key: value for key, value in result.items() if isinstance(value, dict)}
    return {f"{group}/{key}": value for group, values in sets.items() for key, value in values.items()}
