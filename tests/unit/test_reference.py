from __future__ import annotations

import pytest
import torch

from unlearn_ds.config import UsageError
from unlearn_ds.data.encode import Encoder
from unlearn_ds.data.packing import Placed, pack
from unlearn_ds.model import PackedCausalLM, load_causal_lm, load_tokenizer
from unlearn_ds.reference import CachedReference, LiveReference, build_cache
from unlearn_ds.types import EncodedRow, Row, Term

CPU = torch.device("cpu")
TERMS = [Term("forget", "forget", "ce", -1.0), Term("retain", "retain", "kl", 1.0)]
ROWS = [EncodedRow(tuple(range(3, 6 + i)), tuple(range(40, 42 + i % 4))) for i in range(9)]
ROW_TEXTS = [Row("Where?", "In Paris.", key="k1"), Row("Who is it?", "A dog.", key="k2")]


@pytest.fixture(scope="module")
def model(random_llama_dir) -> PackedCausalLM:
    return PackedCausalLM(load_causal_lm(str(random_llama_dir), torch.float32), "sdpa").requires_grad_(False)


@pytest.fixture
def hidden_rows(model):
    """A model as the reference sees it, with a count of its forwards."""

    def run(batch):
        run.calls += 1
        return model(batch, hidden_only=True)

    run.calls = 0
    return run


@pytest.fixture(scope="module")
def head(model):
    return model.causal_lm.get_output_embeddings().weight.detach().clone()


def batch_of(*rows: EncodedRow):
    """Two cross-entropy sequences, then the rows as KL sequences."""
    forget = [Placed(EncodedRow((7, 8), (9, 10)), 0, -1.0), Placed(EncodedRow((7,), (9, 10, 11)), 0, -1.0)]
    return pack([*forget, *(Placed(row, 1, 1.0) for row in rows)], TERMS)


def test_a_batch_without_kl_rows_needs_no_reference(tmp_path, hidden_rows, head):
    assert LiveReference(hidden_rows, head).rows(batch_of()) is None
    assert CachedReference(tmp_path, head).rows(batch_of()) is None
    assert hidden_rows.calls == 0


@pytest.mark.parametrize("rows_per_batch", [1, 4, 16])
def test_cached_states_equal_live_ones(tmp_path, hidden_rows, head, rows_per_batch):
    build_cache(tmp_path / "cache", hidden_rows, ROWS, CPU, rows_per_batch)
    cached, live = CachedReference(tmp_path / "cache", head), LiveReference(hidden_rows, head)
    for rows in (ROWS[:3], ROWS[::-1], [ROWS[4], ROWS[4]]):
        batch = batch_of(*rows)
        a, b = cached.rows(batch), live.rows(batch)
        assert a.hidden_NH.shape == (batch.num_kl_rows, 64) and a.weight_VH is b.weight_VH
        torch.testing.assert_close(a.hidden_NH, b.hidden_NH, rtol=1e-5, atol=1e-5)


def test_a_finished_cache_is_not_computed_again(tmp_path, hidden_rows, head):
    build_cache(tmp_path, hidden_rows, ROWS, CPU)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    build_cache(tmp_path, hidden_rows, ROWS, CPU)
    assert files and {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


def test_rows_that_a_finished_cache_lacks_are_added(tmp_path, hidden_rows, head):
    """A second run of the same model on other retain data finds the folder of the first."""
    build_cache(tmp_path, hidden_rows, ROWS[:4], CPU)
    build_cache(tmp_path, hidden_rows, ROWS, CPU)
    batch = batch_of(*ROWS)
    live = LiveReference(hidden_rows, head).rows(batch)
    torch.testing.assert_close(
        CachedReference(tmp_path, head).rows(batch).hidden_NH, live.hidden_NH, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("change", ["template", "max_length"])
def test_a_row_encoded_in_another_way_is_not_served_from_the_cache(
    tmp_path, random_llama_dir, hidden_rows, head, change
):
    """A second run of the same model and data with another template or length finds the folder of the first."""
    tokenizer = load_tokenizer(str(random_llama_dir))
    first = Encoder(tokenizer, "paper").encode_all(ROW_TEXTS)
    options = {"template": {"template": "chat"}, "max_length": {"template": "paper", "max_length": len(first[0]) - 2}}
    second = Encoder(tokenizer, **options[change]).encode_all(ROW_TEXTS[:1])
    assert second and second[0] != first[0]
    for rows in (first, second):
        build_cache(tmp_path, hidden_rows, rows, CPU)
        batch = batch_of(*rows)
        live = LiveReference(hidden_rows, head).rows(batch).hidden_NH
        cached = CachedReference(tmp_path, head).rows(batch).hidden_NH
        torch.testing.assert_close(cached, live, rtol=1e-5, atol=1e-5)


def test_a_row_that_was_never_cached_is_named(tmp_path, hidden_rows, head):
    build_cache(tmp_path, hidden_rows, ROWS[:2], CPU)
    with pytest.raises(UsageError, match=f"lacks row {ROWS[5].key}"):
        CachedReference(tmp_path, head).rows(batch_of(ROWS[5]))


def test_an_interrupted_cache_is_not_taken_for_finished(tmp_path, hidden_rows):
    def broken(batch):
        if hidden_rows.calls == 2:
            raise KeyboardInterrupt
        return hidden_rows(batch)

    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path, broken, ROWS, CPU, rows_per_batch=3)
    assert not list(tmp_path.glob("*.json"))
    build_cache(tmp_path, hidden_rows, ROWS, CPU, rows_per_batch=3)
    assert hidden_rows.calls == 2 + 3


def test_a_cache_of_other_weights_is_refused(tmp_path, hidden_rows):
    """The folder is named by a digest of the weights; what is in it is looked at all the same."""
    build_cache(tmp_path, hidden_rows, ROWS, CPU)
    build_cache(tmp_path, hidden_rows, ROWS, CPU)
    with pytest.raises(UsageError, match="does not hold what this model computes .* delete that folder"):
        build_cache(tmp_path, lambda batch: 1.01 * hidden_rows(batch), ROWS, CPU)


def test_a_damaged_cache_is_refused(tmp_path, hidden_rows):
    build_cache(tmp_path, hidden_rows, ROWS, CPU)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UsageError, match="cannot be read .* delete"):
        build_cache(tmp_path, hidden_rows, ROWS, CPU)


def test_a_cache_that_cannot_be_written_is_told(tmp_path, hidden_rows, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unlearn_ds.reference.save_file", full)
    with pytest.raises(UsageError, match="cannot be written to .*No space left"):
        build_cache(tmp_path, hidden_rows, ROWS, CPU)
    assert not list(tmp_path.glob("*.json"))


def test_states_read_ahead_are_the_same_and_are_handed_out_once(tmp_path, hidden_rows, head, monkeypatch):
    build_cache(tmp_path, hidden_rows, ROWS, CPU)
    cached, batch = CachedReference(tmp_path, head), batch_of(*ROWS[:3])
    expected = cached.rows(batch).hidden_NH
    cached.fetch(batch)
    with monkeypatch.context() as patched:
        patched.setattr(cached, "read", None)  # nothing is read any more
        assert torch.equal(cached.rows(batch).hidden_NH, expected)
    assert torch.equal(cached.rows(batch).hidden_NH, expected)
