"""The loop of optimizer steps: a packed forward, backward and update each, with evaluations, checkpoints and stops."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unlearn_ds import build, checkpoint, dist, engine, log, matrices, ops, run_folder
from unlearn_ds.config import RunConfig, UsageError
from unlearn_ds.cost import flops
from unlearn_ds.data.loader import Loader
from unlearn_ds.evaluate import Answers, Evaluator
from unlearn_ds.exit_codes import DIVERGED, FINISHED, STOPPED
from unlearn_ds.profiler import Profiler, share, step_line
from unlearn_ds.stopping import Stop, Stopping
from unlearn_ds.types import PackedBatch, Term


class Outcome(NamedTuple):
    """How a run ended: after which step, why, with which exit code, and by which rule when it is finished."""

    step: int
    reason: str
    exit_code: int
    rule: str | None = None


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
    profiler: Profiler = field(default_factory=Profiler)

    def __post_init__(self) -> None:
        self._pool, self._ahead = ThreadPoolExecutor(1, "batches"), {}
        self.products = matrices.products(
            self.policy.model.config, self.config.lora, self.config.model.activation_checkpointing
        )
        self.profiler.watch(self.policy.model, engine.communication_points())

    def begin(self, state: dict[str, Any] | None) -> None:
        """Evaluate before the first step, or take up state and record of the run that is being resumed."""
        if state is None:
            if self.config.checkpoint.resume == "auto":
                log.say("resume      no whole checkpoint here: from the first step")
            result = self.evaluate(0, "before")
            for warning in doubts(result, self.config):
                log.say(f"warning     {warning}")
            self.stopping.after_evaluation(result)
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
        progress, told = log.Progress(total, state["step"], config.objective.name, config.log.progress), False
        with progress, log.MetricsLog(self.folder, config.log.tensorboard, state["step"]) as metrics:
            for step in range(state["step"] + 1, total + 1):
                if due(step - 1, config.eval.every) and (fired := self.consider(self.evaluate(step - 1), metrics)):
                    return Outcome(step - 1, fired.reason, FINISHED, fired.rule)
                self.profiler.begin_step(self.folder, total - state["step"])
                line, signalled = self.step(step)
                row = self.profiler.end_step(line)
                metrics.write(run_folder.finite(line))
                if self.profiler.detailed:
                    metrics.scalars("profile", {name: row[name] for name in row.keys() - line.keys()}, step)
                    progress.say(step_line(line))
                if not told and (idle := idle_step(line, config.objective.forget_bound)):
                    log.say(f"warning     {idle}")
                    told = True
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
                # A finished run leaves nothing to go on from: resumed, it would take one step more.
                due_now = due(step, config.checkpoint.save_every) and not fired
                saved = self.save(state) if leaving or due_now else None
                if fired:
                    return Outcome(step, fired.reason, FINISHED, fired.rule)
                if leaving:
                    hint = "; go on with --resume auto" if saved else ""
                    return Outcome(step, f"a signal asked to stop{hint}", STOPPED)
        if total and state["skipped_in_a_row"] >= total:
            return Outcome(total, "no step was finite, and none was applied", DIVERGED)
        return Outcome(total, self.stopping.after_last_step(), FINISHED, "max_steps")

    def consider(self, result: dict[str, Any], metrics: log.MetricsLog | None = None) -> Stop | None:
        """Show an evaluation to the stop rules and to TensorBoard; keep the state when it is the best so far."""
        if metrics is not None:
            metrics.scalars("eval", flat(result), result.get("step", 0))
        best = self.stopping.best_step
        fired = self.stopping.after_evaluation(result)
        if self.stopping.best_step != best:
            with self.profiler.clock.phase("save"):
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

    def step(self, step: int) -> tuple[dict[str, Any], bool]:
        """One optimizer step; returns its line of metrics.jsonl and whether a rank was asked to stop."""
        began, device, phase = time.perf_counter(), self.policy.model.device, self.profiler.clock.phase
        taken: list[tuple[torch.Tensor, PackedBatch]] = []
        terms = self.loader.terms
        counts = torch.zeros(4 + len(terms), dtype=torch.float64)
        with phase("data"):
            batches = self.batches(step)
        for batch in batches:
            with phase("data"):
                counts += torch.tensor(
                    [batch.num_tokens, batch.num_response_tokens, *self.flops(batch), *response_tokens(batch, terms)]
                )
                batch = batch.to(device)
            with phase("reference"):
                rows = self.reference.rows(batch) if self.reference else None
            with phase("forward"):
                output = self.policy.loss(batch, rows)
            with phase("backward"):
                self.policy.backward(output.loss)
            with phase("optimizer"):
                result = self.policy.step()
            taken.append((output.loss_N, batch))
        values = torch.zeros(len(terms), dtype=torch.float64)
        for loss_N, batch in taken:  # only now: each look at a value waits for the device
            values += term_values(loss_N, batch, terms)
        stopping, tokens, responses, model_flops, hardware_flops, *of_terms = dist.sums(
            [self.stop.asked, *counts.tolist(), *values.tolist()], device
        )
        responses_of_terms, values_of_terms = of_terms[: len(terms)], of_terms[len(terms) :]
        seconds = time.perf_counter() - began
        speed = model_flops / dist.world_size() / seconds
        line: dict[str, Any] = {"step": step, "loss": 0.0}
        for term, value in zip(terms, values_of_terms, strict=True):
            line[f"loss_{term.name}"] = math.copysign(value, term.weight) / dist.world_size()
            line["loss"] += abs(term.weight) * line[f"loss_{term.name}"]
        return line | {
            "grad_norm": result.grad_norm, "lr": result.learning_rate, "skipped": result.skipped,
            "tokens": int(tokens), "response_tokens": int(responses),
            **{f"response_tokens_{term.name}": int(n) for term, n in zip(terms, responses_of_terms, strict=True)},
            "tokens_per_second": tokens / seconds, "step_seconds": seconds, "model_flops": model_flops,
            "hardware_flops": hardware_flops, "tflops_per_device": speed / 1e12,
            "mfu": share(speed, self.profiler.peak), "peak_memory_bytes": engine.peak_memory_bytes(device),
            "host_memory_bytes": engine.host_memory_bytes(),
        }, bool(stopping)  # fmt: skip

    def flops(self, batch: PackedBatch) -> tuple[float, float]:
        """Model FLOPs of a micro-batch on the host, and those that the device does, reference included."""
        model = self.policy.model
        found = flops.count(
            self.products, matrices.work(batch, self.products, model.attention_name, model.device.type),
            checkpointing=self.config.model.activation_checkpointing,
            reference=self.config.engine.reference if self.reference else None,
        )  # fmt: skip
        return found.model, found.hardware

    def batches(self, step: int) -> list[PackedBatch]:
        """The micro-batches of a step; those of the next are packed, and what the reference has on disk for them is
        read, while this one is computed."""
        ready = self._ahead.pop(step, None)
        found = ready.result() if ready else self._prepare(step)
        if step < self.config.optim.max_steps:
            self._ahead[step + 1] = self._pool.submit(self._prepare, step + 1)
        return found

    def _prepare(self, step: int) -> list[PackedBatch]:
        found = self.loader.micro_batches(step - 1)
        for batch in found if self.reference else ():
            self.reference.fetch(batch)
        return [batch.pinned() for batch in found] if torch.cuda.is_available() else found

    def save(self, state: dict[str, int]) -> Path | None:
        """Write a checkpoint and return it; None for a run without a folder."""
        if self.folder is None:
            return None
        with self.profiler.clock.phase("save"):
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
            gathered = self.policy.evaluation_model(self.config.eval.gather)
            with self.profiler.clock.phase("evaluation"), gathered as (model, synced):
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


def response_tokens(batch: PackedBatch, terms: Sequence[Term]) -> list[float]:
    """Response tokens of each term in a micro-batch on the host."""
    of_sequence = torch.tensor(batch.term_of_sequence, dtype=torch.long)
    return torch.zeros(len(terms)).index_add_(0, of_sequence, batch.sequence_lengths_S).tolist()


def due(step: int, every: int) -> bool:
    """True when something done every ``every`` steps is due after ``step``; 0 means never."""
    return every > 0 and step > 0 and step % every == 0


def flat(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation under the names set/measure."""
    sets = {key: value for key, value in result.items() if isinstance(value, dict)}
    return {f"{group}/{key}": value for group, values in sets.items() for key, value in values.items()}


