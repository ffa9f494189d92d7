"""The report: directions of the table, what the page holds and what it must not hold, runs with parts missing."""

import json
import math
import re

import pytest

from unlearn_ds import report

PROMPT = "What <script>alert(1)</script> & who?"


def entry(step, rate, perplexity, accuracy, nll=0.4):
    forget = {"rate": rate, "n": 100, "nll": nll, "perplexity": math.exp(nll), "diversity": 0.7}
    return {
        "step": step,
        "unlearned": forget,
        "unseen": {**forget, "n": 60},
        "normal": {"perplexity": perplexity, "nll": math.log(perplexity), "n": 40, "similarity_to_original": None},
        "neutral": {
            "perplexity": 14.0,
            "accuracy": accuracy,
            "question_accuracy": accuracy,
            "n_texts": 24,
            "n_choices": 140,
            "n_questions": 89,
            "made_up_metric": step,
        },
        "seconds": 8.0,
    }


@pytest.fixture
def evaluation():
    history = [entry(0, 0.88, 8.0, 0.62), entry(20, 0.5, 8.1, 0.62, 3.0), entry(40, 0.01, 8.8, 0.6, 28.0)]
    return {
        "scenario": "hallucination", "headline": "hallucinated_answers", "judge": "minilm", "memorized": True,
        "stop": {"step": 40, "reason": "all 40 steps done", "exit_code": 0},
        "before": history[0], "after": history[-1], "history": history,
    }  # fmt: skip


def sample_answers():
    sample = {"set": "unlearned", "prompt": PROMPT, "right": "right one", "wrong": "wrong <b>", "before": "old answer"}
    samples = [{**sample, "after": f"new answer {number}"} for number in range(12)]
    return [*samples, {**sample, "set": "normal", "after": " "}]


def step_line(step):
    return {
        "step": step, "loss": 1.0, "loss_forget": -0.4 * step, "loss_mismatch": 3.0 / step, "loss_retain": None,
        "grad_norm": math.nan if step == 7 else 5.0, "lr": 1e-5, "tokens": 2000, "response_tokens": 500,
        "tokens_per_second": 5000.0, "step_seconds": 10.0, "tflops_per_device": 4.0, "mfu": 0.4,
        "peak_memory_bytes": 3 * 2**30, "skipped": step == 7,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path, evaluation):
    settings = {
        "scenario": "hallucination", "preset": None, "commit": "3f2c9a1be77d", "versions": {"torch": "2.11.0"},
        "model": {"path": "org/Some-Model-7b"}, "objective": {"name": "ga_mismatch"}, "data": {"forget_columns": []},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step_line(step)) + "\n" for step in range(1, 41)))
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in sample_answers()))
    return tmp_path


def page(folder):
    path = report.write(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_rank_of_trained_adapters_is_shown_and_none_without_adapters(folder):
    assert "LoRA rank" not in page(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "lora": {"rank": 16}}))
    assert "LoRA rank <b>16</b>" in page(folder)
    (folder / "config.json").write_text(json.dumps({**settings, "lora": {"rank": 0}}))
    assert "LoRA rank" not in page(folder)


def row(evaluation, name, key):
    (found,) = [row for row in report.rows(evaluation) if (row.set, row.key) == (name, key)]
    return found


def test_a_complete_run_shows_every_part(folder):
    text = page(folder)
    assert "Unlearning <em>hallucination</em> in Some-Model-7b" in text
    parts = (
        "all 40 steps done", "Memorised first.", "hallucinated answers", "88 %", "1 %", "6 min 40 s", "ga_mismatch",
        "Unlearned prompts (100)", "Neutral set (24 texts, 140 choices, 89 questions)", "Judge: minilm", "torch 2.11.0",
        "commit 3f2c9a1be77d", "1</b> step skipped", "(empty answer)", "made up metric",
    )  # fmt: skip
    for part in parts:
        assert part in text, part
    # 3 of the evaluation; forget, mismatch, gradient norm, two of the speed: retain was not active
    assert text.count("<svg") == 8
    assert text.count("new answer") == 8


def test_the_page_loads_nothing(folder):
    text = page(folder)
    assert not re.search(r"https?://|@import|<link|<script|<img|\ssrc=", text)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


def test_plots_take_their_colours_from_the_page(folder):
    figures = re.findall(r"<svg.*?</svg>", page(folder), re.DOTALL)
    assert figures
    for figure in figures:
        assert not re.search(r"(?<!url\()#[0-9a-f]{6}\b(?!\")", re.sub(r'href="#\w+"', "", figure))
    text = page(folder)
    used, defined = set(re.findall(r"var\((--\w+)\)", text)), set(re.findall(r"(--[a-z-]+):", text))
    assert used and used <= defined


