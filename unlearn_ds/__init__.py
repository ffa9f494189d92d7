"""Production unlearning for large language models on DeepSpeed ZeRO-3 (arXiv 2310.10683)."""

__version__ = "0.1.0"
