"""Negative log-likelihood of given answers and perplexity, over response tokens."""

from __future__ import annotations

import math

from unlearn_ds.types import Measured, Scored

version = 1
higher_is_better = False


def likelihood(measured: Measured) -> Scored:
    """``nll``: nats a token over all tokens together; ``perplexity``: its exponential, inf beyond float range."""
    nll = sum(measured.nll_sums) / max(1, sum(measured.token_counts))
    return Scored({"nll": nll, "perplexity": math.exp(nll) if nll < 700 else math.inf})
