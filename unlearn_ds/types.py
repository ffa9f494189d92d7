"""The values that travel between rooms, and the legend of shape suffixes.

Shape legend: T tokens of a packed stream, S sequences in it, U tokens of those when each has a prompt of its own,
N response tokens (rows of the loss), C some of them at a time, V vocabulary, H hidden size, B sequences of a padded
batch, L its length.
``hidden_NH`` is a [N, H] tensor; reductions drop letters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

IGNORE_INDEX = -100
"""Label of a token that takes no part in a loss (the convention of torch and transformers)."""


@dataclass(frozen=True)
class Row:
    """One example as text. ``answer`` is what the row is for: the bad answer of a forget row, the right one of a
    retain row. ``right_answers`` are the answers a metric compares with. ``continues``: the answer continues the prompt
    as running text does, so there is no template between them and no end after them."""

    prompt: str
    answer: str
    right_answers: tuple[str, ...] = ()
    key: str = ""
    continues: bool = False

    @property
    def is_prose(self) -> bool:
        """Running text, in pieces or whole, rather than a prompt and its answer."""
        return self.continues or not self.prompt


@dataclass(frozen=True)
class EncodedRow:
    """One example as token ids; every id of ``answer_ids`` is a response token."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @property
    def key(self) -> str:
        """Name of the row by its ids: template, tokenizer and truncation are in it."""
        ids = repr((self.prompt_ids, self.answer_ids))
        return hashlib.sha256(ids.encode()).hexdigest()[:24]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


class Term(NamedTuple):
    """One term of an objective: which rows, which loss, with which signed weight.

    rows: "forget" | "mismatch" | "retain". loss: "ce" (cross-entropy) | "kl" (forward KL from the reference).
    weight: signed; a negative weight is ascent. bound: a sequence whose mean loss is above it is not pushed further.
    smoothing: label smoothing of a cross-entropy.
    """

    name: str
    rows: str
    loss: str
    weight: float
    bound: float = float("inf")
    smoothing: float = 0.0


class SharedPrompts(NamedTuple):
    """Between a stream in which prompts are shared and its sequences with prompts of their own.

    stream_U: place in the stream of each token of each sequence. home_T: for each token of the stream one place in U.
    """

    stream_U: torch.Tensor
    home_T: torch.Tensor


@dataclass
class PackedBatch:
    """Sequences laid end to end in one stream without padding; attention never crosses a sequence.

    Sequences with one prompt may share its tokens: then each of their answers follows a single copy, attends to that
    prompt and itself, and has the positions it would have alone. U counts tokens of sequences with their own prompts,
    as attention sees them; without sharing U is T.

    Rows of the loss are sorted: all cross-entropy rows first, then all KL rows, so that KL rows are a suffix.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    cu_seqlens: torch.Tensor
    """int32 [S + 1], where each sequence starts and the last one ends, counted in U."""
    max_seqlen: int
    loss_index_N: torch.Tensor
    """Stream positions whose hidden state predicts a response token."""
    targets_N: torch.Tensor
    coefficients_N: torch.Tensor
    """fp32: signed weight of each response token in the loss of this rank; what is minimised is their dot product
    with the per-token losses."""
    sequence_N: torch.Tensor
    """Sequence (0..S-1) each loss row belongs to."""
    bounds_S: torch.Tensor
    """fp32: bound on the mean loss of each sequence, inf where there is none."""
    sequence_lengths_S: torch.Tensor
    """Number of response tokens of each sequence."""
    num_kl_rows: int
    first_kl_token: int = 0
    """Where the sequences with KL rows begin in the stream; they end it, and each has a prompt of its own."""
    max_kl_seqlen: int = 0
    """Longest sequence with KL rows."""
    kl_keys: list[str] = field(default_factory=list)
    """Content keys of the sequences with KL rows, in stream order (the cached reference looks them up)."""
    term_of_sequence: list[int] = field(default_factory=list)
    """Index of the objective's term that each sequence belongs to."""
    shared: SharedPrompts | None = None
    """Where sequences share prompts; None when none does."""
    bounded_index: torch.Tensor | None = None
    """Rows whose sequence has a bound; None when none has."""
    smoothing_N: torch.Tensor | None = None
    """fp32: label smoothing of each row; None when there is none."""

    @property
    def num_tokens(self) -> int:
        return self.input_ids_T.numel()

    @property
    def num_response_tokens(self) -> int:
        return self.targets_N.numel()

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch with every tensor on ``device``."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> PackedBatch:
        """Return the batch in memory that a GPU copies from without waiting."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        changed = {k: function(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        if self.shared is not None:
            changed["shared"] = SharedPrompts(*map(function, self.shared))
        return PackedBatch(**{**vars(self), **changed})


class ReferenceRows(NamedTuple):
    """The frozen reference at the KL rows of a batch: its last hidden states [N_kl, H] and its LM head [V, H].

    weight_VH: None where the policy's own head is frozen and serves both, as with LoRA."""

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor | None


class Answer(NamedTuple):
    """A generated answer. ``flagged``: whether it is counted, as the behaviour, on harmless prompts as a refusal, on
    neutral questions as right; None: no metric counts answers there."""

    text: str
    flagged: bool | None = None


class Calibration(NamedTuple):
    """Texts of the run's own data that a judge may set itself by: answers, to which prompts, and whether each shows the
    behaviour to forget."""

    answers: Sequence[str]
    prompts: Sequence[str] = ()
    labels: Sequence[bool] = ()


class AnswerScore(NamedTuple):
    """A given answer under a model, summed over its tokens: negative log-likelihood, entropy of what the model would
    have said there, tokens than which none was likelier, and all tokens."""

    nll: float
    num_tokens: int
    entropy: float = 0.0
    num_top: int = 0


class Measured(NamedTuple):
    """What a metric may look at: the rows of one set, what the model said, and how likely it finds their answers.

    texts: a generated answer to each prompt; none for sets that are only scored. originals: the same before unlearning.
    scores: how likely the model finds each row's answer; none for sets whose answers nobody scores. judge: decides on
    the behaviour. similarity: compares two texts.
    """

    rows: Sequence[Row]
    texts: Sequence[str] = ()
    originals: Sequence[str] = ()
    scores: Sequence[AnswerScore] = ()
    judge: Any = None
    similarity: Any = None
    margin: float = 0.1


class Scored(NamedTuple):
    """``numbers`` of a metric, and which answers it counts when it counts answers."""

    numbers: dict[str, float]
    flagged: list[bool] | None = None


class LossOutput(NamedTuple):
    """``loss``: scalar to call backward on. ``loss_N``: detached fp32 loss of each row (cross-entropy or KL)."""

    loss: torch.Tensor
    loss_N: torch.Tensor
