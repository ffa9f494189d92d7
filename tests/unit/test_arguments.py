from __future__ import annotations

import dataclasses

import pytest

from unlearn_ds import arguments
from unlearn_ds.arguments import FLAT, for_machine, help_text, parse, sections
from unlearn_ds.config import EMBEDDED_MODEL, RunConfig, UsageError, replace, to_dict
from unlearn_ds.presets import EMBEDDED_PRESET

KNOBS = {f"{section}.{field.name}" for section, cls in sections().items() for field in dataclasses.fields(cls)}
OWN = {field.name for field in dataclasses.fields(RunConfig)} - set(sections())


def value(config: RunConfig, dotted: str):
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


# The table of flags


def test_there_are_knobs():
    assert len(KNOBS) > 40 and {"scenario", "seed", "output_dir"} <= OWN


@pytest.mark.parametrize("flag", FLAT)
def test_every_flat_flag_points_to_an_existing_knob_and_hides_no_other(flag):
    assert FLAT[flag] in KNOBS
    assert flag not in OWN and "." not in flag


def test_no_two_flat_flags_set_the_same_knob():
    assert len(set(FLAT.values())) == len(FLAT)


def test_the_flags_that_the_design_promises_exist():
    promised = """
        scenario model data ds_config output_dir resume max_steps batch_size gradient_accumulation_steps learning_rate
        eps_forget eps_mismatch eps_retain num_mismatch reference attention seed eval_every save_every dry_run
        lora_rank lora_alpha lora_targets lora_export
    """
    assert set(promised.split()) <= {*FLAT, *OWN}


def test_the_help_page_names_every_knob_once_with_its_meaning():
    lines = help_text().splitlines()
    flat_of = {dotted: flag for flag, dotted in FLAT.items()}
    for name in OWN | KNOBS:
        found = [line for line in lines if line.split()[:1] == [f"--{flat_of.get(name, name)}"]]
        assert len(found) == 1, name
        assert len(found[0].split()) > 3, f"{name} has no help"


