from __future__ import annotations

import math

import pytest

from unlearn_ds.config import ObjectiveConfig
from unlearn_ds.objectives import active, ga_mismatch, ga_mismatch_ce, gradient_ascent, gradient_difference, memorize
from unlearn_ds.registry import OBJECTIVES, resolve
from unlearn_ds.types import Term

WEIGHTS = ObjectiveConfig(eps_forget=0.5, eps_mismatch=0.25, eps_retain=2.0)


def test_ga_mismatch_ascends_on_forget_descends_on_mismatch_and_anchors_with_kl():
    assert ga_mismatch.terms(WEIGHTS) == [
        Term("forget", "forget", "ce", -0.5),
        Term("mismatch", "mismatch", "ce", 0.25),
        Term("retain", "retain", "kl", 2.0),
    ]


def test_ga_mismatch_ce_has_the_same_terms_and_holds_with_cross_entropy():
    expected = [term._replace(loss="ce") for term in ga_mismatch.terms(WEIGHTS)]
    assert ga_mismatch_ce.terms(WEIGHTS) == expected != ga_mismatch.terms(WEIGHTS)


def test_gradient_ascent_is_the_ascent_alone():
    assert gradient_ascent.terms(WEIGHTS) == [Term("forget", "forget", "ce", -0.5)]


def test_gradient_difference_holds_with_cross_entropy():
    assert gradient_difference.terms(WEIGHTS) == [
        Term("forget", "forget", "ce", -0.5),
        Term("retain", "retain", "ce", 2.0),
    ]


def test_memorize_descends_on_both_and_is_never_bounded():
    bounded = ObjectiveConfig(eps_forget=0.5, eps_retain=2.0, forget_bound=6.0)
    assert memorize.terms(bounded) == [Term("forget", "forget", "ce", 0.5), Term("retain", "retain", "ce", 2.0)]


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"memorize"}))
def test_unlearning_ascends_with_a_bound_on_the_forget_term_only(name):
    terms = resolve("objective", name, OBJECTIVES)(ObjectiveConfig(forget_bound=6.0))
    assert [(t.weight < 0, t.bound) for t in terms if t.rows == "forget"] == [(True, 6.0)]
    assert all(t.weight > 0 and t.bound == math.inf for t in terms if t.rows != "forget")


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_bound_of_zero_means_no_bound(name):
    terms = resolve("objective", name, OBJECTIVES)(ObjectiveConfig(forget_bound=0.0))
    assert all(term.bound == math.inf for term in terms)


@pytest.mark.parametrize("weight", ["eps_forget", "eps_mismatch", "eps_retain"])
def test_a_weight_of_zero_leaves_its_term_out(weight):
    terms = ga_mismatch.terms(ObjectiveConfig(**{weight: 0.0}))
    assert len(terms) == 2 and weight.removeprefix("eps_") not in [term.name for term in terms]


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_no_acting_term_is_refused(name):
    zero = ObjectiveConfig(eps_forget=0.0, eps_mismatch=0.0, eps_retain=0.0)
    with pytest.raises(ValueError, match="every weight of the objective is 0"):
        resolve("objective", name, OBJECTIVES)(zero)


def test_active_keeps_order_and_negative_weights():
    kept = [Term("a", "forget", "ce", -1.0), Term("c", "retain", "kl", 1.0)]
    assert active([kept[0], Term("b", "mismatch", "ce", 0.0), kept[1]]) == kept


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_each_kind_of_rows_belongs_to_one_term(name):
    """The loader finds a term by its kind of rows."""
    rows = [term.rows for term in resolve("objective", name, OBJECTIVES)(WEIGHTS)]
    assert len(set(rows)) == len(rows) and set(rows) <= {"forget", "mismatch", "retain"}
