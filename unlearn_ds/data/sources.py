"""Read a hub dataset or a local file into rows; recognise its schema, reject what cannot be used and say why."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from unlearn_ds.config import DATA_SUFFIXES, UsageError, looks_like_file
from unlearn_ds.types import Row

_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
# "replace" puts U+FFFD where bytes are not UTF-8; the row is then rejected instead of the whole file.
_READER_OPTIONS: dict[str, dict[str, Any]] = {
    "csv": {"encoding": "utf-8-sig", "encoding_errors": "replace", "keep_default_na": False, "index_col": False},
    # The alias matters: under the name "utf-8" the reader takes the bytes as they are and fails on the first bad one.
    "json": {"encoding": "utf_8", "encoding_errors": "replace"},
    "text": {"encoding": "utf-8-sig", "encoding_errors": "replace", "sample_by": "paragraph"},
    "parquet": {},
}


LARGEST_FORM_GAP = 0.5
"""Between the shares of running text among rows to forget and rows to retain."""

Example = tuple[Any, Any, Any]
"""(prompt, answer, right answers) as a record holds them."""
Convert = Callable[[Mapping[str, Any]], list[Example]]


class Schema(NamedTuple):
    """How records with certain columns become rows; a record may hold none, one or several.

    forget: record -> [(prompt, answer to forget, right answers)].
    retain: record -> [(prompt, right answer, all right answers)].
    """

    name: str
    columns: tuple[str, ...]
    forget: Convert
    retain: Convert
    is_running_text: bool = False
    labels_records: bool = False
    """Whether right answers to a prompt stand in other records."""


def _pair(prompt: str, answer: str) -> Convert:
    return lambda r: [(r[prompt], r[answer], [])]


def _messages(record: Mapping[str, Any]) -> list[Example]:
    """The last reply of the assistant and the user's turn right before it."""
    turns = list(record["messages"] or [])
    for asked, replied in zip(turns[-2::-1], turns[:0:-1], strict=True):
        if asked["role"] == "user" and replied["role"] == "assistant":
            return [(asked["content"], replied["content"], [])]
    return [("", "", [])]


def _safety_pair(record: Mapping[str, Any], safe: bool) -> list[Example]:
    """The responses of a PKU-SafeRLHF record that are safe, or those that are not, with the safe ones as right."""
    labelled = [(record[f"response_{n}"], _is_true(record[f"is_response_{n}_safe"])) for n in (0, 1)]
    right = [response for response, is_safe in labelled if is_safe]
    return [(record["prompt"], response, right) for response, is_safe in labelled if is_safe == safe]


def _labelled(record: Mapping[str, Any], safe: bool) -> list[Example]:
    return [(record["prompt"], record["response"], [])] if _is_true(record["is_safe"]) == safe else []


def _is_true(value: Any) -> bool:
    """A label as the boolean, number or text that the file format makes of it."""
    return str(value).strip().lower() in ("true", "1")


SCHEMAS: tuple[Schema, ...] = (
    Schema(
        "HaluEval qa",
        ("question", "right_answer", "hallucinated_answer"),
        lambda r: [(r["question"], r["hallucinated_answer"], r["right_answer"])],
        lambda r: [(r["question"], r["right_answer"], r["right_answer"])],
    ),
    Schema(
        "TruthfulQA csv",
        ("Question", "Best Answer", "Correct Answers", "Incorrect Answers"),
        lambda r: [(r["Question"], str(r["Incorrect Answers"]).split(";")[0], str(r["Correct Answers"]).split(";"))],
        lambda r: [(r["Question"], r["Best Answer"], str(r["Correct Answers"]).split(";"))],
    ),
    Schema(
        "TruthfulQA generation",
        ("question", "best_answer", "correct_answers", "incorrect_answers"),
        lambda r: [(r["question"], (r["incorrect_answers"] or [""])[0], r["correct_answers"])],
        lambda r: [(r["question"], r["best_answer"], r["correct_answers"])],
    ),
    # The older release of PKU-SafeRLHF and today's differ in other columns only.
    Schema(
        "PKU-SafeRLHF",
        ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"),
        lambda r: _safety_pair(r, safe=False),
        lambda r: _safety_pair(r, safe=True),
    ),
    Schema(
        "BeaverTails",
        ("prompt", "response", "is_safe"),
        lambda r: _labelled(r, safe=False),
        lambda r: _labelled(r, safe=True),
        labels_records=True,
    ),
    Schema("TOFU", ("question", "answer"), _pair("question", "answer"), _pair("question", "answer")),
    Schema("chat messages", ("messages",), _messages, _messages),
    Schema("prompt/response", ("prompt", "response"), _pair("prompt", "response"), _pair("prompt", "response")),
    Schema("prompt/completion", ("prompt", "completion"), _pair("prompt", "completion"), _pair("prompt", "completion")),
    Schema("running text", ("text",), lambda r: [("", r["text"], [])], lambda r: [("", r["text"], [])], True),
)


