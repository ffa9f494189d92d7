"""A step without any gradient is told once, with the reason where there is one."""

import pytest

from unlearn_ds.loop import idle_step


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
