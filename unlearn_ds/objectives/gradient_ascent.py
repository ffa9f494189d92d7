"""Gradient ascent and nothing that holds the model: L = eps_forget * (-CE(forget answer | prompt)).

The simplest baseline of Yao, Xu, Liu (arXiv 2310.10683).
"""

from unlearn_ds.config import ObjectiveConfig
from unlearn_ds.objectives import active, ascent
from unlearn_ds.types import Term


def terms(weights: ObjectiveConfig) -> list[Term]:
    """One term; the weights of mismatch and retain are not used."""
    return active([ascent(weights)])
