"""Shapes of preset models are those of the architectures, counted without a hub."""

from __future__ import annotations

import pytest
from architectures import CONFIGS
from transformers import AutoConfig

from unlearn_ds import lora, model, presets, sizing
from unlearn_ds.arguments import parse
from unlearn_ds.config import LoraConfig
from unlearn_ds.cost import shapes

PARAMETERS = {
    "facebook/opt-1.3b": 1_315_758_080, "facebook/opt-2.7b": 2_651_596_800,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616, "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192, "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
}  # fmt: skip
"""As the hub shows them."""
SMALL = {**shapes.PUBLIC["meta-llama/Meta-Llama-3-8B"], "num_hidden_layers": 2}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_public_shape_has_the_published_number_of_parameters(name):
    assert shapes.public(name).total == PARAMETERS[name]


def test_every_model_of_a_preset_is_known():
    names = {table["model.path"] for table in presets.PRESETS["harmful"].values() if "model.path" in table}
    assert len(names) > 5 and names <= set(shapes.PUBLIC) == set(PARAMETERS)
    assert shapes.public("org/other") is None


@pytest.mark.parametrize("name", ["facebook/opt-1.3b", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-70b-hf"])
def test_a_shape_from_numbers_is_the_architectures_own(name):
    values = {**shapes.PUBLIC[name], "num_hidden_layers": 2}
    architecture = AutoConfig.for_model(**values)
    ours = shapes.of_values(values)
    assert ours == model.shape(architecture)
    assert ours.size() == model.size(architecture)


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj")])
def test_adapters_are_counted_as_they_are_made(targets):
    config = LoraConfig(rank=8, alpha=16.0, targets=targets)
    architecture = AutoConfig.for_model(**SMALL)
    assert shapes.of_values(SMALL).adapter(8, targets) == lora.size(architecture, config)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "gpt_neox", "phi3", "qwen3", "opt_350m"])
def test_other_architectures_are_counted_from_their_own_modules(name):
    architecture = CONFIGS[name]()
    shape = model.shape(architecture)
    assert shape.total == model.size(architecture).total
    assert len(shape.layer) > 5 and shape.num_layers == 2


def test_a_preset_is_sized_without_a_hub(monkeypatch):
    monkeypatch.setattr(model, "load_config", None)
    shape, num_adapter = sizing.shape_of(parse({"preset": "llama2-7b"}))
    assert shape.num_layers == 32 and num_adapter == 32 * 32 * 4 * 4096
