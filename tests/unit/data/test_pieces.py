"""Books cut into pieces: where they begin and end, and that nothing is lost or crosses a border."""

import random

import pytest

from unlearn_ds.config import UsageError
from unlearn_ds.data.encode import Encoder
from unlearn_ds.data.pieces import corpus_sentences, cut, holds_text, passages, read
from unlearn_ds.model import load_tokenizer

TEXT = "the river ran past old stone houses where nobody had lived since winter came early that year"


def story(sentences: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    made = [" ".join(draw.sample(TEXT.split(), draw.randrange(5, 14))).capitalize() + "." for _ in range(sentences)]
    return "\n\n".join(" ".join(made[n : n + 4]) for n in range(0, sentences, 4))


def test_pieces_begin_at_sentence_starts_and_together_are_the_text():
    text = story(120)
    whole = " ".join(text.split())
    pieces = list(cut(text, 200, 200))
    assert len(pieces) > 5
    joined = " ".join(f"{row.prompt} {row.answer}" for row in pieces)
    assert whole.startswith(joined) and len(whole) - len(joined) < 600
    for row in pieces:
        assert row.prompt[0].isupper() and row.answer.endswith(".")


@pytest.mark.parametrize("characters", [50, 200])
def test_a_prompt_fills_its_characters_to_the_last_whole_word(characters):
    for row in cut(story(80), characters, 100):
        assert characters - 12 < len(row.prompt) <= characters and not row.prompt.endswith(" ")
        assert len(row.prompt) + 1 + len(row.answer) >= characters + 100


def test_a_piece_without_a_space_is_rejected(tmp_path):
    (tmp_path / "a.txt").write_text(f"{'x' * 450}.\n\n{story(40)}")
    source = read(str(tmp_path / "a.txt"), 200, 200)
    assert [entry["reason"] for entry in source.rejected] == ["no space between words"]
    assert len(source.rows) > 2 and all(row.prompt and row.answer for row in source.rows)


def test_no_piece_crosses_a_heading_or_an_ornament():
    text = f"{story(30, 1)}\n\nChapter 2: The Mill\n\n{story(30, 2)}\n\n***\n\n{story(30, 3)}"
    assert len(passages(text)) == 3
    pieces = list(cut(text, 100, 100))
    for number in (1, 2, 3):
        chapter = " ".join(story(30, number).split())
        assert any(f"{row.prompt} {row.answer}" in chapter for row in pieces)
    assert not any("Chapter" in row.prompt + row.answer or "*" in row.prompt + row.answer for row in pieces)


def test_hard_wrapped_lines_and_windows_line_ends_make_no_difference():
    text = story(60)
    wrapped = text.replace(". ", ".\r\n").replace("\n\n", "\r\n\r\n")
    assert [row.key for row in cut(text, 100, 100)] == [row.key for row in cut(wrapped, 100, 100)]


def test_a_word_longer_than_the_prompt_is_not_cut():
    row = next(cut("Abcdefghijklmnopqrstuvwxyz and so on it went. And on.", 10, 10))
    assert row.prompt == "Abcdefghijklmnopqrstuvwxyz"


def test_a_folder_is_read_whole_and_repeated_passages_once(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text(story(60, 1))
    (tmp_path / "deep" / "b.txt").write_text(story(60, 2))
    (tmp_path / "copy.txt").write_text(story(60, 1))
    source = read(str(tmp_path), 100, 100)
    assert "3 file" in source.schema and len({row.key for row in source.rows}) == len(source.rows)
    assert {entry["reason"] for entry in source.rejected} == {"duplicate"}
    assert holds_text(str(tmp_path)) and holds_text("Book.TXT") and not holds_text("rows.jsonl")


def test_a_folder_without_text_and_a_text_in_another_encoding_are_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no .txt file"):
        read(str(tmp_path), 100, 100)
    (tmp_path / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    with pytest.raises(UsageError, match="not UTF-8.*Convert it"):
        read(str(tmp_path), 100, 100)


def test_a_piece_is_encoded_as_the_text_that_it_is(random_llama_dir):
    """No template around the prompt, no end token after an answer that goes on, every token of it trained."""
    encoder = Encoder(load_tokenizer(str(random_llama_dir)), "chat")
    piece = next(cut(story(60), 100, 100))
    row = encoder.encode(piece.prompt, piece.answer, piece.continues)
    tokenizer = encoder.tokenizer
    assert tokenizer.decode(row.prompt_ids).endswith(piece.prompt) and "assistant" not in tokenizer.decode(
        row.prompt_ids
    )
    assert tokenizer.decode(row.prompt_ids + row.answer_ids).endswith(f"{piece.prompt} {piece.answer}")
    assert tokenizer.eos_token_id not in row.answer_ids
    assert row.prompt_ids == encoder.prompt_ids(piece.prompt, True)


def test_sentences_of_a_corpus_have_enough_words_for_bleu():
    sentences = corpus_sentences(list(cut("Yes. No. " + story(60), 20, 100)))
    assert sentences and all(len(sentence.split()) >= 4 for sentence in sentences)


@pytest.mark.parametrize("marks", ['""', "\u201c\u201d", "\u2018\u2019", "\u00ab\u00bb"])
def test_dialogue_in_quotation_marks_of_any_kind_is_text(marks):
    plain = story(60)
    quoted = "\n\n".join(f"{marks[0]}{paragraph}{marks[-1]}" for paragraph in plain.split("\n\n"))
    (passage,) = passages(quoted)
    assert " ".join(passage) == " ".join(quoted.split())


def test_a_text_most_of_which_looks_like_headings_is_refused(tmp_path):
    (tmp_path / "verse.txt").write_text("\n\n".join("a line without an end" for _ in range(400)))
    with pytest.raises(UsageError, match="looks like headings"):
        read(str(tmp_path / "verse.txt"), 100, 100)
