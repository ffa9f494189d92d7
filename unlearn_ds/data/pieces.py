"""A book as pieces: each begins at a sentence start and is cut into a prompt and the text that goes on from there.

The extraction attempt of arXiv 2310.10683 (section "Copyright"): 200 characters from a sentence start, decoded greedily
and compared with the true text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sentencex import segment

from unlearn_ds.config import UsageError
from unlearn_ds.data.sources import DUPLICATE, Source, content_key
from unlearn_ds.types import Row

CLOSING = "\"')]}_*\u2019\u201d\u00bb\u203a"
"""What may stand after the end mark of a sentence: quotation marks and brackets of any kind."""
SENTENCE_ENDS = (".", "!", "?", ":", ";", ",", "-", "\u2026", "\u2014", "\u2013")
HEADINGS = 2000
"""Characters of headings that even a short text may have."""
LARGEST_DROPPED = 0.1
"""Share of a text that may look like headings; more means that its paragraphs are not divided by empty lines."""


def holds_text(name: str) -> bool:
    """True for what is read as running text: a txt file or a folder of them."""
    return name.lower().endswith(".txt") or Path(name).expanduser().is_dir()


def read(name: str, prompt_characters: int, answer_characters: int) -> Source:
    """Read a txt file, or every txt file below a folder, as consecutive pieces.

    Raises ``UsageError`` for a folder without text and for text that is not UTF-8.
    """
    path = Path(name).expanduser()
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"{name} holds no .txt file.")
    source = Source(name, f"running text in {len(files)} file(s)")
    seen: set[str] = set()
    for file in files:
        text = _text(file)
        kept = sum(len(sentence) for passage in passages(text) for sentence in passage)
        if kept < (1 - LARGEST_DROPPED) * len(" ".join(text.split())) - HEADINGS:
            raise UsageError(
                f"{file}: {kept} of {len(text)} characters are sentences in paragraphs, the rest looks like headings. "
                "Divide paragraphs by empty lines."
            )
        for index, row in enumerate(cut(text, prompt_characters, answer_characters)):
            if not row.prompt or not row.answer:
                source.reject(index, "no space between words", row.prompt or row.answer)
            elif row.key in seen:
                source.reject(index, DUPLICATE, row.prompt)
            else:
                seen.add(row.key)
                source.rows.append(row)
    if not source.rows:
        raise UsageError(
            f"{name} gives no piece of {prompt_characters} + {answer_characters} characters in whole sentences: give "
            "more text, or lower --data.prompt_characters and --data.answer_characters."
        )
    return source


def passages(text: str) -> list[list[str]]:
    """Sentences in order, in a list of their own for each stretch between headings and ornaments ("***").

    White space is made single; a paragraph without an end mark is a heading.
    """
    found: list[list[str]] = [[]]
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        joined = " ".join(paragraph.split())
        if joined.rstrip(CLOSING).endswith(SENTENCE_ENDS):
            found[-1] += [sentence.strip() for sentence in segment("en", joined)]
        elif found[-1]:
            found.append([])
    return [passage for passage in found if passage]


def cut(text: str, prompt_characters: int, answer_characters: int) -> Iterator[Row]:
    """Consecutive pieces of a text. What is left of a passage at its end is too short for an attempt and is dropped.

    The prompt ends at the last word border within ``prompt_characters``, the answer at the first sentence end after
    ``answer_characters``, so that the next piece begins at a sentence start.
    """
    for passage in passages(text):
        piece = ""
        for sentence in passage:
            piece = f"{piece} {sentence}".lstrip()
            if len(piece) >= prompt_characters + answer_characters:
                yield _piece(piece, prompt_characters)
                piece = ""


def _piece(piece: str, prompt_characters: int) -> Row:
    border = piece.rfind(" ", 0, prompt_characters + 1)
    border = border if border > 0 else piece.find(" ", prompt_characters)
    border = border if border > 0 else len(piece)  # not a single space: no attempt can be made of it
    prompt, answer = piece[:border], piece[border + 1 :]
    return Row(prompt, answer, (), content_key(prompt, answer), continues=True)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8: {error}. Convert it first.") from None


def corpus_sentences(rows: Sequence[Row], least_words: int = 4) -> list[str]:
    """Sentences of the pieces' answers, for a threshold that belongs to the corpus; BLEU needs four words."""
    found = [sentence for row in rows for sentence in segment("en", row.answer)]
    return [sentence for sentence in found if len(sentence.split()) >= least_words]
