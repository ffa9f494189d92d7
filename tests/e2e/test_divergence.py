"""A run that diverges: steps that are not finite are never applied, and after a few in a row the run ends with 3."""

from __future__ import annotations

import pytest
import torch
from harness import ds_config, metrics, run, write_data

pytestmark = [pytest.mark.slow, pytest.mark.dist]
MAX_SKIPPED = 2


def tensors(value, path=""):
    """Every floating tensor of a nested checkpoint by its place."""
    if isinstance(value, torch.Tensor):
        return {path: value.detach()} if value.is_floating_point() and value.numel() else {}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {name: leaf for key, inner in pairs for name, leaf in tensors(inner, f"{path}/{key}").items()}


def saved(checkpoint):
    """Weights and optimizer states of a checkpoint, all ranks."""
    files = sorted(path for path in checkpoint.glob("*.pt") if not path.name.startswith("random"))
    assert files, f"{checkpoint} is empty"
    return {
        name: leaf
        for path in files
        for name, leaf in tensors(torch.load(path, weights_only=False, map_location="cpu"), path.name).items()
    }


# Two ranks go through the launcher, which must hand the exit code on.
@pytest.mark.parametrize(("stage", "bf16", "ranks"), [(0, False, 0), (3, False, 2), (3, True, 0)])
def test_no_step_that_is_not_finite_touches_the_weights(tmp_path, tiny_model_dir, stage, bf16, ranks):
    forget, retain = write_data(tmp_path)
    out = tmp_path / "out"
    done = run(
        tmp_path / "cache", "--model", tiny_model_dir, "--forget_data", forget, "--retain_data", retain,
        "--ds_config", ds_config(tmp_path, stage, bf16), "--output_dir", out, "--max_steps", 8, "--batch_size", 4,
        "--learning_rate", 1e30, "--warmup_ratio", 0, "--optim.max_skipped", MAX_SKIPPED, "--reference", "cached",
        "--save_every", 1, "--checkpoint.keep", 9, "--eval.enabled", "false", "--log.tensorboard", "false",
        "--log.progress", "false", ranks=ranks, launched=ranks > 0,
    )  # fmt: skip
    assert done.returncode == 3, done.stdout
    assert f"{MAX_SKIPPED} steps in a row were not finite" in done.stdout
    assert "Traceback" not in done.stdout

    lines = metrics(out)
    assert [line["skipped"] for line in lines] == [False] + [True] * MAX_SKIPPED
    assert lines[0]["grad_norm"] > 0 and all(line["grad_norm"] is None for line in lines[1:])
    assert lines[1]["lr"] == lines[-1]["lr"]  # a step that was not taken does not move the schedule

    first, last = (saved(out / "checkpoints" / f"step-{lines[n]['step']:06d}") for n in (0, -1))
    assert max(float(leaf.abs().max()) for leaf in first.values()) > 1e29  # the first step was applied
    assert first.keys() == last.keys()
    for name, leaf in last.items():
        assert torch.isfinite(leaf).all(), name
        assert torch.equal(leaf, first[name]), name
    assert not (out / "model").exists()
