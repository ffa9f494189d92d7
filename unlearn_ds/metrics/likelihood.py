"""Negative log-likelihood of given answers and perplexity, over response tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

version = 1
higher_is_better = False


def likelihood(nll_sums: Sequence[float], token_counts: Sequence[int]) -> dict[str, float]:
    """``nll``: nats a token over all tokens together; ``perplexity``: its exponential, inf beyond float range."""
    nll = sum(nll_sums) / max(1, sum(token_counts))
    return {"nll": nll, "perplexity": math.exp(nll) if nll < 700 else math.inf}
