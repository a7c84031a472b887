"""What is known about each protein, from a CSV file or from the FASTA headers: what the probe learns to predict."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from proteus_pipeline.errors import ConfigError, SequenceError
from proteus_pipeline.sequences.fasta import Record, is_one_line, replace_text, shown, text_lines

Task = Literal["classification", "regression"]
CLASSES_AT_MOST = 10
"""Numbers with at most this many distinct values are taken for classes."""


@dataclass(frozen=True)
class Label:
    """What is known about one protein.

    Attributes
    ----------
    id
        The record's.
    target
        A class, or a number as text. Never empty when it was read.
    group
        Proteins of one group stay in one fold; ``""`` for none.

    """

    id: str
    target: str
    group: str = ""


@dataclass(frozen=True)
class LabelTable:
    """What a label file gave: the labels, and how many of its rows were for ids that the FASTA does not have."""

    labels: list[Label]
    ignored: int = 0


def labels_from_headers(records: Iterable[Record], key: str) -> list[Label]:
    """Read the word ``key=value`` of each description; a record without it gets no label.

    The value ends at the first space.

    >>> labels_from_headers([Record("P26381", "MSS", "loc=Cell_membrane")], "loc")
    [Label(id='P26381', target='Cell_membrane', group='')]

    Raises
    ------
    SequenceError
        For ``key=`` with nothing after it, or an id with two different values.
    ConfigError
        For a key that can't be such a word.

    """
    if key.split() != [key] or "=" in key:
        raise ConfigError(f"data.label_key={key!r} is no key", "use one word without '=', such as loc")
    labels: dict[str, Label] = {}
    prefix = f"{key}="
    for record in records:
        for word in record.description.split():
            if word.startswith(prefix):
                label = Label(record.id, word.removeprefix(prefix))
                _add(labels, label, f"the header of record {shown(record.id)}", f"the word {prefix}")
    return list(labels.values())


def read_labels(path: Path, ids: Collection[str]) -> LabelTable:
    """Read a CSV file with the columns ``id``, ``target`` and, if there are groups, ``group``.

    Labels come in the file's order. Other columns, and rows for ids that are not in `ids`, are ignored.

    Raises
    ------
    SequenceError
        For a file that can't be read as such; a row without an id or a target; an id with two different labels; no row
        that matches any of `ids`.

    """
    wanted = frozenset(ids)
    labels: dict[str, Label] = {}
    seen = ignored = 0
    for number, name, target, group in _rows(path):
        seen += 1
        if not name:
            raise SequenceError(f"{path}, line {number}: no id", "write the FASTA id in the column 'id'")
        if name in wanted:
            _add(labels, Label(name, target, group), f"{path}, line {number}", "its row")
        else:
            ignored += 1
    if not labels:
        raise SequenceError(
            f"none of the {seen} rows of {path} is for an id of the FASTA",
            "write each id as the first word of its FASTA header, or name another file with data.labels=PATH",
        )
    return LabelTable(list(labels.values()), ignored)


def _add(labels: dict[str, Label], label: Label, where: str, source: str) -> None:
    if not label.target:
        raise SequenceError(f"{where}: no target for {shown(label.id)}", f"write one, or remove {source}")
    if labels.setdefault(label.id, label) != label:
        raise SequenceError(
            f"{where}: {shown(label.id)} was {_told(labels[label.id])} before and is {_told(label)} here",
            f"remove {source} from one of the two",
        )


def _told(label: Label) -> str:
    return shown(label.target) + (f" (group {shown(label.group)})" if label.group else "")


def _rows(path: Path) -> Iterator[tuple[int, str, str, str]]:
    """Yield line number, id, target and group of each row, stripped."""
    # strict: a quote that is never closed would otherwise swallow the rest of the file
    reader = csv.reader(text_lines(path, "data.labels"), strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        place = _columns(path, names)
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                raise SequenceError(
                    f"{path}, line {reader.line_num}: {len(row)} fields, where the header has {len(names)}",
                    "put a value that holds a comma in double quotes",
                )
            group = row[place["group"]].strip() if "group" in place else ""
            yield reader.line_num, row[place["id"]].strip(), row[place["target"]].strip(), group
    except csv.Error as error:
        raise SequenceError(f"{path}, line {reader.line_num}: {error}", "save it as comma-separated CSV") from error


def _columns(path: Path, names: list[str]) -> dict[str, int]:
    found = ", ".join(shown(name) for name in names[:20]) or "none"
    for column in ("id", "target", "group"):
        if names.count(column) > 1:
            raise SequenceError(f"{path} has the column {column!r} twice", "rename one of them")
        if column not in names and column != "group":
            raise SequenceError(
                f"{path} has no column {column!r}; its columns are {found}",
                "start it with the line id,target or id,target,group, separated by commas",
            )
    return {name: names.index(name) for name in ("id", "target", "group") if name in names}


def infer_task(labels: Iterable[Label]) -> Task:
    """Say which task the targets are for, where ``probe.task`` does not.

    Regression when every target is a finite number and there are more than `CLASSES_AT_MOST` different numbers
    (``1`` and ``1.0`` are one); classification otherwise. So one target that is no number, ``nan`` included, makes
    them all classes.

    Raises
    ------
    SequenceError
        For no labels.

    """
    numbers = set[float]()
    numeric, count = True, 0
    for label in labels:
        count += 1
        number = _number(label.target)
        numeric = numeric and math.isfinite(number)
        numbers.add(number)
    if not count:
        raise SequenceError("there are no labels to infer a task from", "name a file with data.labels=PATH")
    return "regression" if numeric and len(numbers) > CLASSES_AT_MOST else "classification"


def _number(text: str) -> float:
    try:
        return math.nan if "_" in text else float(text)  # Python reads the class 1_2 as 12
    except ValueError:
        return math.nan


def write_labels(path: Path, labels: Iterable[Label]) -> None:
    """Write ``id,target,group`` in the order given; `read_labels` gives the same labels back.

    Raises
    ------
    SequenceError
        For a label that would not be read back as it is.
    StorageError
        When the file can't be written. What was at `path` before is then still there.

    """
    replace_text(path, _csv_lines(labels))


def _csv_lines(labels: Iterable[Label]) -> Iterator[str]:
    yield "id,target,group\n"
    for label in labels:
        fields = (label.id, label.target, label.group)
        if not (label.id and label.target) or not all(is_one_line(field) for field in fields):
            raise SequenceError(
                f"the label of {shown(label.id)} can't be written as CSV",
                "give an id and a target, each one line, stripped",
            )
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(fields)
        yield line.getvalue()
