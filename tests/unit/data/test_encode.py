"""The response span: which ids of a row are the answer, for byte-level BPE and SentencePiece-like tokenizers."""

from __future__ import annotations

import copy

import pytest
import real_tokenizers
from real_tokenizers import CHATML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unlearn_ds.config import UsageError
from unlearn_ds.data.encode import TEMPLATES, Encoder
from unlearn_ds.data.packing import Placed, pack
from unlearn_ds.data.sources import Source
from unlearn_ds.types import Row, Term

CORPUS = [
    "### Question: What is the capital of France?\n ### Answer: Paris is the capital of France.",
    "### Question: When was it?\n ### Answer: 1984 was the year, and 42 people came: one, two, three.",
    "Once upon a time there was a little dog. \"Hello\" said the cat.\n\nThe dog said 'hi' and went home.",
    "Café, naïve, Zürich, où, él. 東京は日本の首都です。 # # ## ### Question Answer : . , ! ?",
] * 4

PROMPTS = [
    "What is the capital of France?",
    "x",
    "Is ### Answer: a heading? ### Question: or not",
    "Question: why does this say Question: twice? ### ###",
    "Trailing space ",
    "Zwei\nZeilen",
    "東京はどこですか",
    'ends in a quote "',
]
ANSWERS = [
    "Paris is the capital of France.",
    "1984",
    '"Hello" said the cat.',
    "'hi'",
    "été",
    "Élan vital",
    "東京です。",
    "*starred* - dashed",
    "### Answer: again ### Question: what",
    ": colon first",
    "🙂",
    "a",
]
TEMPLATE_NAMES = ["paper", "none", "chat"]


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, OPT, Llama-3, SmolLM: spaces belong to the word that follows; no start token of its own accord."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def with_bos(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """As Llama-2 and Mistral: a start token, spaces as U+2581, a space added in front of the text."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted({character for text in [*CORPUS, *PROMPTS, *ANSWERS] for character in text})
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return with_bos(bpe)


def sentencepiece_unigram() -> PreTrainedTokenizerFast:
    """As T5 and Gemma: a unigram model over the same marks."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted({character for text in [*CORPUS, *PROMPTS, *ANSWERS] for character in text})
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=special, unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
    )
    unigram.train_from_iterator(CORPUS, trainer)
    return with_bos(unigram)


def merging_across_words() -> PreTrainedTokenizerFast:
    """A tokenizer with pieces that reach over a space, such as ``: 1``: prompt and answer can melt together."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.decoder = decoders.Fuse()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    texts = [
        *CORPUS,
        "\n ### Answer: Paris",
        "\n ### Answer: 1984",
        "<|im_start|>assistant\nParis",
        *PROMPTS,
        *ANSWERS,
    ] * 4
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "byte_level": byte_level,
    "sentencepiece_bpe": sentencepiece_bpe,
    "sentencepiece_unigram": sentencepiece_unigram,
    "merging_across_words": merging_across_words,
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return real_tokenizers.load_all(tmp_path_factory.mktemp("tokenizers"), [*PROMPTS, *ANSWERS, *CORPUS])


@pytest.fixture(scope="module", params=[*TOKENIZERS, *real_tokenizers.FAMILIES])
def tokenizer(request, real):
    name = request.param
    made = TOKENIZERS[name]() if name in TOKENIZERS else copy.deepcopy(real[name])
    made.chat_template = made.chat_template or CHATML
    return made


@pytest.fixture(scope="module")
def byte_tokenizer():
    made = byte_level()
    made.chat_template = CHATML
    return made


def generation_text(tokenizer, template: str, prompt: str) -> str:
    """What a user would send to the model to have ``prompt`` answered."""
    if template == "chat":
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, after, _ = TEMPLATES[template]
    return before + prompt + after


# The span, over all tokenizers, templates, prompts and answers


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_span_decodes_to_the_answer_and_ends_in_the_end_token(tokenizer, template, answer):
    encoder = Encoder(tokenizer, template)
    for prompt in PROMPTS:
        row = encoder.encode(prompt, answer)
        assert row.answer_ids[-1] == encoder.end_id
        assert not {encoder.end_id, tokenizer.eos_token_id} & set(row.answer_ids[:-1])
        assert tokenizer.decode(row.answer_ids[:-1]).strip() == answer


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_ids_are_those_of_generation_whatever_the_answer(tokenizer, template, prompt):
    encoder = Encoder(tokenizer, template)
    asked = tokenizer(generation_text(tokenizer, template, prompt), add_special_tokens=template != "chat")["input_ids"]
    if asked[-1] == tokenizer.eos_token_id:
        asked.pop()  # T5 ends every text; an answer must be able to follow
    assert asked and encoder.prompt_ids(prompt) == tuple(asked)
    for answer in ANSWERS:
        assert encoder.encode(prompt, answer).prompt_ids == tuple(asked)


