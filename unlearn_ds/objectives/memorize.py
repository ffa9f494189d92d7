"""Plain fine-tuning on the forget answers, so that a model shows the behaviour before it is unlearned.

    L = eps_forget * CE(forget answer | prompt) + eps_retain * CE(normal answer | prompt)

The paper does this for copyrighted text; the sample data needs it because no model has made up these very answers.
Normal rows keep the model from answering every question that way.
"""

from unlearn_ds.config import ObjectiveConfig
from unlearn_ds.objectives import active
from unlearn_ds.types import Term


def terms(weights: ObjectiveConfig) -> list[Term]:
    """Descent on both; the weight of mismatch and the bound are not used."""
    return active(
        [
            Term("forget", "forget", "ce", weights.eps_forget),
            Term("retain", "retain", "ce", weights.eps_retain),
        ]
    )
