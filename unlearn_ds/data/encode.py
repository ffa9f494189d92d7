"""Text to token ids: one template for forget, mismatch, retain and evaluation rows, and the response span.

The span is made of token ids: the ids of the answer are those that follow the ids of the template's end when both are
tokenised together. A prompt has the same ids in training and in generation, and an answer the same after every prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jinja2
from transformers import PreTrainedTokenizerBase

from unlearn_ds.config import UsageError
from unlearn_ds.data.sources import Source
from unlearn_ds.types import EncodedRow, Row

_PROBE = "unlearn_ds probe"
TEMPLATES = {
    # The paper's form, without the trailing space that hides the first answer token from the loss.
    "paper": ("### Question: ", "\n ### Answer:", " "),
    "none": ("", "", " "),
}
"""name -> (before the prompt, after the prompt, before the answer)."""


class Encoder:
    """Encode rows with one tokenizer and one template.

    template: "auto" (chat where the tokenizer has a template, else paper), "chat", "paper" or "none".
    ``end_id`` is the token that ends an answer, in training and in generation.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "auto",
        system_prompt: str | None = None,
        max_length: int = 512,
    ):
        has_chat = tokenizer.chat_template is not None
        if template == "chat" and not has_chat:
            raise UsageError("--data.template chat: this model has no chat template; use paper or none.")
        self.template = ("chat" if has_chat else "paper") if template == "auto" else template
        if system_prompt is not None and self.template != "chat":
            raise UsageError("--data.system_prompt needs the chat template.")
        self.tokenizer, self.system_prompt, self.max_length = tokenizer, system_prompt, max_length
        if self.template == "chat":
            self._boundary = self._chat_text(_PROBE).split(_PROBE)[1]
            self._separator, self.end_id = self._around_answers()
        else:
            _, after, self._separator = TEMPLATES[self.template]
            self._boundary = after or _PROBE
            self.end_id = tokenizer.eos_token_id

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def _chat_text(self, prompt: str, answer: str | None = None) -> str:
        messages = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        messages += [{"role": "user", "content": prompt}]
        messages += [] if answer is None else [{"role": "assistant", "content": answer}]
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=answer is None, tokenize=False)
        except jinja2.TemplateError as error:
            raise UsageError(
                f"the chat template of this model refuses the prompt ({error}); leave --data.system_prompt out, or use "
                "--template paper."
            ) from error

    def _around_answers(self) -> tuple[str, int]:
        """The space that the chat template writes before an answer (Llama-2), and the special token after it.

        In Gemma and Phi-3 that is not the end-of-sequence token, and the model goes on where generation waits for one.
        """
        asked, (answered, after) = self._chat_text("?"), self._chat_text("?", _PROBE).rsplit(_PROBE, 1)
        space = answered.removeprefix(asked)
        special = {token.content: i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        written = max((name for name in special if after.lstrip().startswith(name)), key=len, default=None)
        return space if space.isspace() else "", special.get(written, self.tokenizer.eos_token_id)

    @functools.lru_cache(maxsize=65536)  # noqa: B019 - an encoder lives as long as its run
    def prompt_ids(self, prompt: str, continues: bool = False) -> tuple[int, ...]:
        """Ids of a prompt in the template, or bare when it is to be continued. No prompt at all is the start token."""
        if not prompt:
            start = self.tokenizer.bos_token_id
            return (self.tokenizer.eos_token_id if start is None else start,)
        if self.template == "chat" and not continues:
            # The template writes its own special tokens.
            return tuple(self._ids(self._chat_text(prompt)))
        before, after, _ = TEMPLATES["none" if continues else self.template]
        ids = self._ids(before + prompt + after, special=True)
        # Some tokenizers end every text (T5, ``add_eos_token``): after that no answer would follow.
        return tuple(ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids)

    def answer_ids(self, answer: str, is_running_text: bool = False) -> tuple[int, ...]:
        """Ids of an answer as they follow a prompt, ending in the token that ends an answer (``end_id``).

        A running text ends in the end-of-sequence token, whatever the template.
        """
        if is_running_text:
            return (*self._ids(answer), self.tokenizer.eos_token_id)
        return (*self._following(self._boundary, self._separator, answer), self.end_id)

    def continuation_ids(self, answer: str) -> tuple[int, ...]:
        """Ids of running text as they follow a bare prompt after a space; it goes on, so there is no end token."""
        return self._following(_PROBE, " ", answer)

    def _following(self, boundary: str, separator: str, answer: str) -> tuple[int, ...]:
        ids, before = self._ids(boundary + separator + answer), self._ids(boundary)
        # Where the tokenizer merges across the boundary the answer is tokenised alone: ids of the prompt stay as they
        # will be at generation.
        return tuple(ids[len(before) :] if ids[: len(before)] == before else self._ids(answer))

    def encode(self, prompt: str, answer: str, continues: bool = False) -> EncodedRow | None:
        """Encode one row; a long answer is cut, without an end token. None when nothing of the answer is left."""
        prompt_ids = self.prompt_ids(prompt, continues)
        whole = self.continuation_ids(answer) if continues else self.answer_ids(answer, is_running_text=not prompt)
        answer_ids = whole[: max(0, self.max_length - len(prompt_ids))]
        return EncodedRow(prompt_ids, answer_ids) if answer_ids else None

    def keep_encodable(self, source: Source) -> None:
        """Move rows whose answer is cut to nothing from a source's rows to its rejected ones."""
        source.keep("answer cut to nothing", lambda row: self.encode(row.prompt, row.answer, row.continues) is not None)

    def encode_all(self, rows: Iterable[Row]) -> list[EncodedRow]:
        """Encode rows that ``keep_encodable`` has let through."""
        encoded = [self.encode(row.prompt, row.answer, row.continues) for row in rows]
        return [row for row in encoded if row is not None]
