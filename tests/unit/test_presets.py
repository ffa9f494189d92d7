"""Presets are complete, resolve, and hold the numbers that the paper prints."""

from __future__ import annotations

import dataclasses

import pytest

from unlearn_ds import ds_json
from unlearn_ds.arguments import _coerce, help_text, parse, sections
from unlearn_ds.checks import check
from unlearn_ds.config import UsageError
from unlearn_ds.presets import EMBEDDED_PRESET, PRESETS

ROWS = [(scenario, preset) for scenario, table in PRESETS.items() for preset in table]
KNOBS = {f"{section}.{field.name}" for section, cls in sections().items() for field in dataclasses.fields(cls)}

PAPER = """
    Harmful        OPT-1.3B    GA           2  0.5   NA  1    2e-5  no
    Harmful        OPT-1.3B    GA+Mismatch  2  0.5   1   1    2e-6  no
    Harmful        OPT-2.7B    GA           1  0.1   NA  1    2e-6  no
    Harmful        OPT-2.7B    GA+Mismatch  1  2     1   1    2e-6  no
    Harmful        Llama-2-7B  GA           2  0.05  NA  1    2e-4  yes
    Harmful        Llama-2-7B  GA+Mismatch  2  2     1   1    2e-4  yes
    Copyright      OPT-1.3B    GA           2  0.5   NA  1    2e-5  no
    Copyright      OPT-1.3B    GA+Mismatch  2  0.5   1   1    2e-6  no
    Copyright      OPT-2.7B    GA           1  0.1   NA  1    2e-6  no
    Copyright      OPT-2.7B    GA+Mismatch  1  0.5   1   1    2e-6  no
    Copyright      Llama-2-7B  GA           2  0.1   NA  1    2e-4  yes
    Copyright      Llama-2-7B  GA+Mismatch  2  0.1   1   1    2e-4  yes
    Hallucination  OPT-1.3B    GA           2  0.5   NA  0.5  2e-5  no
    Hallucination  OPT-1.3B    GA+Mismatch  2  0.5   1   0.5  2e-6  no
    Hallucination  OPT-2.7B    GA           1  0.1   NA  0.5  2e-6  no
    Hallucination  OPT-2.7B    GA+Mismatch  1  0.5   1   0.5  2e-6  no
    Hallucination  Llama-2-7B  GA           2  0.05  NA  0.5  2e-4  yes
    Hallucination  Llama-2-7B  GA+Mismatch  2  0.05  1   0.5  2e-4  yes
"""
"""Scenario, model, method, batch size, eps1 (forget), eps2 (mismatch), eps3 (normal), learning rate, LoRA."""
PRINTED = [line.split() for line in PAPER.strip().splitlines()]
MODELS = {
    "OPT-1.3B": ("opt-1.3b", "facebook/opt-1.3b"),
    "OPT-2.7B": ("opt-2.7b", "facebook/opt-2.7b"),
    "Llama-2-7B": ("llama2-7b", "meta-llama/Llama-2-7b-hf"),
}
OURS = {
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-70b": "meta-llama/Meta-Llama-3-70B",
}
OURS |= {f"{preset}-full": path for preset, path in {"llama2-7b": "meta-llama/Llama-2-7b-hf", **OURS}.items()}


def name_of(model: str, method: str) -> str:
    return MODELS[model][0] + ("-ga" if method == "GA" else "")


def weights(config) -> tuple:
    objective, optim = config.objective, config.optim
    rates = (objective.eps_forget, objective.eps_mismatch, objective.eps_retain, optim.learning_rate)
    return (optim.batch_size, *rates, config.lora.rank, optim.max_steps)


@pytest.mark.parametrize(("scenario", "preset"), ROWS)
def test_every_preset_resolves_to_a_configuration_that_passes_its_check(scenario, preset):
    table = PRESETS[scenario][preset]
    assert table.keys() <= KNOBS
    assert all(_coerce(name, given) == given for name, given in table.items())
    config = parse({"scenario": scenario, "preset": preset})
    check(config)
    assert config.preset == preset and config.engine.ds_config in ("auto", *ds_json.names())


