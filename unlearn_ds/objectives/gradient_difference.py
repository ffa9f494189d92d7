"""Gradient difference (Maini et al., TOFU, arXiv 2401.06121).

    L = eps_forget * (-CE(forget answer | prompt)) + eps_retain * CE(normal answer | prompt)

Plain cross-entropy on normal data needs no reference, and holds the model less well than a KL does.
"""

from unlearn_ds.config import ObjectiveConfig
from unlearn_ds.objectives import active, ascent
from unlearn_ds.types import Term


def terms(weights: ObjectiveConfig) -> list[Term]:
    """Two terms; the weight of mismatch is not used."""
    return active([ascent(weights), Term("retain", "retain", "ce", weights.eps_retain)])
