"""What the figures that a run always has cost a step: ``python kernels/bench/overhead.py [flags of train.py]``.

The same batch, with and without the clock of phases, the count of FLOPs and the row of a step, in pairs whose order
alternates, by the clock and by the processor time of the process, which other load blurs less; and that bookkeeping
alone.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator

from unlearn_ds import arguments, checks, dist, log


@contextlib.contextmanager
def bare(run) -> Iterator[None]:
    """Inside, steps keep no time and count no FLOPs."""
    clock = run.profiler.clock
    clock.phase, run.flops = lambda _: contextlib.nullcontext(), lambda _: (1.0, 1.0)
    yield
    del clock.phase, run.flops


def one_step(run, with_figures: bool) -> tuple[float, float]:
    """Seconds and processor seconds of one step."""
    began, used = time.perf_counter(), time.process_time()
    with contextlib.nullcontext() if with_figures else bare(run):
        line, _ = run.step(1, False)
    if with_figures:
        run.profiler.end_step(line)
    return time.perf_counter() - began, time.process_time() - used


def bookkeeping(run, batches, line, repeats: int = 200) -> float:
    """Processor seconds a step of the figures alone; they never wait."""
    began = time.process_time()
    for _ in range(repeats):
        for batch in batches:
            for name in ("data", "data", "reference", "forward", "backward", "optimizer"):
                with run.profiler.clock.phase(name):
                    pass
            run.flops(batch)
        run.profiler.end_step(line)
    return (time.process_time() - began) / repeats


def main(pairs: str = "20", **flags: str) -> None:
    config = arguments.parse({"output_dir": "runs/overhead", **flags})
    checks.check(config)
    log.quiet()
    from unlearn_ds import throughput

    run = throughput.build_run(arguments.for_machine(config, dist.computes_bf16()), 4 * int(pairs))
    batches = run.batches(1)
    run.batches = lambda _: batches
    one_step(run, True), one_step(run, False)
    pairs_of = [{on: one_step(run, on) for on in ((True, False), (False, True))[n % 2]} for n in range(int(pairs))]
    for which, name in enumerate(("seconds", "processor seconds")):
        ratios = [took[True][which] / took[False][which] for took in pairs_of]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name}: with / without figures {middle:.4f} (quartiles {low:.4f}, {high:.4f}; {pairs} pairs)")
    line, _ = run.step(1, False)
    alone, step = bookkeeping(run, batches, line), statistics.median(took[False][1] for took in pairs_of)
    print(f"a step takes {step * 1e3:.1f} ms of processor time; figures alone {alone * 1e6:.0f} us, {alone / step:.3%}")
    dist.shutdown()


if __name__ == "__main__":
    import fire

    fire.Fire(fire.decorators.SetParseFn(str)(main))
