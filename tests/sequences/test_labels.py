from __future__ import annotations

import gzip
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proteus_pipeline.errors import ConfigError, SequenceError, StorageError
from proteus_pipeline.sequences.fasta import Record, is_one_line, read_fasta
from proteus_pipeline.sequences.labels import (
    Label,
    LabelTable,
    infer_task,
    labels_from_headers,
    read_labels,
    write_labels,
)

DEMO = Path(__file__).parents[2] / "data" / "demo100.fasta"
OVERRIDE = "data.labels=PATH"
IDS = ["P1", "P2", "P3"]


def written(folder: Path, content: bytes | str) -> Path:
    path = folder / "labels.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path, *expected: str) -> None:
    """Hold that reading fails, in one line that names the file and holds each expected part."""
    with pytest.raises(SequenceError) as caught:
        read_labels(path, IDS)
    message = str(caught.value)
    for part in (str(path), *expected):
        assert part in message
    assert caught.value.remedy
    assert len(message.splitlines()) == 1


def numbers(count: int) -> list[Label]:
    return [Label(f"P{n}", str(n)) for n in range(count)]


def test_the_demo_has_20_of_each_of_five_classes():
    labels = labels_from_headers(read_fasta(DEMO), "loc")
    assert len({label.id for label in labels}) == 100
    counts = Counter(label.target for label in labels)
    assert sorted(counts.values()) == [20] * 5
    assert "Cell_membrane" in counts
    assert infer_task(labels) == "classification"


def test_headers_without_the_word_give_no_label():
    records = [
        Record("P1", "M", "x loc=a=b y"),
        Record("P2", "M", "xloc=a Loc=a loc"),
        Record("P3", "M"),
        Record("P1", "M", "loc=a=b"),
    ]
    assert labels_from_headers(records, "loc") == [Label("P1", "a=b")]
    assert labels_from_headers(records, "other") == []


def test_a_word_without_a_value_is_refused():
    with pytest.raises(SequenceError, match="record 'P1': no target for 'P1'; write one, or remove the word loc="):
        labels_from_headers([Record("P1", "M", "loc= a")], "loc")


@pytest.mark.parametrize("descriptions", [["loc=a loc=b"], ["loc=a", "loc=b"]])
def test_two_values_for_one_id_are_refused(descriptions: list[str]):
    records = [Record("P1", "M", text) for text in descriptions]
    with pytest.raises(SequenceError, match="'P1' was 'a' before and is 'b' here; remove the word loc= from one"):
        labels_from_headers(records, "loc")


@pytest.mark.parametrize("key", ["", "two words", "loc=", " loc"])
def test_a_key_that_is_no_word_is_refused(key: str):
    with pytest.raises(ConfigError, match=r"data.label_key=.* use one word without '='"):
        labels_from_headers([], key)


PLAIN = "id,target,group\nP1,a,g\nP2,b,\nQ9,c,h\n"
TABLE = LabelTable([Label("P1", "a", "g"), Label("P2", "b")], ignored=1)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(PLAIN, id="plain"),
        pytest.param(b"\xef\xbb\xbf" + PLAIN.encode(), id="BOM"),
        pytest.param(gzip.compress(PLAIN.encode()), id="gzip"),
        pytest.param(PLAIN.replace("\n", "\r\n"), id="CRLF"),
        pytest.param(PLAIN.replace("\n", "\n\n").rstrip(), id="blank lines"),
        pytest.param(PLAIN.replace(",", " , "), id="spaces"),
        pytest.param("note,group,target,id\n1,g,a,P1\n2,,b,P2\n3,h,c,Q9\n", id="other columns, other order"),
        pytest.param(PLAIN + "P1,a,g\n", id="the same row again"),
    ],
)
def test_layout_makes_no_difference(tmp_path: Path, content: bytes | str):
    assert read_labels(written(tmp_path, content), IDS) == TABLE