def test_ids_do_not_repeat_with_another_meaning(folder):
    ids = {}
    for name, body in re.findall(r'<path id="(\w+)"([^>]*)>', page(folder)):
        assert ids.setdefault(name, body) == body
    assert ids


def test_text_of_the_user_is_escaped(folder):
    text = page(folder)
    assert "<script>" not in text and "wrong <b>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; who?" in text


@pytest.mark.parametrize(
    ("name", "mark"),
    [("unlearned", 'worse">counted'), ("harmless", 'worse">refused'), ("neutral", 'better">right')],
)
def test_an_answer_that_is_counted_says_as_what(folder, name, mark):
    answer = {"set": name, "prompt": "p", "before": "one", "after": "two"}
    for before, after in ((True, False), (False, True), (None, None)):
        flags = {"flagged_before": before, "flagged_after": after}
        (folder / "answers.jsonl").write_text(json.dumps({**answer, **flags}))
        one, two = re.findall(r'<div class="answer .*?</div>', page(folder), re.DOTALL)
        assert (f'class="pill {mark}<' in one, f'class="pill {mark}<' in two) == (before is True, after is True)


def test_without_evaluation(folder):
    (folder / "evaluation.json").unlink()
    text = page(folder)
    assert "was not evaluated" in text and "Before and after" in text
    assert text.count("<svg") == 5


def test_a_run_that_stopped_early(folder, evaluation):
    half = {**evaluation, "after": None, "history": None, "stop": {"step": 9, "reason": "diverged: loss is NaN"}}
    (folder / "evaluation.json").write_text(json.dumps(half))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    text = page(folder)
    assert "diverged: loss is NaN" in text and "Half a comparison" in text and "nan" not in text.split("Training")[0]
    assert {row.after for row in report.rows(half)} == {report.MISSING}


def test_an_empty_folder_still_gives_a_page(tmp_path):
    text = page(tmp_path)
    for part in ("config.json is missing", "metrics.jsonl is missing", "evaluation.json is missing", "unknown model"):
        assert part in text


@pytest.mark.parametrize(
    "broken", [{}, {"before": {}, "after": {}}, {"before": {"unlearned": None}, "history": [None] * 4}]
)
def test_half_empty_files(tmp_path, broken):
    (tmp_path / "evaluation.json").write_text(json.dumps(broken))
    (tmp_path / "config.json").write_text(json.dumps({"model": None, "optim": {}, "versions": None}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss_forget": null}\n{"step": 2, "loss_retain": 0.0}\n')
    assert report.rows(broken) == []
    assert page(tmp_path).count("<svg") == 1


def test_directions(evaluation):
    expected = {
        ("unlearned", "rate"): True, ("unseen", "rate"): True,
        ("unlearned", "nll"): True, ("unlearned", "perplexity"): True, ("unlearned", "diversity"): None,
        ("normal", "nll"): False, ("normal", "perplexity"): False, ("normal", "similarity_to_original"): None,
        ("neutral", "perplexity"): None, ("neutral", "accuracy"): False, ("neutral", "made_up_metric"): None,
    }  # fmt: skip
    assert {at: row(evaluation, *at).good for at in expected} == expected
    worse = {**evaluation, "before": evaluation["after"], "after": evaluation["before"]}
    flipped = {at: None if good is None else not good for at, good in expected.items()}
    assert {at: row(worse, *at).good for at in expected} == flipped


def test_changes_as_text(evaluation):
    texts = {at: row(evaluation, *at)[2:5] for at in (
        ("unlearned", "rate"), ("unlearned", "nll"), ("unlearned", "perplexity"), ("normal", "perplexity"),
        ("neutral", "accuracy"), ("neutral", "perplexity"), ("normal", "similarity_to_original"),
    )}  # fmt: skip
    assert list(texts.values()) == [
        ("88 %", "1 %", "-87 points"), ("0.400", "28.0", "+27.6"), ("1.49", "1.4e12", "×9.7e11"),
        ("8.00", "8.80", "+10 %"), ("62 %", "60 %", "-2 points"), ("14.0", "14.0", "0 %"), ("–", "–", "–"),
    ]  # fmt: skip
    assert row(evaluation, "unlearned", "rate").metric == "hallucinated answers"


def test_a_slight_change_is_neither_good_nor_bad():
    def normal(perplexity):
        return {"normal": {"perplexity": perplexity}}

    (slight,) = report.rows({"before": normal(8.0), "after": normal(8.05)})
    assert (slight.good, slight.rises, slight.change) == (None, True, "+0.6 %")
    (grown,) = report.rows({"before": normal(8.0), "after": normal(8.1)})
    assert grown.good is False


def test_counts_stand_in_the_heading_and_not_in_rows(evaluation):
    rows = report.rows(evaluation)
    assert rows and not [row for row in rows if row.key.startswith("n_") or row.key == "n"]
    shown = list(dict.fromkeys(row.set for row in rows))
    assert set(shown) == {"unlearned", "unseen", "normal", "neutral"} and shown == [
        s for s in report.SETS if s in shown
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (math.inf, "inf"), (math.nan, "nan"), (1e12, "1e12"), (-1.26e300, "-1.3e300"), (0, "0"),
     (0.7134, "0.713"), (8.3149, "8.31"), (42, "42.0"), (12_345.4, "12,345"), (99_999.9, "1e5"), (1e-5, "1e-5")],
)  # fmt: skip
def test_numbers_are_compact(value, text):
    assert report.number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(41.26, "41.3 s"), (252, "4 min 12 s"), (11_100, "3 h 05 min")])