@dataclass
class Source:
    """What was read: usable rows, rejected ones with reasons, the name of the schema, and what the rows are for."""

    name: str
    schema: str
    rows: list[Row] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    use: str = ""

    def reject(self, index: int, reason: str, prompt: Any) -> None:
        self.rejected.append({"source": self.name, "row": index, "reason": reason, "prompt": str(prompt)[:200]})

    def keep(self, reason: str, usable: Callable[[Row], bool]) -> None:
        """Reject the rows that are not usable, for one reason."""
        for index, row in enumerate(self.rows):
            if not usable(row):
                self.reject(index, reason, row.prompt)
        self.rows = [row for row in self.rows if usable(row)]

    def describe(self) -> str:
        """One line for the log: name, schema, counts by reason."""
        counts = Counter(entry["reason"] for entry in self.rejected)
        reasons = "".join(f", {count} {reason}" for reason, count in sorted(counts.items()))
        return f"{self.name}: {self.schema}, {len(self.rows)} rows{reasons}"


def read(name: str, kind: str, columns: tuple[str, ...] = ()) -> Source:
    """Read ``name`` (hub id, ``org/name:config`` or local file) as "forget" or "retain" rows.

    ``columns`` names prompt, answer and optionally the right answer for files without a known schema. Raises
    ``UsageError`` for an unreadable file, missing columns, or a file without rows.
    """
    records = _records(name)
    if not len(records):
        raise UsageError(f"{name} holds no rows.")
    schema = _explicit(columns, records.column_names, name, kind) if columns else _recognise(records.column_names, name)
    source = Source(name, schema.name)
    convert = schema.forget if kind == "forget" else schema.retain
    seen: set[str] = set()
    others: dict[Any, list[Any]] = {}
    safe = (e for record in records for e in schema.retain(record)) if schema.labels_records else ()
    for prompt, answer, _ in safe if kind == "forget" else ():
        others.setdefault(prompt, []).append(answer)
    examples = ((index, example) for index, record in enumerate(records) for example in convert(record))
    for index, (prompt, answer, right) in examples:
        right = right or others.get(prompt, [])
        text = _text(prompt)
        rights = tuple(filter(None, map(_text, right if isinstance(right, (list, tuple)) else [right])))
        row = Row(text, _text(answer), rights, content_key(text, _text(answer)))
        reason = _unusable(row, schema.is_running_text, seen)
        if reason:
            source.reject(index, reason, text or answer)
        else:
            seen.add(row.key)
            source.rows.append(row)
    return source


def _unusable(row: Row, is_running_text: bool, seen: set[str]) -> str | None:
    if not row.prompt and not is_running_text:
        return "empty prompt"
    if not row.answer:
        return "empty answer"
    if "\ufffd" in row.prompt + row.answer:
        return "bad encoding"
    return DUPLICATE if row.key in seen else None


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def content_key(*texts: str) -> str:
    """Name of a row by its content, stable over files, order and machines."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _records(name: str) -> datasets.Dataset:
    datasets.disable_progress_bars()
    try:
        if looks_like_file(name):
            path = Path(name).expanduser()
            if path.is_dir():
                raise UsageError(
                    f"{name} is a folder: its txt files are read as pieces with --data.as_pieces true, as the "
                    "copyright scenario does by itself."
                )
            if not path.stat().st_size:
                raise UsageError(f"{name} is empty.")
            reader = _READERS[path.suffix.lower()]
            options = dict(_READER_OPTIONS[reader])
            if reader == "csv":
                options["features"] = _text_columns(path)
            return datasets.load_dataset(reader, data_files=str(path), split="train", **options)
        hub_id, _, config = name.partition(":")
        splits = datasets.load_dataset(hub_id, config or None)
        return splits["train"] if "train" in splits else splits[next(iter(splits))]
    except UsageError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        hint = "" if looks_like_file(name) else f" A local file ends in {', '.join(DATA_SUFFIXES)}."
        reason = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0][:300]}"
        if "corresponds to no data" in reason:
            raise UsageError(f"{name} has a header and no rows.") from error
        if looks_like_file(name) and name.lower().endswith(".jsonl") and not isinstance(cause, OSError):
            reason = _broken_line(Path(name).expanduser()) or reason
        raise UsageError(f"cannot read {name}: {reason}.{hint}") from error


def _broken_line(path: Path) -> str | None:
    """The first line of a jsonl file that is no JSON object; the reader does not name it."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is no JSON object"
            except json.JSONDecodeError as error:
                return f"line {number} is no JSON: {error.msg.removesuffix(' at')} at character {error.colno}"
    return None


