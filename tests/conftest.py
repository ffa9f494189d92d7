"""Fixtures shared by all tests: two small models on disk and one torch thread."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from pathlib import Path

# Before the libraries read them: no test may reach a hub, and no test may find what an earlier run has cached.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton decides when a kernel is decorated whether to compile or interpret it. Tests of numbers keep their tensors on
# the host, on every machine; those of a GPU are run alone ("pytest -m gpu") and compile. Workers find what was set.
os.environ.setdefault("TRITON_INTERPRET", "0" if ["-m", "gpu"] in map(list, itertools.pairwise(sys.argv)) else "1")
_DATASETS_CACHE = tempfile.TemporaryDirectory(prefix="unlearn_ds_tests_")
os.environ["HF_DATASETS_CACHE"] = _DATASETS_CACHE.name

import pytest  # noqa: E402
import torch  # noqa: E402

from unlearn_ds.registry import KERNELS  # noqa: E402

REPOSITORY = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ASKED = ("Who saw the cat", "Where is the dog", "What did they do", "How do I find the house")
SAID = ("The cat was on the hill.", "It went home to the old house.", "They walked near the river.", "A dog saw it.")
TEXT = (
    "Once upon a time there was a little dog who lived near the river. One day the dog met a big cat, and they walked",
    'together to the old house on the hill. "What is the capital of France?" asked the cat. The answer is Paris.',
    "### Question: Where does the sun rise?\n ### Answer: In the east. It was 1984, and 42 birds sang; nobody heard.",
    "She said that the story was true, but the other children did not believe her. Then they all went home to sleep.",
    "A word is a word, a number is a number: one, two, three, four, five, six, seven, eight, nine, ten and so on.",
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small tensors are faster on one thread, and sums come out the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each row kernel in turn, as the one that ``loss_cases`` takes; without a GPU Triton's is interpreted."""
    monkeypatch.setattr("loss_cases.KERNEL", request.param)
    return request.param


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder beside the repository with models and public data; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared models and data at {SHARED.name}/ beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def random_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama with random weights, a byte-level BPE tokenizer trained on ``TEXT`` and a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("random_llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(request: pytest.FixtureRequest) -> Path:
    """A real 260k-parameter Llama where it is at hand, else the random one."""
    trained = SHARED / "models" / "stories260k"
    return trained if trained.is_dir() else request.getfixturevalue("random_llama_dir")


@pytest.fixture(scope="session")
def speaking_model_dir(tiny_model_dir: Path, request: pytest.FixtureRequest) -> Path:
    """A tiny model that ends its sentences: the real one, else the random one after some steps on short answers."""
    if tiny_model_dir.is_relative_to(SHARED):
        return tiny_model_dir
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(tiny_model_dir) for kind in (AutoModelForCausalLM, AutoTokenizer))
    talk = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{asked} {n}?"}, {"role": "assistant", "content": said}], tokenize=False
        )
        for n, (asked, said) in enumerate(itertools.product(ASKED, SAID))
    ]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(300):
        batch = tokenizer([*TEXT[step % 5 :], *talk[step % 7 :: 7]], padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = request.getfixturevalue("tmp_path_factory").mktemp("speaking_llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