def test_durations(seconds, text):
    assert report.duration(seconds) == text


@pytest.mark.parametrize(("old", "new", "change", "good"), [
    (8.0, math.inf, "×inf", False), (8.0, math.nan, "–", None), (math.inf, 8.0, "-inf", True),
    (0.0, 3.0, "+3.00", False),
])  # fmt: skip
def test_numbers_that_are_not_finite(old, new, change, good):
    (found,) = report.rows({"before": {"normal": {"perplexity": old}}, "after": {"normal": {"perplexity": new}}})
    assert (found.change, found.good) == (change, good)


def test_extreme_curves_can_be_drawn():
    steps = [float(step) for step in range(1, 501)]
    for values in ([1e-300] * 499 + [9e99], [0.0] * 500, [-5.0] * 500, [1.3**step for step in steps]):
        assert report.plot([("forget", steps, values)]).startswith("<svg viewBox")
    assert report.column([{"step": 1, "a": math.inf}, {"step": 2, "a": 1e101}, {"a": 1}], "a") == ([], [])


def test_the_terminal_table_fits_80_columns(evaluation, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    evaluation["after"]["normal"]["a_metric_with_a_name_that_goes_on_for_longer_than_a_line_of_a_terminal_would"] = 1e30
    evaluation["headline"] = "[red]rate"
    report.print_table(evaluation)
    lines = capsys.readouterr().out.splitlines()
    assert lines and max(map(len, lines)) <= 80
    assert lines[-1] == "judge: minilm"
    assert any("Unlearned prompts (100)" in line for line in lines)
    assert any("[red]rate" in line and "88 %" in line and "-87 points" in line for line in lines)


def profiled(num_steps):
    """profile.csv of a run whose steps take 1 s, 0.6 of them backward; an evaluation before the fifth."""
    seconds = dict.fromkeys((f"seconds_{name}" for name in report.PHASES), 0.0)
    rows = [
        {"step": step, "step_seconds": 1.0, **seconds, "seconds_forward": 0.3, "seconds_backward": 0.6,
         "seconds_other": 0.1 + 5.0 * (step == 5), "seconds_evaluation": 7.0 * (step == 5)}
        for step in range(1, num_steps + 1)
    ]  # fmt: skip
    return [{name: str(value) for name, value in row.items()} for row in rows]


def test_phases_are_those_of_a_step_without_the_first_and_without_what_lies_between():
    found = {phase.name: phase for phase in report.phases({"first_steps_left_out": 3}, profiled(10))}
    assert list(found) == ["forward", "backward", "other"]
    assert len(found["backward"].seconds) == 7 and found["backward"].median == found["backward"].p95 == 0.6
    assert found["backward"].share == pytest.approx(0.6) and found["other"].share == pytest.approx(0.1)
    assert report.phases({}, []) == []


def test_a_stack_has_a_bar_a_step_in_the_pages_colours_and_averages_many_steps():
    for num_steps, bars in ((7, 7), (600, 60)):
        svg = report.stack([("forward", [1.0] * num_steps), ("backward", [2.0] * num_steps)], 4)
        assert svg.startswith("<svg viewBox") and "#0000" not in svg
        assert svg.count("fill: var(--forward)") == svg.count("fill: var(--backward)") == bars


def test_a_profiled_run_shows_where_its_time_went_and_others_do_not(folder):
    assert "Where the time goes" not in report.write(folder).read_text()
    rows = profiled(10)
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (folder / "profile.csv").write_text("\n".join(lines) + "\n")
    profile = {
        "first_steps_left_out": 3, "goodput": 0.4, "wall_seconds": 50.0, "padding_tokens": 0, "median": {},
        "phase_seconds_of_the_run": {"evaluation": 7.0, "save": 0.0},
        "utilization": {"mfu": None, "mfu_of_achievable": 0.033, "hfu_of_achievable": 0.045},
    }  # fmt: skip
    (folder / "profile.json").write_text(json.dumps(profile))
    page = report.write(folder).read_text()
    assert "Where the time goes" in page and "from step 4 on" in page and "MFU <b>n/a</b>" in page
    assert "var(--backward)" in page and "600 ms" in page
