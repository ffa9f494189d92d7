"""Studies: every variant resolves, differs from the others in what its study says, and keeps all else."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from harness import REPOSITORY

from unlearn_ds import arguments, choose, studies
from unlearn_ds.checks import check
from unlearn_ds.config import UsageError, fingerprint, replace, to_dict
from unlearn_ds.presets import PRESETS
from unlearn_ds.registry import OBJECTIVES, SCENARIOS, resolve
from unlearn_ds.studies import STUDIES

DIFFER = {
    "mismatch": {"objective.eps_mismatch"},
    "retain_loss": {"objective.name"},
    "reply": {"data.mismatch_text"},
    "longer": {"optim.max_steps"},
    "bound": {"objective.forget_bound"},
    "published": {
        "objective.num_mismatch", "objective.eps_mismatch", "objective.eps_retain", "objective.forget_bound",
        "optim.learning_rate", "optim.weight_decay", "optim.warmup_ratio", "optim.gradient_clipping", "optim.max_steps",
    },
}  # fmt: skip
"""Study -> knobs in which the runs of the embedded model differ."""
ONLY_THERE = {
    ("published", "copyright"): {"objective.eps_forget"},
    ("published", "harmful"): {"objective.eps_forget"},
}
"""(Study, scenario) -> knobs that differ only there: hallucination's preset has the published weight of forgetting."""
DIFFER["learning_rate"] = DIFFER["published"]
ONLY_THERE |= {("learning_rate", scenario): knobs for (_, scenario), knobs in ONLY_THERE.items()}
CASES = [(study, scenario) for study in STUDIES for scenario in SCENARIOS]


def runs(study, folder="study", seeds=1, **flags):
    plan = studies.plan(study, flags, Path(folder), seeds)
    return {label: arguments.parse(knobs) for label, knobs in plan.items()}


def flat(run):
    values = to_dict(run)
    sections = {f"{s}.{k}": v for s, inner in values.items() if isinstance(inner, dict) for k, v in inner.items()}
    return {**{k: v for k, v in values.items() if not isinstance(v, dict)}, **sections}


def terms(run):
    return resolve("objective", run.objective.name, OBJECTIVES)(run.objective)


@pytest.mark.parametrize(("study", "scenario"), CASES)
def test_variants_resolve_and_differ_in_what_the_study_says(study, scenario):
    found = runs(study, scenario=scenario, seed="7")
    values = [flat(run) for run in found.values()]
    for label, run in found.items():
        check(run)
        assert run.output_dir == f"study/{label}" and (run.scenario, run.seed) == (scenario, 7)
    differing = {knob for knob in values[0] if len({repr(each[knob]) for each in values}) > 1}
    assert differing == (DIFFER[study] | ONLY_THERE.get((study, scenario), set())) | {"output_dir"}
    assert len({fingerprint(run) for run in found.values()}) == len(STUDIES[study].variants)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_terms_of_the_variants_are_those_that_the_paper_compares(scenario):
    ascent, both = (terms(run) for run in runs("mismatch", scenario=scenario).values())
    assert [term.name for term in ascent] == ["forget", "retain"]
    assert [term.name for term in both] == ["forget", "mismatch", "retain"]
    kl, ce = (terms(run) for run in runs("retain_loss", scenario=scenario).values())
    assert [term.loss for term in kl] == ["ce", "ce", "kl"] and [term.loss for term in ce] == ["ce"] * 3
    assert [term._replace(loss="") for term in kl] == [term._replace(loss="") for term in ce]
    bound, free = (terms(run)[0].bound for run in runs("bound", scenario=scenario).values())
    assert bound == PRESETS[scenario]["smollm2-135m"]["objective.forget_bound"] and free == float("inf")


def test_the_reply_is_the_papers_or_the_users():
    random, fixed = runs("reply").values()
    assert (random.data.mismatch_text, fixed.data.mismatch_text) == (None, "I can't help with that.")
    random, fixed = runs("reply", mismatch_text="No.").values()
    assert (random.data.mismatch_text, fixed.data.mismatch_text) == (None, "No.")
    random, fixed = runs("reply", mismatch_data=str(Path(__file__))).values()
    assert random.data.mismatch_data and fixed.data.mismatch_data is None


