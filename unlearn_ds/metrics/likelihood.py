"""Likelihood of given answers over response tokens: perplexity, token accuracy, entropy."""

from __future__ import annotations

import math

from unlearn_ds.types import Measured, Scored

version = 2
higher_is_better = False


def likelihood(measured: Measured) -> Scored:
    """``nll``: nats a token over all tokens together; ``perplexity``: its exponential, inf beyond float range.

    ``token_accuracy``: share of tokens than which the model finds none likelier. ``entropy``: mean of its distributions
    at these tokens, in nats: near 0 where it recites, near log(vocabulary) where it has nothing to say.
    """
    count = max(1, sum(score.num_tokens for score in measured.scores))
    nll = sum(score.nll for score in measured.scores) / count
    return Scored({
        "nll": nll, "perplexity": math.exp(nll) if nll < 700 else math.inf,
        "token_accuracy": sum(score.num_top for score in measured.scores) / count,
        "entropy": sum(score.entropy for score in measured.scores) / count,
    })  # fmt: skip