def _text_columns(path: Path) -> datasets.Features:
    """Every cell of a csv as the text it is: "007" stays "007", "1.50" stays "1.50"."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = next(csv.reader(file), [])
    return datasets.Features({name: datasets.Value("string") for name in header})


def _recognise(columns: Iterable[str], name: str) -> Schema:
    there = set(columns)
    for schema in SCHEMAS:
        if there.issuperset(schema.columns):
            return schema
    known = "; ".join(f"{schema.name} ({', '.join(schema.columns)})" for schema in SCHEMAS)
    raise UsageError(
        f"{name} has the columns {', '.join(sorted(there))}, which no known schema has. Name them with "
        "--forget_columns PROMPT,WRONG[,RIGHT] or --retain_columns PROMPT,ANSWER, each the name of a column. Known "
        f"schemas: {known}."
    )


def _explicit(wanted: tuple[str, ...], there: Iterable[str], name: str, kind: str) -> Schema:
    missing = [column for column in wanted if column not in set(there)]
    if missing:
        raise UsageError(f"{name} has no column {', '.join(missing)}; it has {', '.join(sorted(there))}.")
    if len(wanted) not in (1, 2, 3):
        raise UsageError(f"name one (answer), two (prompt,answer) or three columns for {name}; got {len(wanted)}.")

    def take(record: Mapping[str, Any]) -> list[Example]:
        values = [record[column] for column in wanted]
        return [("", *values, []) if len(values) == 1 else (*values, [])[:3]]

    # Right and wrong answers in the other order would unlearn the right ones: the log says which is which.
    roles = ("prompt", "wrong" if kind == "forget" else "answer", "right") if len(wanted) > 1 else ("answer",)
    told = ", ".join(f"{role} = {column}" for role, column in zip(roles, wanted, strict=False))
    return Schema(f"columns {told}", wanted, take, take, is_running_text=len(wanted) == 1)


def split(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Divide rows 70/10/20 into train, validation and test by their content alone.

    Rows with the same prompt stay together, and a row keeps its side whatever else the file holds.
    """
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        share = int(hashlib.sha256((row.prompt or row.answer).encode()).hexdigest()[:8], 16) / 16**8
        parts["train" if share < 0.7 else "validation" if share < 0.8 else "test"].append(row)
    return parts


def mix(groups: Iterable[tuple[list[Row], float | None]]) -> list[Row]:
    """Rows in which each group has its share by weight; without weights every row stands once.

    The group with the most rows for its weight stands once, rows of the others are repeated in turn.
    """
    present = [(rows, weight) for rows, weight in groups if rows]
    scale = max((len(rows) / weight for rows, weight in present if weight), default=0.0)
    mixed = []
    for rows, weight in present:
        count = len(rows) if weight is None else round(weight * scale)
        mixed += [rows[n % len(rows)] for n in range(max(count, len(rows)))]
    return mixed


def interleave(groups: Iterable[list[Row]]) -> list[Row]:
    """One row of each group in turn, so that the first N hold something of each."""
    return [row for tier in itertools.zip_longest(*groups) for row in tier if row is not None]


def prompts(name: str, columns: tuple[str, ...] = ()) -> list[str]:
    """Distinct prompts of a source that needs no answers; of labelled ones (XSTest's ``label``) the safe ones."""
    records = _records(name)
    there = records.column_names
    column = next((c for c in columns or ("prompt", "question", "Question") if c in there), None)
    if column is None:
        raise UsageError(f"{name} has no column prompt or question; it has {', '.join(sorted(there))}.")
    safe = [r for r in records if "label" not in there or str(r["label"]).lower() == "safe"]
    return list(dict.fromkeys(filter(None, (_text(record[column]) for record in safe))))


def form_warning(forget: Sequence[Row], retain: Sequence[Row]) -> str | None:
    """A sentence when rows to forget and rows to keep differ in form: then the form is unlearned (arXiv 2310.10683)."""
    shares = [sum(row.is_prose for row in rows) / max(1, len(rows)) for rows in (forget, retain)]
    if abs(shares[0] - shares[1]) <= LARGEST_FORM_GAP:
        return None
    forms = ["running text" if share > 0.5 else "prompts with answers" for share in shares]
    return (
        f"rows to forget are mostly {forms[0]} and only {min(shares[1], 1 - shares[1]):.0%} of the rows to retain are: "
        "the model may unlearn the form instead of the content. Add rows of that form to --retain_data."
    )


DUPLICATE = "duplicate"
"""Why a row is left out that is there already: nothing is wrong with it."""


def check_rejected(sources: Iterable[Source], largest_share: float) -> None:
    """Raise ``UsageError`` when more than ``largest_share`` of a source's rows cannot be used; duplicates can."""
    for source in sources:
        unusable = sum(entry["reason"] != DUPLICATE for entry in source.rejected)
        share = unusable / max(1, len(source.rejected) + len(source.rows))
        if share > largest_share or not source.rows:
            raise UsageError(
                f"{source.describe()}. {share:.0%} of the rows are unusable, more than --data.max_rejected "
                f"{largest_share:g}; rejected.jsonl in the output folder names each."
            )


def write_rejected(sources: Iterable[Source], path: Path) -> None:
    """Write one JSON line for each rejected row."""
    lines = [json.dumps(entry, ensure_ascii=False) for source in sources for entry in source.rejected]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
