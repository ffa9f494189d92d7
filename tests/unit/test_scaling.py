"""Traffic of large models and predicted step times, by what must hold."""

from __future__ import annotations

import re

import pytest

from unlearn_ds import scaling
from unlearn_ds.config import UsageError
from unlearn_ds.cost import shapes
from unlearn_ds.cost.communication import communication, total
from unlearn_ds.cost.gathers import gathers
from unlearn_ds.cost.interconnect import CLUSTERS
from unlearn_ds.cost.scaling import predict
from unlearn_ds.cost.setup import Setup

LLAMA_7B = shapes.public("meta-llama/Llama-2-7b-hf")
LLAMA_70B = shapes.public("meta-llama/Llama-2-70b-hf")
SETUP = Setup(
    stage=3, world_size=64, ranks_per_node=8, bytes_per_weight=2, reference=None, num_tokens=4096, num_kl_tokens=0,
    accumulation=1, checkpointing=True, workspace_bytes=0, reduce_bucket=8192**2, prefetch=int(0.9 * 8192**2),
    persistence=81920,
)  # fmt: skip


def test_a_step_moves_three_models_and_what_stays_for_backward_is_not_gathered_twice():
    found = gathers(LLAMA_70B, SETUP)
    assert found.forward == pytest.approx(LLAMA_70B.total, rel=0.01)
    assert 0 < LLAMA_70B.total - found.backward < 2e9
    assert gathers(LLAMA_70B, SETUP._replace(max_reuse=0, prefetch=0)).backward > found.backward
    assert total(communication(LLAMA_70B, SETUP)) == pytest.approx(3 * 2 * LLAMA_70B.total, rel=0.03)


def test_live_weights_stay_near_their_limit():
    most = gathers(LLAMA_70B, SETUP).most
    assert SETUP.max_live <= most < 1.3 * SETUP.max_live
    assert gathers(LLAMA_70B, SETUP._replace(prefetch=0, max_reuse=0)).most < most


def test_hpz_keeps_the_second_gather_within_the_node():
    plain, hpz = (communication(LLAMA_70B, SETUP._replace(hpz=size)) for size in (1, 8))
    assert total(plain) == total(hpz) and total(plain, group="node") == 0
    assert total(hpz, group="node") == pytest.approx(gathers(LLAMA_70B, SETUP).backward * 2, rel=0.01)
    twice = communication(LLAMA_70B, SETUP._replace(hpz=8, accumulation=2))
    assert total(twice, "all_gather", "world") == total(hpz, "all_gather", "world")


def test_one_rank_exchanges_nothing():
    assert communication(LLAMA_7B, SETUP._replace(world_size=1)) == ()


def test_a_node_waits_for_nvlink_and_many_on_a_slow_network_for_that():
    one = predict(LLAMA_7B, SETUP._replace(world_size=8), CLUSTERS["h100"])
    many = predict(LLAMA_7B, SETUP, CLUSTERS["h100-400g"])
    assert one.network == 0 < one.nvlink and one.limit == "compute"
    assert many.limit == "network" and many.seconds > 1.5 * one.seconds and many.compute == one.compute
    assert predict(LLAMA_7B, SETUP, CLUSTERS["h100"]).seconds < many.seconds


def test_hpz_and_more_tokens_each_help_where_the_network_is_the_limit():
    plain, hpz = (predict(LLAMA_70B, SETUP._replace(hpz=size), CLUSTERS["h100-400g"]) for size in (1, 8))
    longer = predict(LLAMA_70B, SETUP._replace(num_tokens=16384), CLUSTERS["h100-400g"])
    assert hpz.seconds < plain.seconds and hpz.network < 0.8 * plain.network
    assert longer.efficiency > plain.efficiency and longer.network == plain.network


def test_compute_alone_reaches_the_stated_share_of_the_peak():
    """8 FLOPs a parameter and token with recomputation, half of the tokens at the LM head, by hand."""
    shape, step = LLAMA_7B, predict(LLAMA_7B, SETUP._replace(world_size=1), CLUSTERS["a100"])
    body = shape.total - 2 * shape.head - 65 * 4096
    assert step.compute == pytest.approx(8 * (body * 4096 + shape.head * 2048) / (312e12 * 0.55))
    assert step.exposed == 0


def test_the_table_and_the_plot_show_both_configurations_on_each_number_of_gpus(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    points = scaling.lines("llama2-7b", "harmful", "h100-400g")
    assert [p.step.gpus for p in points if p.label == "ZeRO-3"] == list(scaling.GPUS)
    assert [p.step.gpus for p in points if p.label == "hpZ"] == list(scaling.GPUS[1:])
    scaling.say("llama2-7b", "h100-400g", points)
    said = capsys.readouterr().out
    assert "1,024" in said and "network" in said and "…" not in said
    scaling.draw({("llama2-7b", "h100-400g"): points}, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_an_unknown_cluster_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="unknown 'h10'.*h100"):
        scaling.lines("llama2-7b", "harmful", "h10")


def test_the_table_of_the_readme_is_what_the_model_predicts(repository):
    rows = re.findall(
        r"^\| (llama\S+), H100, (\d+) Gb/s a GPU \| ([\d,]+) \| ([\d.]+) s \| ([\d.]*)(?: s)? \| ([\d.]+) s \| (\d+) %"
        r" \| (\w+) \|$",
        (repository / "README.md").read_text(), re.MULTILINE,
    )  # fmt: skip
    assert len(rows) == 9
    for preset, network, gpus, *told in rows:
        cluster = next(n for n, c in CLUSTERS.items() if c.device == "H100" and c.network * 8e-9 == int(network))
        points = scaling.lines(preset, "harmful", cluster)
        found = {p.label: p.step for p in points if p.step.gpus == int(gpus.replace(",", ""))}
        step, hpz = found["ZeRO-3"], found.get("hpZ")
        assert told == [
            f"{step.seconds:.2f}", f"{hpz.seconds:.2f}" if hpz else "", f"{step.network:.2f}",
            f"{step.efficiency * 100:.0f}", step.limit,
        ], (preset, network, gpus)  # fmt: skip
