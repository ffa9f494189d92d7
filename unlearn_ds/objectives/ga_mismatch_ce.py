"""The paper's objective with plain cross-entropy on normal data instead of the KL (Yao, Xu, Liu, arXiv 2310.10683).

L = eps_forget * (-CE(forget answer | prompt)) + eps_mismatch * mean_k CE(unrelated answer_k | prompt)
  + eps_retain * CE(normal answer | prompt)

Their ablation: it needs no reference, and does not keep general ability as the KL to the original model does.
"""

from unlearn_ds.config import ObjectiveConfig
from unlearn_ds.objectives import active, ascent, mismatch
from unlearn_ds.types import Term


def terms(weights: ObjectiveConfig) -> list[Term]:
    """Terms of ``ga_mismatch``, the one on normal data as cross-entropy."""
    return active(
        [
            ascent(weights),
            mismatch(weights),
            Term("retain", "retain", "ce", weights.eps_retain),
        ]
    )
