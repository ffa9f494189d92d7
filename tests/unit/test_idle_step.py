"""A step without any gradient is told once, with the reason where there is one."""

import math

import pytest

from unlearn_ds import arguments
from unlearn_ds.config import UsageError
from unlearn_ds.loop import doubts, idle_step


@pytest.mark.parametrize(
    ("norm", "skipped", "bound", "said"),
    [
        (0.0, False, 3.0, "step 4 changed nothing, no weight has a gradient: the answers to forget are all beyond "
                          "--forget_bound 3 already"),
        (0.0, False, 0.0, "step 4 changed nothing, no weight has a gradient"),
        (1e-9, False, 3.0, None),
        (0.0, True, 3.0, None),
    ],
)  # fmt: skip
def test_what_is_said_of_a_step(norm, skipped, bound, said):
    assert idle_step({"step": 4, "grad_norm": norm, "skipped": skipped}, bound) == said


def before(rate=0.5, nll=2.0, perplexity=30.0):
    return {"unlearned": {"rate": rate, "nll": nll}, "neutral": {"perplexity": perplexity}}


def bounded(bound, **flags):
    return arguments.parse({"forget_bound": bound, **flags})


def test_a_run_that_can_work_raises_no_doubt():
    assert doubts(before(), bounded(3.0)) == doubts(before(nll=5.0), bounded(0.0)) == doubts({}, bounded(3.0)) == []
    assert doubts(before(nll=5.0), bounded(3.0, eps_forget=0.0)) == []


def test_a_behaviour_that_is_not_there_and_a_bound_below_the_start_are_told():
    (nothing,) = doubts(before(rate=0.0), bounded(3.0, memorize="false"))
    assert "no prompt shows the behaviour" in nothing and "--memorize true" in nothing
    (taught,) = doubts(before(rate=0.0), bounded(3.0, memorize="true"))
    assert "--memorize" not in taught
    (bound,) = doubts(before(nll=4.5), bounded(3.0))
    assert "4.5 a token" in bound and "--forget_bound 3" in bound


@pytest.mark.parametrize("broken", [{"nll": math.nan}, {"perplexity": math.inf}])
def test_a_model_whose_likelihoods_are_not_finite_is_refused(broken):
    with pytest.raises(UsageError, match="NaN"):
        doubts(before(**broken), bounded(3.0))