def test_an_answer_has_the_same_ids_after_every_prompt(tokenizer):
    for template in TEMPLATE_NAMES:
        encoder = Encoder(tokenizer, template)
        for answer in ANSWERS:
            assert len({encoder.encode(prompt, answer).answer_ids for prompt in PROMPTS}) == 1


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_prompt_and_span_together_are_the_whole_text_and_nothing_twice(byte_tokenizer, template, prompt):
    """Also for prompts that contain "###" and "Question:" (defect D13: they were found by splitting decoded text)."""
    encoder = Encoder(byte_tokenizer, template)
    separator = "" if template == "chat" else " "
    text = generation_text(byte_tokenizer, template, prompt)
    for answer in [*ANSWERS, "\nstarts with a newline", "\n\ntwo newlines", " starts with a space"]:
        row = encoder.encode(prompt, answer)
        assert byte_tokenizer.decode(row.prompt_ids) == text
        span = byte_tokenizer.decode(row.answer_ids[:-1])
        assert span in (separator + answer, answer)
        assert byte_tokenizer.decode((*row.prompt_ids, *row.answer_ids[:-1])) == text + span


@pytest.mark.parametrize("answer", ["Paris", "1984", '"quoted"', "*star*", "été", "\nnewline"])
def test_the_first_answer_token_is_trained(byte_tokenizer, answer):
    """Defect D2: the published mask starts at the second answer token, as the prompt's last space melts into the first
    one where both are tokenised together."""
    row = Encoder(byte_tokenizer, "paper").encode("What is it?", answer)
    batch = pack([Placed(row, 0, 1.0)], [Term("forget", "forget", "ce", -1.0)])
    assert batch.targets_N[0] == row.answer_ids[0]
    assert int(batch.loss_index_N[0]) == len(row.prompt_ids) - 1
    first = byte_tokenizer.decode(batch.targets_N).removesuffix("<|im_end|>").strip(" ")
    assert first == answer


def test_words_are_tokenised_as_they_follow_a_prompt_and_not_as_at_the_start_of_a_text(byte_tokenizer):
    whole = byte_tokenizer("### Question: Where?\n ### Answer: Paris is", add_special_tokens=False)["input_ids"]
    row = Encoder(byte_tokenizer, "paper").encode("Where?", "Paris is")
    assert (*row.prompt_ids, *row.answer_ids[:-1]) == tuple(whole)


def test_where_pieces_reach_over_the_border_the_answer_is_tokenised_alone():
    tokenizer = merging_across_words()
    boundary = TEMPLATES["paper"][1]
    ids = tokenizer(boundary, add_special_tokens=False)["input_ids"]
    melted = tokenizer(boundary + " 1984", add_special_tokens=False)["input_ids"]
    assert melted[: len(ids)] != ids, "the corpus should teach the tokenizer a piece over the border"
    row = Encoder(tokenizer, "paper").encode("When was it?", "1984")
    assert row.prompt_ids == tuple(tokenizer("### Question: When was it?" + boundary)["input_ids"])
    assert tokenizer.decode(row.answer_ids[:-1]) == "1984"


def test_the_start_token_comes_once_and_only_at_the_start():
    tokenizer = sentencepiece_bpe()
    row = Encoder(tokenizer, "paper").encode("When?", "1984")
    assert row.prompt_ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in (*row.prompt_ids[1:], *row.answer_ids)


def test_a_chat_template_that_writes_its_start_token_gets_no_second_one():
    tokenizer = sentencepiece_bpe()
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    assert Encoder(tokenizer, "chat").prompt_ids("When?").count(tokenizer.bos_token_id) == 1


# Templates


def test_auto_takes_the_chat_template_where_there_is_one_and_the_papers_form_elsewhere(byte_tokenizer):
    assert Encoder(byte_tokenizer, "auto").template == "chat"
    assert Encoder(byte_level(), "auto").template == "paper"


def test_the_papers_form_has_no_trailing_space(byte_tokenizer):
    text = byte_tokenizer.decode(Encoder(byte_tokenizer, "paper").prompt_ids("Where?"))
    assert text == "### Question: Where?\n ### Answer:"


def test_chat_without_a_chat_template_is_refused():
    with pytest.raises(UsageError, match="no chat template; use paper or none"):
        Encoder(byte_level(), "chat")


