"""Runs of ``launchers/train.py`` as a user starts them, on a tiny model and small files."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from forked import Forked

REPOSITORY = Path(__file__).parents[1]
MEASURED = (
    "step_seconds", "tokens_per_second", "tflops_per_device", "mfu", "peak_memory_bytes", "host_memory_bytes",
)  # fmt: skip
"""Fields of metrics.jsonl that no two runs share."""

SMALL_EVALUATION = (
    "--eval.num_unlearned", "4", "--eval.num_unseen", "4", "--eval.num_normal", "4", "--eval.num_neutral_texts", "2",
    "--eval.num_neutral_choices", "4", "--eval.num_neutral_questions", "4", "--eval.max_new_tokens", "8",
)  # fmt: skip


def write_data(folder: Path, rows: int = 40) -> tuple[Path, Path]:
    """A forget file in HaluEval's columns and a retain file of prompts and responses, of uneven lengths."""
    draw = random.Random(0)
    nouns = ["dog", "cat", "bird", "fish", "boy", "girl", "tree", "sun", "moon", "ball"]
    verbs = ["saw", "found", "liked", "wanted", "lost"]
    forget, retain = folder / "forget.jsonl", folder / "retain.jsonl"
    forgets, retains = [], []
    for n in range(rows):
        a, b, c = draw.sample(nouns, 3)
        more = " It was a good day." * draw.randrange(3)
        question = f"What did the {a} {draw.choice(verbs)} on day {n}?"
        wrong = f"It was a big {c} that played with the little {b}.{more}"
        forgets.append({"question": question, "right_answer": f"It was a {b}.", "hallucinated_answer": wrong})
        retains.append(
            {"prompt": f"Who was happy in story {n}?", "response": f"The {a} {draw.choice(verbs)} a {b}.{more}"}
        )
    for path, lines in ((forget, forgets), (retain, retains)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return forget, retain


def ds_config(folder: Path, stage: int, bf16: bool = False) -> str:
    """Write a DeepSpeed JSON of one stage and return its path."""
    path = folder / f"zero{stage}{'_bf16' if bf16 else ''}.json"
    precision = {"bf16": {"enabled": True}} if bf16 else {}
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}, **precision}))
    return str(path)


def command(*flags: Any, ranks: int = 0, launcher: str = "train.py") -> list[str]:
    """Command line of a run: through the ``deepspeed`` launcher with ``ranks`` ranks, or plain python with 0."""
    script, words = str(REPOSITORY / "launchers" / launcher), [str(flag) for flag in flags]
    if not ranks:
        return [sys.executable, script, *words]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    return [deepspeed, "--quiet", "--num_accelerators", str(ranks), "--master_port", str(port), script, *words]


def environment(cache: Path) -> dict[str, str]:
    """What a run sees: CPU ranks of one thread, a cache of its own, ninja on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "UNLEARN_DS_CACHE": str(cache), "PATH": path}


def start(
    cache: Path, *flags: Any, ranks: int = 0, launcher: str = "train.py", launched: bool = False
) -> subprocess.Popen[str] | Forked:
    """Start a run; stderr goes to stdout. launched: as a user does, by ``command``, and not forked."""
    if not launched:
        return Forked(REPOSITORY / "launchers" / launcher, [str(flag) for flag in flags], environment(cache), ranks)
    return subprocess.Popen(
        command(*flags, ranks=ranks, launcher=launcher),
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str] | Forked, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Wait for a run and return its output and exit code; one that takes longer is killed."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def run(cache: Path, *flags: Any, timeout: int = 300, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run to the end and return output (stderr in stdout) and exit code. how: see ``start``."""
    return finish(start(cache, *flags, **how), timeout)


def as_if_killed(out: Path, after_step: int) -> None:
    """Make of a finished run one that was killed after the checkpoint of that step."""
    for path in out.glob("checkpoints/step-*"):
        if path.name > f"step-{after_step:06d}":
            shutil.rmtree(path)
    record = json.loads((out / "evaluation.json").read_text())
    (out / "evaluation.json").write_text(json.dumps({**record, "stop": None}))


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines, f"{folder} has no metrics"
    return lines


def without_measured(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def says_what_was_recorded(out: Path, max_new_tokens: int = 8) -> bool:
    """Whether ``out/model``, loaded by transformers alone, gives the answers that the last evaluation recorded."""
    from transformers import AutoModelForCausalLM

    from unlearn_ds import generate, model
    from unlearn_ds.config import EvalConfig
    from unlearn_ds.data.encode import Encoder

    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    causal_lm = AutoModelForCausalLM.from_pretrained(out / "model", attn_implementation="sdpa")
    encoder = Encoder(model.load_tokenizer(str(out / "model")))
    other = Encoder(encoder.tokenizer, "paper" if encoder.template == "chat" else "none")
    prompts = [(other if a["set"] == "other_form" else encoder).prompt_ids(a["prompt"]) for a in answers]
    order, size = sorted(range(len(answers)), key=lambda i: (len(prompts[i]), i)), EvalConfig().batch_size
    said = []
    for batch in (order[start : start + size] for start in range(0, len(order), size)):
        said += generate.greedy_batch(causal_lm, encoder, [prompts[i] for i in batch], max_new_tokens, False)
    return said == [answers[i]["after"] for i in order]
