"""What RLHF learns from: the rows of a scenario as demonstrations, as pairs of answers and as prompts.

Unlearning needs the bad answers alone. RLHF needs an answer that is preferred to each: the right answers of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from unlearn_ds.config import UsageError
from unlearn_ds.data.encode import Encoder
from unlearn_ds.rlhf.recipe import Recipe
from unlearn_ds.scenarios import ScenarioData
from unlearn_ds.types import IGNORE_INDEX, EncodedRow

Rows = Sequence[Mapping[str, Sequence[int]]]


class Preferences(NamedTuple):
    """Token ids by the names that TRL's trainers read.

    demonstrations: {"input_ids", "labels"}. pairs: {"chosen_ids", "rejected_ids"}. prompts: {"input_ids"}.
    """

    demonstrations: Rows
    pairs: Rows
    prompts: Rows


def preferences(data: ScenarioData, encoder: Encoder) -> Preferences:
    """Forget rows of the training split: the first right answer of each is demonstrated, and preferred to the bad one.

    As many normal rows are demonstrated beside them, which is what keeps other answers as they are. Raises
    ``UsageError`` for rows without right answers.
    """
    rows = [row for row in data.forget["train"] if row.right_answers and not row.continues]
    if not rows:
        raise UsageError(
            "RLHF needs an answer that is preferred to each bad one, and the rows to forget have none: give forget "
            "data with right answers, for example --forget_columns prompt,bad_answer,right_answer."
        )
    demonstrations, pairs, prompts = [], [], []
    for row in rows:
        rejected, chosen = encoder.encode(row.prompt, row.answer), encoder.encode(row.prompt, row.right_answers[0])
        if rejected is None or chosen is None:
            continue
        demonstrations.append(_labelled(chosen))
        pairs.append({"chosen_ids": _whole(chosen), "rejected_ids": _whole(rejected)})
        prompts.append({"input_ids": list(chosen.prompt_ids)})
    normal = encoder.encode_all(data.normal["train"][: len(rows)])
    return Preferences([*demonstrations, *map(_labelled, normal)], pairs, prompts)


def check_rows(prompts: Rows, recipe: Recipe) -> None:
    """Raise ``UsageError`` for fewer prompts than an update of PPO takes."""
    if len(prompts) < recipe.samples_a_step:
        raise UsageError(
            f"PPO takes {recipe.samples_a_step} prompts at a time and there are {len(prompts)}: take a smaller "
            "--batch_size."
        )


def padded(tokenizer: PreTrainedTokenizerBase, end_id: int, learned: Preferences) -> PreTrainedTokenizerBase:
    """Prepare a tokenizer for TRL's PPO, in place: it tells padding by its id, and reads id 0 there, so that token must
    stand in no row and end no answer. Raises ``UsageError`` where every special token does."""
    used = {end_id, tokenizer.eos_token_id}
    for pair in learned.pairs:
        used.update(pair["chosen_ids"], pair["rejected_ids"])
    special = sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, *special]
    found = [i for i in candidates if i is not None and i not in used]
    if not found:
        raise UsageError("TRL's PPO needs a special token that stands in no row, for padding, and this model has none.")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(found[0])
    tokenizer.padding_side = "left"
    return tokenizer


def _whole(row: EncodedRow) -> list[int]:
    return [*row.prompt_ids, *row.answer_ids]


def _labelled(row: EncodedRow) -> dict[str, list[int]]:
    return {"input_ids": _whole(row), "labels": [IGNORE_INDEX] * len(row.prompt_ids) + list(row.answer_ids)}