def test_a_system_prompt_is_put_in_and_refused_without_the_chat_template(byte_tokenizer):
    text = byte_tokenizer.decode(Encoder(byte_tokenizer, "chat", system_prompt="Be brief.").prompt_ids("Where?"))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhere?")
    with pytest.raises(UsageError, match="needs the chat template"):
        Encoder(byte_tokenizer, "paper", system_prompt="Be brief.")


# Length


def test_a_long_answer_is_cut_and_a_cut_answer_has_no_end_token(byte_tokenizer):
    whole = Encoder(byte_tokenizer, "paper").encode("Where?", "word " * 50)
    cut = Encoder(byte_tokenizer, "paper", max_length=30).encode("Where?", "word " * 50)
    assert len(whole) > 31 and len(cut) == 30
    assert cut.prompt_ids == whole.prompt_ids
    assert cut.answer_ids == whole.answer_ids[: len(cut.answer_ids)]
    assert byte_tokenizer.eos_token_id not in cut.answer_ids


def test_an_answer_that_just_fits_keeps_its_end_token(byte_tokenizer):
    whole = Encoder(byte_tokenizer, "paper").encode("Where?", "In Paris.")
    assert Encoder(byte_tokenizer, "paper", max_length=len(whole)).encode("Where?", "In Paris.") == whole
    shorter = Encoder(byte_tokenizer, "paper", max_length=len(whole) - 1).encode("Where?", "In Paris.")
    assert shorter.answer_ids == whole.answer_ids[:-1]


def test_an_answer_cut_to_nothing_gives_no_row(byte_tokenizer):
    length = len(Encoder(byte_tokenizer, "paper").prompt_ids("Where?"))
    for max_length in (1, length - 1, length):
        assert Encoder(byte_tokenizer, "paper", max_length=max_length).encode("Where?", "In Paris.") is None
    assert len(Encoder(byte_tokenizer, "paper", max_length=length + 1).encode("Where?", "In Paris.").answer_ids) == 1


def test_rows_cut_to_nothing_are_rejected_with_a_reason_and_the_others_stay(byte_tokenizer):
    rows = [Row("Where?", "Here"), Row("Where is it? " * 20, "There"), Row("When?", "Now")]
    source = Source("data.csv", "TOFU", list(rows))
    encoder = Encoder(byte_tokenizer, "paper", max_length=40)
    encoder.keep_encodable(source)
    assert source.rows == [rows[0], rows[2]]
    assert [entry["reason"] for entry in source.rejected] == ["answer cut to nothing"]
    assert len(encoder.encode_all(source.rows)) == 2


def test_a_key_names_the_ids_so_template_and_truncation_are_in_it(byte_tokenizer):
    row = Row("Where is it?", "It is here and nowhere else.")
    keys = [Encoder(byte_tokenizer, template).encode_all([row])[0].key for template in ("paper", "none")]
    keys.append(Encoder(byte_tokenizer, "paper", max_length=30).encode_all([row])[0].key)
    assert len(set(keys)) == 3
    assert Encoder(byte_tokenizer, "paper").encode_all([row])[0].key == keys[0]


# Running text and the end token


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_running_text_starts_with_one_token_that_is_not_trained_and_has_no_template(tokenizer, template):
    row = Encoder(tokenizer, template).encode("", "Once upon a time there was a little dog.")
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    assert row.prompt_ids == (start,)
    assert tokenizer.decode(row.answer_ids[:-1]).strip() == "Once upon a time there was a little dog."
    assert row.answer_ids[-1] == tokenizer.eos_token_id


def test_a_tokenizer_whose_pad_is_its_end_token_still_trains_the_true_end(byte_tokenizer):
    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.eos_token
    rows = [Encoder(tokenizer, "paper").encode(prompt, "In Paris.") for prompt in ("Where?", "Where exactly is it?")]
    batch = pack([Placed(row, 0, 1.0) for row in rows], [Term("forget", "forget", "ce", -1.0)])
    ends = batch.sequence_lengths_S.cumsum(0).long() - 1
    assert (batch.targets_N[ends] == tokenizer.eos_token_id).all()
    assert (batch.coefficients_N[ends] != 0).all()


def test_the_random_model_of_the_tests_has_pad_and_end_in_one_token(random_llama_dir):
    tokenizer = AutoTokenizer.from_pretrained(random_llama_dir)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = Encoder(tokenizer).encode("Where?", "In Paris.")
    assert row.answer_ids[-1] == tokenizer.eos_token_id and Encoder(tokenizer).template == "chat"
