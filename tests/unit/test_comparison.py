"""The comparison of a study: its table, its page and its file, from small run folders written by hand."""

import json
import math
import re
import shutil

import pytest

from unlearn_ds import comparison, report, run_folder, studies

LABELS = ("ours", "published", "published-our-rate")


def entry(step, rate, perplexity, accuracy, nll):
    return {
        "step": step,
        "unlearned": {"rate": rate, "n": 100, "nll": nll, "diversity": 0.7},
        "unseen": {"rate": rate, "n": 60},
        "normal": {"perplexity": perplexity, "n": 40},
        "neutral": {
            "perplexity": 4 * perplexity,
            "accuracy": accuracy,
            "question_accuracy": accuracy,
            "n_texts": 24,
            "n_choices": 140,
        },
    }


AFTER = {
    "ours": entry(40, 0.01, 8.2, 0.96, 3.2),
    "published": entry(16, 0.62, 8.0, 0.9604, 0.5),
    "published-our-rate": entry(16, 0.01, 31.5, 0.4, 88.0),
}


def line(step, scale):
    return {
        "step": step, "loss_forget": -0.4 * step * scale, "loss_mismatch": 3.0 / step + scale,
        "loss_retain": 0.1 * scale, "tokens": 2000, "response_tokens": 500, "step_seconds": 1.5,
        "peak_memory_bytes": 3 * 2**30,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for n, label in enumerate(LABELS, 1):
        (tmp_path / label).mkdir()
        before, after = entry(0, 0.66, 8.0, 0.964, 0.4), AFTER[label]
        middle = entry(after["step"] // 2, 0.3, 8.1, 0.96, 2.0)
        evaluation = {
            "scenario": "hallucination", "headline": "hallucinated answers", "judge": "minilm", "memorized": True,
            "before": before, "after": after, "history": [before, middle, after],
        }  # fmt: skip
        settings = {
            "scenario": "hallucination", "output_dir": str(tmp_path / label), "fingerprint": label, "seed": 0,
            "model": {"path": "org/Some-Model-7b"}, "optim": {"max_steps": after["step"], "batch_size": 8},
            "objective": {"num_mismatch": 1 if n == 1 else 5}, "checkpoint": {"resume": "auto" if n == 2 else "none"},
            "versions": {"torch": "2.11.0"}, "commit": "3f2c9a1be77d",
        }  # fmt: skip
        (tmp_path / label / "config.json").write_text(json.dumps(settings))
        (tmp_path / label / "evaluation.json").write_text(json.dumps(evaluation))
        lines = [json.dumps(line(step, n)) + "\n" for step in range(1, after["step"] + 1)]
        (tmp_path / label / "metrics.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def variants(folder):
    return comparison.read(folder, LABELS)


def write(folder, variants, study="published"):
    path = comparison.write(folder, study, "a title with <b>", "the <paper>", variants)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def row(variants, name, metric):
    (found,) = [found for found in comparison.rows(variants) if (found.set, found.metric) == (name, metric)]
    return found


def test_a_line_has_the_value_before_and_each_variants_after(variants):
    found = row(variants, "unlearned", "hallucinated answers")
    assert (found.before, found.after) == ("66 %", ("1 %", "62 %", "1 %"))
    shown = list(dict.fromkeys(found.set for found in comparison.rows(variants)))
    assert len(shown) == 4 and shown == [name for name in report.SETS if name in shown]


@pytest.mark.parametrize(
    ("name", "metric", "best"),
    [
        ("unlearned", "hallucinated answers", (True, False, True)),  # equal values share the place
        ("unlearned", "NLL per token", (False, False, True)),  # more is better on what is to be forgotten
        ("unlearned", "diversity", (False, False, False)),  # neither way is better
        ("normal", "perplexity", (False, True, False)),
        ("neutral", "multiple-choice accuracy", (True, True, False)),  # 96 % and 96.04 % look the same
    ],
)
def test_the_best_is_marked_by_the_direction_of_the_metric_on_that_set(variants, name, metric, best):
    assert row(variants, name, metric).best == best


def test_nothing_is_best_when_all_are_equal_or_only_one_has_the_number(variants):
    del variants[0].evaluation["after"]["normal"]["perplexity"], variants[2].evaluation["after"]["normal"]["perplexity"]
    alone = row(variants, "normal", "perplexity")
    assert (alone.after, alone.best) == ((report.MISSING, "8.00", report.MISSING), (False, False, False))
    for variant in variants:
        variant.evaluation["after"]["unseen"]["rate"] = 0.25
    assert row(variants, "unseen", "hallucinated answers").best == (False, False, False)


def test_a_number_of_one_variant_only_has_its_line_among_its_set(variants):
    variants[2].evaluation["after"]["unlearned"]["made_up"] = 1.0
    found = comparison.rows(variants)
    assert [found.set for found in found].index("unseen") == 1 + [line.metric for line in found].index("made up")


def test_what_differs_are_the_knobs_that_are_not_the_same_in_all(variants):
    assert comparison.changes(variants) == {"optim.max_steps": [40, 16, 16], "objective.num_mismatch": [1, 5, 5]}


def test_the_page_shows_every_part(folder, variants):
    text = write(folder, variants)
    parts = (
        "Study published: hallucination in Some-Model-7b", "a title with &lt;b&gt;", "the &lt;paper&gt;", "66 %",
        "Memorised first.", "published our rate", "Unlearned prompts (100)", "optim.max_steps", "80,000", "1 min 00 s",
        "3.0 GiB", 'href="ours/report.html"', "Judge: minilm", "torch 2.11.0",
    )  # fmt: skip
    for part in parts:
        assert part in text, part
    assert text.count("<svg") == 8
    marked = sum(sum(line.best) for line in comparison.rows(variants))
    assert text.count('title="best"') == marked == 11


def test_plots_have_one_curve_a_variant(folder, variants):
    figures = re.findall(r"<svg.*?</svg>", write(folder, variants), re.DOTALL)
    for figure in figures:
        assert {f"var(--{name})" for name in comparison.COLOURS[:3]} <= set(re.findall(r"var\(--v\d\)", figure))
        assert "var(--v4)" not in figure


def points(variants, set="neutral", key="question_accuracy"):
    found = comparison.trade_off(variants, set, key)
    return {colour: list(zip(x, y, strict=True)) for colour, x, y in found.groups}


def trade_off_figures(text):
    return re.findall(r'<figure class="panel" aria-label="hallucinated answers against ([^"]*)">', text)


def test_what_is_forgotten_is_drawn_against_what_it_costs(folder, variants):
    assert points(variants) == {
        "ink": [(0.964, 0.66)], "v1": [(0.96, 0.01)], "v2": [(0.9604, 0.62)], "v3": [(0.4, 0.01)],
    }  # fmt: skip
    assert trade_off_figures(write(folder, variants)) == ["neutral questions answered right", "neutral perplexity"]
    for variant in variants:
        variant.evaluation["after"]["neutral"] = {}
    text = write(folder, variants)
    assert not trade_off_figures(text) and "what it costs" not in text


@pytest.mark.parametrize("value", [None, math.inf, 1e300])
def test_a_variant_that_diverged_is_said_not_to_be_drawn(folder, variants, value):
    variants[2].evaluation["after"]["neutral"]["perplexity"] = value
    assert points(variants, key="perplexity")["v3"] == []
    assert "diverged and not drawn: published our rate" in write(folder, variants)


def test_without_a_before_only_the_ends_are_drawn(folder, variants):
    for variant in variants:
        variant.evaluation["before"] = None
    assert points(variants)["ink"] == [] and points(variants)["v1"] == [(0.96, 0.01)]


def test_a_term_that_a_variant_lacks_is_drawn_for_the_others_in_their_colours(folder, variants):
    for entry_of_step in variants[0].steps:
        del entry_of_step["loss_mismatch"]
    text = write(folder, variants)
    (figure,) = re.findall(r'<figure class="panel" aria-label="mismatch">.*?</figure>', text, re.DOTALL)
    assert "var(--v1)" not in figure and "var(--v2)" in figure and "var(--v3)" in figure


def test_without_a_history_there_are_no_plots_of_evaluations(folder, variants):
    for variant in variants:
        variant.evaluation["history"] = [variant.evaluation["before"], variant.evaluation["after"]]
    text = write(folder, variants)
    assert "along the way" not in text and text.count("<svg") == 5


def test_the_page_loads_nothing_and_defines_its_colours(folder, variants):
    text = write(folder, variants)
    assert not re.search(r"https?://|@import|<link|<script|<img|\ssrc=", text)
    used, defined = set(re.findall(r"var\((--\w+)\)", text)), set(re.findall(r"(--[a-z-]+\d?):", text))
    assert used and used <= defined
    assert {f"--{name}" for name in comparison.COLOURS} <= defined
    assert max(len(study.variants) for study in studies.STUDIES.values()) <= len(comparison.COLOURS)


def test_the_file_holds_every_number(folder, variants):
    variants[2].evaluation["after"]["normal"]["perplexity"] = math.inf
    write(folder, variants)
    written = json.loads((folder / "comparison.json").read_text())
    assert (written["study"], written["scenario"], written["judge"]) == ("published", "hallucination", "minilm")
    assert written["before"]["unlearned"]["rate"] == 0.66
    assert list(written["variants"]) == list(LABELS)
    published = written["variants"]["published"]
    assert published["changes"] == {"optim.max_steps": 16, "objective.num_mismatch": 5}
    assert (published["steps"], published["tokens"], published["after"]["step"]) == (16, 32_000, 16)
    assert written["variants"]["published-our-rate"]["after"]["normal"]["perplexity"] is None


def test_a_variant_that_was_not_evaluated_is_named(folder):
    (folder / "published" / "evaluation.json").write_text(json.dumps({"before": {}, "after": None}))
    with pytest.raises(FileNotFoundError, match="published holds no finished run"):
        comparison.read(folder, LABELS)


def test_the_terminal_table_fits_80_columns(variants, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    variants[0].evaluation["headline"] = "[red]rate"
    comparison.print_table(variants)
    lines = capsys.readouterr().out.splitlines()
    assert lines and max(map(len, lines)) <= 80
    assert any(re.search(r"\[red\]rate +66 % +1 %\* +62 % +1 %\*$", line.rstrip()) for line in lines)
    assert any("Unlearned prompts (100)" in line for line in lines)
    assert lines[-1] == "*: the best of the variants; judge: minilm"


@pytest.mark.parametrize("seeds", [1, 3])
def test_five_variants_fit_80_columns_too_and_leave_room_for_the_names(variants, repeated, seeds, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    found = variants if seeds == 1 else repeated
    comparison.print_table([*found, *found[:2]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and sum(line.count("62") for line in lines) == 4
    assert any(line.strip().startswith("multiple-choice ") for line in lines)


def test_six_variants_fit_80_columns_too(variants, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    comparison.print_table([*variants, *variants])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.fixture
def repeated(folder):
    """The study with three seeds: rates of ``ours`` 1, 4 and 4 %."""
    for label in LABELS:
        for seed, rate in ((1, 0.04), (2, 0.04)):
            copy = folder / f"{label}-seed-{seed}"
            shutil.copytree(folder / label, copy)
            settings = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps({**settings, "seed": seed}))
            if label == "ours":
                evaluation = json.loads((copy / "evaluation.json").read_text())
                evaluation["after"]["unlearned"]["rate"] = rate
                (copy / "evaluation.json").write_text(json.dumps(evaluation))
    return comparison.read(folder, [*LABELS, *(f"{label}-seed-{seed}" for seed in (1, 2) for label in LABELS)])


def test_several_seeds_give_the_mean_and_the_standard_deviation_and_means_are_compared(folder, repeated):
    found = row(repeated, "unlearned", "hallucinated answers")
    assert found.after == ("3±1.7 %", "62±0 %", "1±0 %") and found.best == (False, False, True)
    assert row(repeated, "neutral", "multiple-choice accuracy").best == (True, True, False)
    text = write(folder, repeated)
    assert "standard deviation of 3 seeds" in text and 'href="ours-seed-2/report.html"' in text
    written = json.loads((folder / "comparison.json").read_text())["variants"]
    assert list(written) == list(LABELS)
    rates = {seed: after["unlearned"]["rate"] for seed, after in written["ours"]["after_with_seed"].items()}
    assert rates == {"0": 0.01, "1": 0.04, "2": 0.04}


def test_every_seed_is_a_point_of_its_own_and_where_all_began_is_one(folder, repeated):
    found = points(repeated, key="perplexity")
    assert found["v1"] == [(32.8, 0.01), (32.8, 0.04), (32.8, 0.04)] and found["ink"] == [(32.0, 0.66)]
    text = write(folder, repeated)
    assert "a point a seed" in text and "Plots by optimizer step" in text


def test_means_within_a_standard_deviation_share_the_first_place(repeated):
    for seed, rate in ((1, 0.01), (2, 0.07)):
        repeated[0].repeats[seed]["after"]["unlearned"]["rate"] = rate
    found = row(repeated, "unlearned", "hallucinated answers")
    assert found.after[0] == "3±3.5 %" and found.best == (True, False, True)


def test_a_seed_that_diverged_leaves_no_mean_and_is_never_the_best(folder, repeated):
    path = folder / f"{LABELS[0]}-seed-2" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["after"]["normal"]["perplexity"] = math.inf
    run_folder.write_json(path, evaluation)
    again = comparison.read(folder, [*LABELS, *(f"{label}-seed-{seed}" for seed in (1, 2) for label in LABELS)])
    found = row(again, "normal", "perplexity")
    assert found.after[0] == "diverged" and not found.best[0]
    assert "diverged" not in row(repeated, "normal", "perplexity").after


def test_seeds_that_start_from_models_of_their_own_have_a_mean_before_too(repeated):
    assert "±" not in row(repeated, "unlearned", "hallucinated answers").before
    repeated[0].repeats[1]["before"]["unlearned"]["rate"] += 0.03
    assert "±" in row(repeated, "unlearned", "hallucinated answers").before


def test_the_terminal_table_of_several_seeds_fits_80_columns(repeated, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    comparison.print_table(repeated)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and lines[-1].endswith("mean ± standard deviation of 3 seeds")