def test_longer_counts_from_what_flags_and_preset_resolve_to():
    steps = [run.optim.max_steps for run in runs("longer", max_steps="15").values()]
    assert steps == [15, 30, 60]
    steps = [run.optim.max_steps for run in runs("longer", preset="opt-1.3b").values()]
    assert steps == [1000, 2000, 4000]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_published_takes_the_published_row_and_about_as_many_tokens(scenario):
    ours, published, our_rate = runs("published", scenario=scenario).values()
    row = PRESETS[scenario]["opt-1.3b"]
    values = flat(published)
    taken = [knob for knob in row if knob.startswith(("objective.", "optim."))]
    assert {knob for knob in taken if values[knob] != row[knob]} == {"optim.batch_size", "optim.max_steps"}
    retain = 0.5 if scenario == "hallucination" else 1.0
    assert (published.objective.eps_forget, published.objective.eps_mismatch) == (0.5, 1.0)
    assert (published.objective.eps_retain, published.optim.learning_rate) == (retain, 2e-6)
    assert published.model == ours.model and published.data == ours.data
    assert replace(our_rate, **{"optim.learning_rate": 2e-6}, output_dir="") == replace(published, output_dir="")
    assert our_rate.optim.learning_rate == ours.optim.learning_rate
    batch, retain = ours.optim.batch_size, ours.optim.retain_batch_size
    assert (published.optim.batch_size, published.optim.retain_batch_size) == (batch, retain)
    rows = [run.optim.max_steps * (batch * (1 + run.objective.num_mismatch) + retain) for run in (ours, published)]
    assert rows[1] == pytest.approx(rows[0], rel=0.05)
    if scenario == "hallucination":
        assert rows == [36 * 29, 17 * 61]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_learning_rates_are_shares_of_ours_and_all_else_is_published(scenario):
    found = runs("learning_rate", scenario=scenario)
    ours, published = found.pop("ours"), runs("published", scenario=scenario)["published"]
    shares = {label: run.optim.learning_rate / ours.optim.learning_rate for label, run in found.items()}
    assert shares == {"eighth": 1 / 8, "quarter": 1 / 4, "half": 1 / 2, "our-rate": 1}
    for run in found.values():
        assert replace(run, **{"optim.learning_rate": 2e-6}, output_dir="") == replace(published, output_dir="")


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        ({"batch_size": "4", "retain_batch_size": "8", "num_mismatch": "2"}, (4 + 8 + 8, 4 + 20 + 8)),
        ({"eps_mismatch": "0"}, (8 + 13, 8 + 40 + 13)),
        ({"eps_retain": "0"}, (8 + 8, 8 + 40 + 13)),
        ({"gradient_accumulation_steps": "4"}, (29, 61)),
    ],
)
def test_published_steps_follow_batch_sizes_and_terms_that_act(flags, rows):
    published = runs("published", max_steps="1000", **flags)["published"]
    assert published.optim.max_steps == round(1000 * rows[0] / rows[1])