def test_rows_for_other_ids_are_counted_and_not_judged(tmp_path: Path):
    path = written(tmp_path, 'id,target\nQ1,\nQ2,a\nQ2,b\nP2,"a, b"\n')
    assert read_labels(path, dict.fromkeys(IDS)) == LabelTable([Label("P2", "a, b")], ignored=3)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param("", ("is empty", OVERRIDE), id="empty"),
        pytest.param("\n", ("no column 'id'", "its columns are none"), id="blank"),
        pytest.param(
            "name,target\nP1,a\n",
            ("no column 'id'; its columns are 'name', 'target'", "id,target"),
            id="no id column",
        ),
        pytest.param("id,class\nP1,a\n", ("no column 'target'; its columns are 'id', 'class'",), id="no target column"),
        pytest.param("id\ttarget\nP1\ta\n", (r"its columns are 'id\ttarget'", "separated by commas"), id="tabs"),
        pytest.param("id,target,id\nP1,a,P2\n", ("column 'id' twice", "rename one"), id="a column twice"),
        pytest.param("id,target\nP1,a\n,b\n", ("line 3: no id", "column 'id'"), id="no id"),
        pytest.param("id,target\nP1, \n", ("line 2: no target for 'P1'", "write one"), id="no target"),
        pytest.param("id,target\nP1\n", ("line 2: 1 fields, where the header has 2",), id="short row"),
        pytest.param("id,target\nP1,a,b\n", ("line 2: 3 fields", "in double quotes"), id="long row"),
        pytest.param(
            "id,target\nP1,a\nP2,c\nP1,b\n",
            ("line 4: 'P1' was 'a' before and is 'b' here", "remove its row"),
            id="two targets",
        ),
        pytest.param(
            "id,target,group\nP1,a,g\nP1,a,h\n", ("'a' (group 'g') before and is 'a' (group 'h')",), id="two groups"
        ),
        pytest.param("id,target\nQ1,a\nQ2,b\n", ("none of the 2 rows", "FASTA", OVERRIDE), id="other ids"),
        pytest.param("id,target\n", ("none of the 0 rows", OVERRIDE), id="no rows"),
        pytest.param(b"id,target\nP1,\xff\n", ("line 2: binary data", OVERRIDE), id="no UTF-8"),
        pytest.param(b"id,target\nP1,a\0\n", ("line 2: binary data", OVERRIDE), id="NUL"),
        pytest.param(b"PK\x03\x04\0\0", ("line 1: binary data", OVERRIDE), id="a spreadsheet"),
        pytest.param(gzip.compress(PLAIN.encode())[:-9], ("cut short", "again"), id="cut gzip"),
        pytest.param('id,target\nP1,"a\nP2,b\n', ("line 3", "comma-separated CSV"), id="an open quote"),
        pytest.param("id,target\nP1," + "a" * 200_000, ("line 2", "field limit", "CSV"), id="a huge field"),
    ],
)
def test_what_is_no_label_file_is_refused(tmp_path: Path, content: bytes | str, expected: tuple[str, ...]):
    refused(written(tmp_path, content), *expected)


def test_a_missing_file_or_a_directory_is_named(tmp_path: Path):
    refused(tmp_path / "none.csv", "there is no file", OVERRIDE)
    refused(tmp_path, "is a directory", OVERRIDE)


@given(st.binary(max_size=200), st.sampled_from([b"", b"id,target\n", b"id,target\nP1,a\n"]))
def test_random_bytes_raise_sequence_errors_only(content: bytes, start: bytes):
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), start + content)
        try:
            table = read_labels(path, IDS)
        except SequenceError:
            refused(path)
        else:
            assert table.labels
            assert {label.id for label in table.labels} <= set(IDS)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (numbers(11), "regression"),
        (numbers(10), "classification"),
        (numbers(10) * 3, "classification"),
        ([*numbers(10), Label("x", "1.0")], "classification"),
        ([*numbers(10), Label("x", " -1.5e3")], "regression"),
        ([*numbers(11), Label("x", "high")], "classification"),
        ([Label("x", "low"), *numbers(11)], "classification"),
        ([*numbers(11), Label("x", "nan")], "classification"),
        ([*numbers(11), Label("x", "inf")], "classification"),
        ([Label(f"P{n}", f"1_{n}") for n in range(20)], "classification"),
    ],
)
def test_the_task_is_inferred_from_the_targets(labels: list[Label], expected: str):
    assert infer_task(iter(labels)) == expected


def test_no_labels_have_no_task():
    with pytest.raises(SequenceError, match=r"no labels to infer a task from; .*data.labels=PATH"):
        infer_task([])


fields = st.text(st.characters(exclude_categories=["Cs"])).map(str.strip).filter(is_one_line)
rows = st.builds(Label, fields.filter(bool), fields.filter(bool), fields)


@settings(max_examples=50)
@given(st.lists(rows, min_size=1, unique_by=lambda label: label.id))
def test_what_is_written_is_read_back(labels: list[Label]):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.csv"
        write_labels(path, iter(labels))
        assert read_labels(path, {label.id for label in labels}) == LabelTable(labels)
        assert path.read_bytes().startswith(b"id,target,group\n")
        assert path.read_bytes().count(b"\n") == len(labels) + 1


@pytest.mark.parametrize(
    "label", [Label("", "a"), Label("P1", ""), Label("P1", "a\nb"), Label("P1", " a"), Label("P1", "a", "g\0")]
)
def test_a_label_that_could_not_be_read_back_is_not_written(tmp_path: Path, label: Label):
    path = written(tmp_path, PLAIN)
    with pytest.raises(SequenceError, match=f"label of '{label.id}' can't be written as CSV; give an id and a target"):
        write_labels(path, [label])
    assert [entry.read_text() for entry in tmp_path.iterdir()] == [PLAIN]


def test_writing_where_nothing_can_be_written_says_so(tmp_path: Path):
    with pytest.raises(StorageError, match=r"labels\.csv can't be written: .*; check its folder"):
        write_labels(tmp_path / "none" / "labels.csv", [Label("P1", "a")])