@pytest.mark.parametrize("row", PRINTED, ids=lambda row: "-".join(row[:3]))
def test_a_published_row_has_the_numbers_that_the_paper_prints(row):
    scenario, model, method, batch, eps1, eps2, eps3, learning_rate, lora = row
    config = parse({"scenario": scenario.lower(), "preset": name_of(model, method)})
    mismatch = 0.0 if eps2 == "NA" else float(eps2)
    rank = 32 if lora == "yes" else 0
    expected = (int(batch), float(eps1), mismatch, float(eps3), float(learning_rate), rank, 1000)
    assert weights(config) == expected
    assert config.model.path == MODELS[model][1]
    assert not rank or (config.lora.alpha, config.lora.targets) == (16.0, ("q_proj", "v_proj"))
    assert config.optim.gradient_accumulation_steps == 1 and config.objective.num_mismatch == 5


def test_every_scenario_has_the_published_rows_and_ours_and_nothing_unknown():
    published = {name_of(model, method) for _, model, method, *_ in PRINTED}
    assert len(PRINTED) == 18 and len(published) == 6
    assert set(PRESETS) == {row[0].lower() for row in PRINTED}
    for scenario, table in PRESETS.items():
        assert published | OURS.keys() <= table.keys() <= published | OURS.keys() | {EMBEDDED_PRESET}, scenario


@pytest.mark.parametrize("scenario", PRESETS)
@pytest.mark.parametrize("preset", OURS)
def test_a_row_of_ours_is_the_nearest_published_one_on_another_model(scenario, preset):
    config, nearest = (parse({"scenario": scenario, "preset": name}) for name in (preset, "llama2-7b"))
    assert config.model.path == OURS[preset] and config.model.activation_checkpointing
    if preset.endswith("-full"):
        small = parse({"scenario": scenario, "preset": "opt-1.3b"})
        assert config.lora.rank == 0 and config.optim.learning_rate == small.optim.learning_rate == 2e-6
        nearest = dataclasses.replace(nearest, lora=config.lora)
        nearest = dataclasses.replace(nearest, optim=config.optim)
    assert weights(config) == weights(nearest)


@pytest.mark.parametrize("preset", [name for name in OURS if name.endswith("-full")])
def test_all_weights_of_a_preset_of_adapters_have_the_learning_rate_of_all_weights(preset):
    flags = {"scenario": "harmful", "preset": preset.removesuffix("-full"), "lora_rank": "0"}
    assert parse(flags) == parse({"scenario": "harmful", "preset": preset, "lora_rank": "0"})
    assert parse(flags).optim.learning_rate == 2e-6


def test_all_weights_of_a_preset_without_a_rate_for_them_need_one():
    flags = {"scenario": "harmful", "preset": "llama2-7b-ga", "lora_rank": "0"}
    with pytest.raises(UsageError, match="is for adapters; give --learning_rate"):
        parse(flags)
    config = parse({**flags, "learning_rate": "1e-6"})
    assert (config.lora.rank, config.lora.targets, config.optim.learning_rate) == (0, (), 1e-6)


@pytest.mark.parametrize("scenario", PRESETS)
def test_an_unknown_preset_is_refused_with_the_nearest_ones(scenario):
    with pytest.raises(UsageError, match=r"unknown preset 'llama2-7'. Did you mean.*'llama2-7b'"):
        parse({"scenario": scenario, "preset": "llama2-7", "model": "a/b"})


def test_the_help_page_names_every_preset():
    for scenario, table in PRESETS.items():
        (line,) = (line for line in help_text().splitlines() if line.startswith(f"  {scenario}: "))
        assert line == f"  {scenario}: {', '.join(table)}"