def doubts(before: Mapping[str, Any], config: RunConfig) -> list[str]:
    """What an evaluation before the first step says against the run; ``UsageError`` where the model is broken."""
    if not before:
        return []
    likelihood, rate = before["unlearned"].get("nll"), before["unlearned"]["rate"]
    if not math.isfinite(likelihood or 0.0) or not math.isfinite(before["neutral"].get("perplexity") or 0.0):
        raise UsageError("--model: its likelihoods are not finite before the first step, so its weights hold NaN.")
    found, objective = [], config.objective
    if not rate:
        hint = "" if config.memorize.enabled else "; --memorize true teaches it first, for a trial"
        found.append(
            f"no prompt shows the behaviour before the first step: there is nothing to be seen going away{hint}"
        )
    if likelihood and 0 < objective.forget_bound <= likelihood and objective.eps_forget > 0:
        found.append(
            f"answers to forget have a NLL of {likelihood:.1f} a token before the first step, above --forget_bound "
            f"{objective.forget_bound:g}: most are never pushed; raise it (0: no bound)"
        )
    return found


def idle_step(line: Mapping[str, Any], forget_bound: float) -> str | None:
    """What to say of a step that had nothing to change; None of any other."""
    if line["grad_norm"] != 0 or line["skipped"]:
        return None
    why = f": the answers to forget are all beyond --forget_bound {forget_bound:g} already" if forget_bound else ""
    return f"step {line['step']} changed nothing, no weight has a gradient{why}"