@pytest.mark.parametrize(
    ("study", "flags", "said"),
    [
        ("mismach", {}, "unknown study 'mismach'. Did you mean 'mismatch'"),
        (
            "",
            {},
            "Valid names: bound, learning_rate, longer, mismatch, published, reply, retain_loss",
        ),
        ("mismatch", {"eps_mismach": "1"}, "unknown flag '--eps_mismach'. Did you mean '--eps_mismatch'"),
        ("mismatch", {"eps_mismatch": "0"}, "'mismatch' needs --eps_mismatch above 0; with these flags it is 0.0"),
        ("bound", {"model": "org/other"}, "'bound' needs --forget_bound above 0"),
        ("retain_loss", {"objective": "memorize"}, "study 'retain_loss' sets --objective itself"),
        ("published", {"learning_rate": "2e-6"}, "'published' and 'published-our-rate' are the same run"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(study, flags, said):
    with pytest.raises(UsageError, match=said):
        runs(study, **flags)


def test_a_change_takes_precedence_over_the_flag_however_that_is_written():
    for flag in ("eps_mismatch", "objective.eps_mismatch"):
        found = runs("mismatch", **{flag: "0.7"}, local_rank="0")
        assert [run.objective.eps_mismatch for run in found.values()] == [0.0, 0.7]


def test_every_study_says_in_one_line_what_it_is():
    lines = studies.help_text().splitlines()
    assert max(map(len, lines)) <= 80 or lines[0].startswith("usage")
    for name, study in STUDIES.items():
        assert sum(line.split() == [name, *study.title.split()] for line in lines) == 1
        assert study.source and len(study.variants) >= 2


@pytest.fixture
def variant(tmp_path):
    return runs("mismatch", tmp_path)["ascent-alone"]


def leave(run, ds_config="zero3", after=None, exit_code=None, **chosen):
    folder = Path(run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    resolved = replace(run, **{"engine.ds_config": ds_config, **chosen})
    settings = {**to_dict(resolved), "fingerprint": fingerprint(resolved), "world_size": 1}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "evaluation.json").write_text(json.dumps({
        "before": {"step": 0}, "after": after, "stop": None if exit_code is None else {"exit_code": exit_code},
    }))  # fmt: skip


def test_a_folder_without_a_step_is_new(variant):
    assert studies.state(variant) == "new"
    leave(variant)
    (Path(variant.output_dir) / "evaluation.json").unlink()
    assert studies.state(variant) == "new"


@pytest.mark.parametrize("ds_config", ["zero3", "zero3_fp32"])
def test_a_run_is_known_again_whatever_auto_stood_for_where_it_ran(variant, ds_config):
    leave(variant, ds_config)
    assert studies.state(variant) == "unfinished"
    leave(variant, ds_config, after={"step": 40}, exit_code=0)
    assert studies.state(variant) == "finished"


@pytest.mark.parametrize("exit_code", [None, 75, 3])
def test_a_run_that_was_ended_after_its_last_evaluation_is_not_finished(variant, exit_code):
    """It goes back to its best state, evaluates that one too and exports it: until then nothing is to be compared."""
    leave(variant, after={"step": 40}, exit_code=exit_code)
    assert studies.state(variant) == "unfinished"


def test_a_run_is_known_again_whatever_its_machine_chose_but_not_with_another_flag(variant):
    chosen = {"optim.batch_size": 2, "optim.retain_batch_size": 2, "engine.reference": "resident"}
    leave(variant, "zero2", after={"step": 40}, exit_code=0, **chosen)
    assert studies.state(variant) == "finished"
    assert studies.state(variant, {"optim.batch_size"}) == "other"
    assert studies.state(replace(variant, **{"optim.batch_size": 2}), {"optim.batch_size"}) == "finished"


def test_what_a_study_lets_the_machine_choose_is_what_is_chosen():
    assert set(studies.CHOSEN) == {*choose.FLAGS, "optim.retain_batch_size"}


def test_a_run_with_other_settings_or_none_of_ours_is_not_taken_for_this_one(variant):
    leave(variant, after={"step": 40})
    assert studies.state(replace(variant, seed=1)) == "other"
    assert studies.state(replace(variant, **{"engine.ds_config": "zero2"}), {"engine.ds_config"}) == "other"
    (Path(variant.output_dir) / "config.json").write_text('{"model_type": "llama"}')
    assert studies.state(variant) == "other"


def test_seeds_repeat_every_variant_one_seed_after_the_other():
    found = runs("mismatch", seeds=3, seed="7")
    assert list(found) == [
        "ascent-alone", "with-mismatch", "ascent-alone-seed-8", "with-mismatch-seed-8", "ascent-alone-seed-9",
        "with-mismatch-seed-9",
    ]  # fmt: skip
    assert [run.seed for run in found.values()] == [7, 7, 8, 8, 9, 9]
    assert all(run.output_dir == f"study/{name}" for name, run in found.items())
    alone = runs("mismatch", seed="7")
    for name, run in found.items():
        same_seed = replace(run, seed=7, output_dir=alone[studies.label(name)].output_dir)
        assert same_seed == alone[studies.label(name)]


def spend(run, steps, **tokens):
    """Leave ``run`` finished, with as many response tokens of each term in every step."""
    leave(run, after={"step": steps}, exit_code=0)
    lines = [{"step": n, **{f"response_tokens_{term}": k for term, k in tokens.items()}} for n in range(1, steps + 1)]
    (Path(run.output_dir) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def settled_steps(study, planned):
    return {run: arguments.parse(studies.settled(study, planned, run)).optim.max_steps for run in planned}


SIZES = {"batch_size": "4", "retain_batch_size": "8", "max_steps": "50"}


@pytest.mark.parametrize(
    ("flags", "tokens", "steps"),
    [
        # As many rows: 50 * (4 + 4 + 8) / (4 + 20 + 8) = 25 steps.
        ({}, {"forget": 40, "mismatch": 40, "retain": 80}, 25),
        ({}, {"forget": 40, "mismatch": 20, "retain": 400}, 50 * 460 / (40 + 5 * 20 + 400)),
        # Mismatch answers are as long as those to retain, where ours has none.
        ({"eps_mismatch": "0"}, {"forget": 40, "retain": 200}, 50 * 240 / (40 + 20 * 200 / 8 + 200)),
        # An objective that loads other rows than weights above 0 would.
        ({"objective": "gradient_ascent"}, {"forget": 40}, 50 * 40 / (40 / 4 * (4 + 20 + 8))),
    ],
)
def test_published_runs_take_as_many_response_tokens_as_our_finished_one(tmp_path, flags, tokens, steps):
    planned = studies.plan("published", SIZES | flags, tmp_path)
    before = settled_steps("published", planned)
    spend(arguments.parse(planned["ours"]), 50, **tokens)
    ours, *published = settled_steps("published", planned).values()
    assert ours == 50 and published == [round(steps)] * 2
    # What stands there is not the first run of another study.
    other = studies.plan("published", {**SIZES, **flags, "weight_decay": "0.3"}, tmp_path)
    assert settled_steps("published", other) == before


def test_every_seed_takes_the_steps_that_the_first_run_gives(tmp_path):
    planned = studies.plan("learning_rate", SIZES | {"seed": "3"}, tmp_path, seeds=2)
    spend(arguments.parse(planned["ours-seed-4"]), 50, forget=40, mismatch=40, retain=4)
    spend(arguments.parse(planned["ours"]), 50, forget=40, mismatch=20, retain=400)
    found = settled_steps("learning_rate", planned)
    assert found == {run: 50 if studies.label(run) == "ours" else 43 for run in planned}


@pytest.mark.parametrize(
    ("study", "flags"), [("published", {"stop": "rate:0.1", "eval_every": "10"}), ("bound", {}), ("longer", {})]
)
def test_where_rules_end_runs_and_in_other_studies_nothing_is_settled_later(tmp_path, study, flags):
    planned = studies.plan(study, SIZES | flags, tmp_path)
    spend(arguments.parse(next(iter(planned.values()))), 10, forget=40, mismatch=20, retain=400)
    assert [studies.settled(study, planned, run) for run in planned] == list(planned.values())


def test_a_run_without_counts_of_terms_is_named(tmp_path):
    planned = studies.plan("published", SIZES, tmp_path)
    spend(arguments.parse(planned["ours"]), 3)
    with pytest.raises(UsageError, match=r"/ours was run by an earlier version"):
        studies.settled("published", planned, "published")


def test_weights_of_0_and_no_steps_are_left_to_the_check_of_runs():
    """It says what is wrong with them, as for a single run."""
    for flags in ({"max_steps": "0"}, {"eps_forget": "0", "eps_mismatch": "0", "eps_retain": "0"}):
        with pytest.raises(UsageError, match="max_steps|eps_"):
            check(runs("published", **flags)["ours"])


def test_a_launcher_starts_published_runs_with_the_steps_that_ours_gave(tmp_path, monkeypatch, capsys):
    ablate = runpy.run_path(str(REPOSITORY / "launchers" / "ablate.py"))
    flags, lines = SIZES | {"output_dir": str(tmp_path), "forget_columns": "prompt,response"}, []

    def run(line):
        lines.append(dict(word[2:].split("=", 1) for word in line if word.startswith("--")))
        spend(arguments.parse(lines[-1]), 50, forget=40, mismatch=20, retain=400)
        return 75 if len(lines) == 3 else 0

    monkeypatch.setitem(ablate["main"].__globals__, "run", run)
    with pytest.raises(SystemExit, match="75"):
        ablate["main"](study="published", **flags)
    assert [line["optim.max_steps"] for line in lines] == ["50", "43", "43"]
    assert "published-our-rate ended with exit code 75" in capsys.readouterr().out
