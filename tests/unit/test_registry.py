from __future__ import annotations

import pytest

from unlearn_ds import registry

TABLES = {name: table for name, table in vars(registry).items() if name.isupper() and isinstance(table, dict)}
ROWS = [(table, name) for table, rows in TABLES.items() for name in rows]


def test_the_tables_are_found():
    assert {"SCENARIOS", "OBJECTIVES", "METRICS", "JUDGES", "REFERENCES"} <= TABLES.keys()
    assert all(TABLES.values())


@pytest.mark.parametrize(("table", "name"), ROWS)
def test_every_row_resolves(table, name):
    assert registry.resolve(table, name, TABLES[table]) is not None


def test_an_unknown_row_is_refused_with_the_nearest_names():
    with pytest.raises(ValueError, match="unknown objective 'ga_mismach'. Did you mean 'ga_mismatch'"):
        registry.resolve("objective", "ga_mismach", registry.OBJECTIVES)


@pytest.mark.parametrize("name", [None, 3, True, ""])
def test_a_name_that_is_no_text_is_refused_too(name):
    with pytest.raises(ValueError, match="unknown objective"):
        registry.check_name("objective", name, registry.OBJECTIVES)


def test_did_you_mean_lists_near_names_first_and_at_most_three():
    assert registry.did_you_mean("eps_forgit", ["eps_forget", "seed", "model"]) == "Did you mean 'eps_forget'?"
    assert registry.did_you_mean("aa", ["aab", "aac", "aad", "aae"]).count("'aa") == 3


def test_did_you_mean_lists_everything_when_nothing_is_near():
    assert registry.did_you_mean("zzz", ["seed", "model"]) == "Valid names: model, seed."


def test_did_you_mean_takes_an_iterable_once():
    assert registry.did_you_mean("zzz", iter(["seed", "model"])) == "Valid names: model, seed."
