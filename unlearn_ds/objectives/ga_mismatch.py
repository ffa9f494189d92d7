"""Gradient ascent with random mismatch and a KL anchor (Yao, Xu, Liu, arXiv 2310.10683, equations 2-6).

L = eps_forget * (-CE(forget answer | prompt)) + eps_mismatch * mean_k CE(unrelated answer_k | prompt)
  + eps_retain * KL(reference || policy)
"""

from unlearn_ds.config import ObjectiveConfig
from unlearn_ds.objectives import active, ascent, mismatch
from unlearn_ds.types import Term


def terms(weights: ObjectiveConfig) -> list[Term]:
    """Terms of the paper's objective."""
    return active(
        [
            ascent(weights),
            mismatch(weights),
            Term("retain", "retain", "kl", weights.eps_retain),
        ]
    )