# Unknown names


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("eps_forgot", "eps_forget"),
        ("learningrate", "learning_rate"),
        ("optim.max_step", "optim.max_steps"),
        ("modle", "model"),
        ("eval.judgemodel", "eval.judge_model"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest_valid_ones(flag, near):
    with pytest.raises(UsageError, match=f"unknown flag '--{flag}'.*Did you mean.*'--{near}'"):
        parse({flag: 1})


@pytest.mark.parametrize("flag", ["optim", "optim.", ".max_steps", "optim.max_steps.x", "model.model.path", ""])
def test_a_section_or_a_malformed_name_is_no_flag(flag):
    with pytest.raises(UsageError, match="unknown flag"):
        parse({flag: 1})


def test_an_unknown_scenario_and_an_unknown_preset_are_refused_with_the_nearest():
    with pytest.raises(UsageError, match="unknown scenario 'halucination'. Did you mean 'hallucination'"):
        parse({"scenario": "halucination"})
    with pytest.raises(UsageError, match=r"unknown preset 'opt-1\.3'. Did you mean.*'opt-1\.3b'"):
        parse({"preset": "opt-1.3"})


@pytest.mark.parametrize("rank", [0, 3, "1"])
def test_the_rank_that_the_deepspeed_launcher_appends_is_ignored(rank):
    assert parse({"local_rank": rank, "seed": 5}) == parse({"seed": 5})


# Types


@pytest.mark.parametrize(
    ("flag", "given", "said"),
    [
        ("max_steps", 2.5, "a whole number"),
        ("max_steps", "many", "a whole number"),
        ("max_steps", True, "a whole number"),
        ("max_steps", None, "a whole number"),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", True, "a number"),
        ("learning_rate", (1, 2), "a number"),
        ("overwrite", 1, "true or false"),
        ("overwrite", "yes", "true or false"),
        ("memorize", "no", "true or false"),
        ("model", True, "text"),
        ("output_dir", ["a"], "text"),
        ("model", None, "text"),
        ("forget_columns", True, "a,b,c"),
        ("forget_columns", {"a": 1}, "a,b,c"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_and_the_right_one_named(flag, given, said):
    with pytest.raises(UsageError, match=f"takes {said}; got"):
        parse({flag: given})


@pytest.mark.parametrize(
    ("flag", "given", "expected"),
    [
        ("learning_rate", 1, 1.0),
        ("seed", 7, 7),
        ("model", 123, "123"),
        ("forget_data", None, None),
        ("memorize", None, True),  # resolved: the sample data is used
        ("memorize", False, False),
        ("forget_columns", "q, a", ("q", "a")),
        ("forget_columns", ("q", "a"), ("q", "a")),
        ("forget_columns", ["q", 1], ("q", "1")),
        ("mismatch_text", 42, "42"),
    ],
)
def test_a_value_as_fire_parses_it_becomes_the_type_of_its_knob(flag, given, expected):
    result = value(parse({flag: given}), FLAT.get(flag, flag))
    assert result == expected and type(result) is type(expected)


def test_flat_and_dotted_names_are_the_same_knob():
    assert parse({"optim.max_steps": 3}) == parse({"max_steps": 3})


# Precedence


def test_a_default_gives_way_to_a_preset_and_a_preset_to_a_flag():
    default = RunConfig()
    preset = parse({"preset": "opt-1.3b"})
    assert preset.optim.learning_rate == 2e-6 != default.optim.learning_rate
    assert preset.model.path == "facebook/opt-1.3b" and preset.optim.batch_size == 2
    flag = parse({"preset": "opt-1.3b", "learning_rate": 0.5, "model": "here"})
    assert flag.optim.learning_rate == 0.5 and flag.model.path == "here"
    assert flag.optim.batch_size == 2  # the rest of the preset stays
    assert flag.optim.adam_beta2 == default.optim.adam_beta2  # and the rest of the defaults


def test_the_embedded_model_takes_its_preset_without_being_asked(monkeypatch):
    table = {"hallucination": {EMBEDDED_PRESET: {"optim.max_steps": 17, "optim.batch_size": 3}}}
    monkeypatch.setattr(arguments, "PRESETS", table)
    config = parse({"batch_size": 5})
    assert (config.preset, config.optim.max_steps, config.optim.batch_size) == (EMBEDDED_PRESET, 17, 5)
    assert parse({"model": EMBEDDED_MODEL}).optim.max_steps == 17
    other = parse({"model": "some/model"})
    assert other.preset is None and other.optim.max_steps == RunConfig().optim.max_steps


# Defaults that depend on other knobs


def test_no_knob_is_left_to_be_guessed_later():
    config = parse({})
    assert config.output_dir == "runs/hallucination"
    assert for_machine(config, True).engine.ds_config == "zero3"
    assert for_machine(config, False).engine.ds_config == "zero3_fp32"
    assert for_machine(parse({"ds_config": "zero2"}), False).engine.ds_config == "zero2"
    assert config.optim.retain_batch_size > 0
    assert config.memorize.enabled is True


def test_retain_rows_follow_the_batch_size_unless_given():
    other = {"model": "org/other-model", "batch_size": 5}  # the preset of the embedded model sets both
    assert parse(other).optim.retain_batch_size == 5
    assert parse({"batch_size": 5, "retain_batch_size": 2}).optim.retain_batch_size == 2


def test_the_reference_is_the_model_without_adapters_where_there_are_adapters_and_nothing_else_is_asked_for():
    assert parse({}).engine.reference == "offload"
    assert parse({"lora_rank": 8}).engine.reference == "adapter"
    assert parse({"lora_rank": 8, "reference": "cached"}).engine.reference == "cached"


def test_adapters_are_scaled_by_two_unless_told_otherwise():
    assert parse({}).lora.alpha is None
    assert parse({"lora_rank": 8}).lora.alpha == 16.0
    assert parse({"lora_rank": 8, "lora_alpha": 4}).lora.alpha == 4.0


def test_adapters_have_no_dropout_to_ask_for():
    """With dropout the KL to the reference would not be 0 at the first step."""
    with pytest.raises(UsageError, match="unknown flag '--lora_dropout'"):
        parse({"lora_rank": 8, "lora_dropout": 0.1})


@pytest.mark.parametrize(
    "flags", [{"data": "full"}, {"forget_data": "a.csv", "retain_data": "b.csv"}, {"memorize": False}]
)
def test_only_the_sample_data_is_memorised_first(flags):
    assert parse(flags).memorize.enabled is False


def test_parsing_leaves_the_defaults_alone():
    before = to_dict(RunConfig())
    parse({"max_steps": 1, "model": "x", "forget_columns": "a,b"})
    assert to_dict(RunConfig()) == before
    assert replace(RunConfig(), **{"optim.max_steps": 1, "seed": 2}).optim.max_steps == 1
