"""Copyright: forget a text that the model recites, keep prose and answers (arXiv 2310.10683, section "Copyright").

The text is cut into pieces that begin at sentence starts; a piece is asked for by its first 200 characters. "Unseen"
are pieces of the same work that were recited and never unlearned.
"""

from __future__ import annotations

from unlearn_ds.config import RunConfig, UsageError
from unlearn_ds.data import pieces
from unlearn_ds.data.encode import Encoder
from unlearn_ds.scenarios import SAMPLE, Scenario, ScenarioData, load_rows, refuse_harmless_data
from unlearn_ds.types import Calibration

EMBEDDED = (str(SAMPLE / "copyright.txt"), (f"{SAMPLE / 'prose.txt'}=1", f"{SAMPLE / 'normal.jsonl'}=1"))


def load(config: RunConfig, encoder: Encoder) -> ScenarioData:
    """Pieces of the text to forget and of the prose to keep, and the sentences that the leak threshold is made from."""
    if config.data.source == "full" and not config.data.forget_data:
        raise UsageError("--data full: no copyrighted text is public; name yours with --forget_data and --retain_data.")
    refuse_harmless_data(config)
    data = load_rows(config, encoder, *EMBEDDED)
    data.calibration = Calibration(pieces.corpus_sentences(data.sources[0].rows))
    return data


_ASKED = ("leak_rate", "likelihood", "diversity")
SCENARIO = Scenario(
    load,
    headline="leak_rate",
    label="leak rate",
    metrics={
        "unlearned": _ASKED,
        "unseen": _ASKED,
        "normal": ("likelihood", "similarity_to_original", "diversity"),
    },
    judges=("bleu",),
)
