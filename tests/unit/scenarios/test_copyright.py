"""Rows of the copyright scenario: pieces of the work, prose beside answers, and the threshold's corpus."""

import json

import pytest

from unlearn_ds import arguments
from unlearn_ds.config import UsageError
from unlearn_ds.data.encode import Encoder
from unlearn_ds.data.sources import form_warning
from unlearn_ds.model import load_tokenizer
from unlearn_ds.scenarios import SAMPLE
from unlearn_ds.scenarios.copyright import load


@pytest.fixture
def encoder(random_llama_dir):
    return Encoder(load_tokenizer(str(random_llama_dir)), "chat", None, 512)


def test_the_sample_is_a_long_text_in_pieces_beside_prose_and_answers(encoder):
    assert len((SAMPLE / "copyright.txt").read_text().split()) >= 8000
    data = load(arguments.parse({"scenario": "copyright"}), encoder)
    assert all(row.continues for side in data.forget.values() for row in side)
    forms = {row.continues for row in data.normal["train"]}
    assert forms == {True, False} == {row.continues for row in data.normal["test"][:40]}
    assert form_warning(data.forget["train"], data.normal["train"]) is None


def test_unseen_pieces_are_of_the_same_work_and_memorised_but_never_unlearned(encoder):
    data = load(arguments.parse({"scenario": "copyright"}), encoder)
    sides = {side: {row.key for row in rows} for side, rows in data.forget.items()}
    assert not sides["train"] & sides["test"] and len(sides["test"]) >= 10
    assert {row.key for row in data.memorize} == sides["train"] | sides["test"]


def test_unrelated_answers_are_prose_too(encoder):
    data = load(arguments.parse({"scenario": "copyright"}), encoder)
    prose = {row.answer for rows, _ in data.retain for row in rows if row.continues}
    assert data.mismatch_answers and set(data.mismatch_answers) == prose


def test_the_corpus_of_the_threshold_is_the_work_to_forget(encoder):
    data = load(arguments.parse({"scenario": "copyright"}), encoder)
    text = " ".join((SAMPLE / "copyright.txt").read_text().split())
    assert len(data.calibration.answers) > 200 and all(sentence in text for sentence in data.calibration.answers)


def test_several_retain_sources_with_weights(tmp_path, encoder):
    book, prose, asked = tmp_path / "book.txt", tmp_path / "prose", tmp_path / "asked.jsonl"
    book.write_text((SAMPLE / "copyright.txt").read_text())
    prose.mkdir()
    (prose / "a.txt").write_text((SAMPLE / "prose.txt").read_text())
    asked.write_text("".join(json.dumps({"prompt": f"p{n}", "response": f"r{n}"}) + "\n" for n in range(30)))
    flags = {"scenario": "copyright", "forget_data": str(book), "retain_data": f"{prose}=1,{asked}=3"}
    data = load(arguments.parse(flags), encoder)
    shares = [sum(row.continues == kind for row in data.normal["train"]) for kind in (True, False)]
    assert shares[1] == pytest.approx(3 * shares[0], rel=0.02)
    assert [source.name for source in data.sources] == [str(book), str(prose), str(asked)]


def test_the_public_data_has_no_book(encoder):
    with pytest.raises(UsageError, match="no copyrighted text is public"):
        load(arguments.parse({"scenario": "copyright", "data": "full"}), encoder)


def test_memorising_comes_first_whatever_the_text():
    flags = {"scenario": "copyright", "forget_data": "a.txt", "retain_data": "b.txt", "model": "org/name"}
    assert arguments.parse(flags).memorize.enabled and arguments.parse(flags).memorize.unless_rate < 1
    assert not arguments.parse({**flags, "memorize": False}).memorize.enabled
