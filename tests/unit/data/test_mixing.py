"""Rows divided into sides, and several sources together: shares, order, prompts alone, and forms that differ."""

import csv
import json

import pytest

from unlearn_ds.config import UsageError
from unlearn_ds.data.sources import form_warning, interleave, mix, prompts, split
from unlearn_ds.types import Row

TOFU = [{"question": "Who wrote it?", "answer": "Ann"}, {"question": "When?", "answer": "In May"}]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_csv(path, records):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return str(path)


def rows(count: int, name: str) -> list[Row]:
    return [Row(f"{name} {n}", "answer") for n in range(count)]


def test_without_weights_every_row_stands_once_and_with_weights_each_source_has_its_share():
    few, many = rows(2, "few"), rows(6, "many")
    assert mix([(few, None), (many, None)]) == few + many
    mixed = mix([(few, 1.0), (many, 1.0)])
    assert len(mixed) == 12 and set(map(id, mixed)) == set(map(id, few + many))
    assert [sum(row in part for row in mixed) for part in (few, many)] == [6, 6]
    assert [sum(row in part for row in mix([(few, 2.0), (many, 1.0)])) for part in (few, many)] == [12, 6]
    assert mix([([], 1.0), (many, 1.0)]) == many


def test_the_first_rows_of_several_sources_hold_some_of_each():
    few, many = rows(1, "few"), rows(3, "many")
    assert interleave([few, many]) == [few[0], *many]
    assert interleave([many, few])[:2] == [many[0], few[0]]


def test_prompts_of_a_labelled_source_are_the_safe_ones(tmp_path):
    records = [{"id": n, "prompt": f"p{n}", "label": label} for n, label in enumerate(("safe", "unsafe", "safe"))]
    assert prompts(write_csv(tmp_path / "xstest.csv", records)) == ["p0", "p2"]
    assert prompts(write_lines(tmp_path / "plain.jsonl", TOFU)) == ["Who wrote it?", "When?"]
    with pytest.raises(UsageError, match="no column prompt or question; it has text"):
        prompts(write_lines(tmp_path / "text.jsonl", [{"text": "x"}]))


@pytest.mark.parametrize(("prose", "warned"), [(0, False), (2, False), (3, True), (4, True)])
def test_rows_to_forget_and_to_retain_of_another_form_are_told(prose, warned):
    """The paper: normal data must have the form of the forget data, or the form itself is unlearned."""
    retain = [Row("", f"text {n}") for n in range(prose)] + rows(4 - prose, "asked")
    warning = form_warning(rows(4, "asked"), retain)
    assert bool(warning) == warned
    if warned:
        assert "prompts with answers" in warning and "--retain_data" in warning


def many_rows(count=4000) -> list[Row]:
    return [Row(f"question {i}", f"answer {i}") for i in range(count)]


def test_the_split_is_about_70_10_20_and_loses_nothing():
    parts = split(many_rows())
    shares = {name: len(rows) / 4000 for name, rows in parts.items()}
    assert shares == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.025)
    assert sorted(row.prompt for rows in parts.values() for row in rows) == sorted(row.prompt for row in many_rows())


def test_a_row_keeps_its_side_whatever_else_the_file_holds():
    whole, part = split(many_rows(400)), split(many_rows(400)[::-3])
    for name, rows in part.items():
        assert rows and set(rows) <= set(whole[name])


def test_rows_with_the_same_prompt_stay_on_one_side():
    rows = [Row(f"question {i}", f"answer {j}") for i in range(200) for j in range(3)]
    sides = [{row.prompt for row in part} for part in split(rows).values()]
    assert all(sides) and sum(map(len, sides)) == 200


def test_running_text_is_split_by_its_text():
    parts = split(Row("", f"paragraph {i}") for i in range(200))
    assert all(parts.values())
