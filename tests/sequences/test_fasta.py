from __future__ import annotations

import gzip
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proteus_pipeline.errors import SequenceError, StorageError
from proteus_pipeline.sequences.fasta import Record, read_fasta, replace_text, shown, write_fasta
from proteus_pipeline.sequences.rules import Rules, clean

DEMO = Path(__file__).parents[2] / "data" / "demo100.fasta"
OVERRIDE = "data.fasta=PATH"


def written(folder: Path, content: bytes, name: str = "a.fasta") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def read(path: Path) -> list[Record]:
    return list(read_fasta(path))


def refused(path: Path, *expected: str) -> None:
    """Hold that reading fails, in one line that names the file and holds each expected part."""
    with pytest.raises(SequenceError) as caught:
        read(path)
    message = str(caught.value)
    for part in (str(path), *expected):
        assert part in message
    assert caught.value.remedy
    assert len(message.splitlines()) == 1


@contextmanager
def without_root() -> Iterator[None]:
    """Give up root's right to read everything, for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_the_demo_is_100_proteins_of_five_places():
    records = read(DEMO)
    kept, counts = clean(records, Rules())
    assert kept == records
    assert (counts.records, counts.kept, counts.unique, counts.residues) == (100, 100, 100, 22_433)
    assert sorted(Counter(record.description for record in records).values()) == [20] * 5
    assert all(record.description.startswith("loc=") for record in records)
    lengths = [len(record.sequence) for record in records]
    assert (min(lengths), max(lengths)) == (61, 398)


WHOLE = b">P1 loc=Nucleus  two\nMKV\nAAL\n>P2\nmkv*\n"
RECORDS = [Record("P1", "MKVAAL", "loc=Nucleus  two"), Record("P2", "mkv*")]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(WHOLE, id="plain"),
        pytest.param(WHOLE.rstrip(b"\n"), id="no last line end"),
        pytest.param(WHOLE.replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param(WHOLE.replace(b"\n", b"\r"), id="CR"),
        pytest.param(b"\xef\xbb\xbf" + WHOLE, id="BOM"),
        pytest.param(b"\n \n" + WHOLE.replace(b"\n", b"\n\n \t\n"), id="blank lines"),
        pytest.param(WHOLE.replace(b"MKV", b" M\tK V "), id="white space in a sequence"),
        pytest.param(b"; from 1985\n" + WHOLE.replace(b"AAL", b";note\nAAL"), id="comments"),
        pytest.param(WHOLE.replace(b">P1", b"> P1"), id="space before an id"),
    ],
)
@pytest.mark.parametrize("name", ["a.fasta", "a.fasta.gz"])
@pytest.mark.parametrize("gzipped", [False, True])
def test_layout_makes_no_difference(tmp_path: Path, content: bytes, name: str, gzipped: bool):
    assert read(written(tmp_path, gzip.compress(content) if gzipped else content, name)) == RECORDS


def test_gzip_in_several_members_is_read_whole(tmp_path: Path):
    half = WHOLE.index(b">P2")
    assert read(written(tmp_path, gzip.compress(WHOLE[:half]) + gzip.compress(WHOLE[half:]))) == RECORDS


def test_reading_streams(tmp_path: Path):
    records = read_fasta(written(tmp_path, WHOLE + b">\n"))
    assert next(records) == RECORDS[0]
    assert next(records) == RECORDS[1]
    with pytest.raises(SequenceError, match="line 6"):
        next(records)


def test_headers_that_are_not_ascii_are_kept(tmp_path: Path):
    assert read(written(tmp_path, ">É1 β-lactamase\nMKV\n".encode())) == [Record("É1", "MKV", "β-lactamase")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"", ("is empty", OVERRIDE), id="empty"),
        pytest.param(gzip.compress(b""), ("has no records", "'>ID'"), id="empty gzip"),
        pytest.param(b"\n; nothing\n \n", ("has no records", "'>ID'"), id="no records"),
        pytest.param(b"\xef\xbb\xbf", ("has no records", "'>ID'"), id="only a BOM"),
        pytest.param(b"\nMKV\n>P1\nMKV\n", ("line 2", "before the first header", OVERRIDE), id="text before"),
        pytest.param(b">P1\nMKV\n> \nMKV\n", ("line 3", "without an id", "after '>'"), id="no id"),
        pytest.param(b">P1\n\n>P2\nMKV\n", ("line 1", "'P1' has no sequence", "remove its header"), id="no sequence"),
        pytest.param(b">P2\nMKV\n>P1\n \t\n", ("line 3", "'P1' has no sequence"), id="no sequence at the end"),
        pytest.param(b">P1\nMKV>P2\nMKV\n", ("line 1", "'P1' has '>'", "line of its own"), id="joined"),
        pytest.param(b">P1\nMK\0V\n", ("line 2", "binary data", OVERRIDE), id="NUL"),
        pytest.param(b">P1\nMKV\n>P\xff\nMKV\n", ("line 3", "binary data", OVERRIDE), id="no UTF-8"),
        pytest.param(b">P1\nMK\xed\xa0\x80V\n", ("line 2", "binary data"), id="a surrogate"),
        pytest.param(">P1\nMKV\n".encode("utf-16"), ("line 1", "binary data", "UTF-8"), id="UTF-16"),
        pytest.param(gzip.compress(gzip.compress(WHOLE)), ("line 1", "binary data"), id="gzip of gzip"),
        pytest.param(gzip.compress(WHOLE)[:-5], ("cut short", "download it again"), id="gzip without its end"),
        pytest.param(gzip.compress(WHOLE)[:2], ("cut short after line 0", "again"), id="gzip's first bytes"),
        pytest.param(gzip.compress(WHOLE)[:-8] + bytes(8), ("corrupt", "CRC", "again"), id="gzip's checksum"),
        pytest.param(gzip.compress(WHOLE)[:10] + b"\xff" * 40, ("corrupt", "download it again"), id="gzip's data"),
        pytest.param(gzip.compress(WHOLE) + b"more", ("corrupt", "download it again"), id="gzip and more"),
    ],
)
def test_what_is_no_fasta_is_refused(tmp_path: Path, content: bytes, expected: tuple[str, ...]):
    refused(written(tmp_path, content), *expected)


def test_a_missing_file_is_named(tmp_path: Path):
    refused(tmp_path / "none.fasta", "there is no file", OVERRIDE)


def test_a_directory_is_refused(tmp_path: Path):
    refused(tmp_path, "is a directory", OVERRIDE)


def test_a_path_below_a_file_is_refused(tmp_path: Path):
    refused(written(tmp_path, WHOLE) / "b.fasta", "can't be read", OVERRIDE)


def test_a_file_without_permission_is_refused(tmp_path: Path):
    path = written(tmp_path, WHOLE)
    path.chmod(0)
    with without_root():
        refused(path, "no permission", "chmod", OVERRIDE)


def test_a_long_id_is_cut_in_messages(tmp_path: Path):
    path = written(tmp_path, b">" + b"P" * 5000 + b"\n")
    with pytest.raises(SequenceError) as caught:
        read(path)
    assert shown("P" * 5000) in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 200


@given(st.binary(max_size=300), st.sampled_from(["", ">", "gzip"]))
@example(b"\xef", "")
@example(b"\xef\xbb", ">")
def test_random_bytes_raise_sequence_errors_only(content: bytes, kind: str):
    if kind == ">":
        content = b">a\n" + content
    elif kind == "gzip":
        content = gzip.compress(b">a\n" + content)[: len(content) + 10]
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), content)
        try:
            records = read(path)
        except SequenceError:
            refused(path)
        else:
            assert records
            assert all(record.id and record.sequence for record in records)


def is_word(text: str) -> bool:
    return text.split() == [text]


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(is_word)
lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0")).map(str.strip)
sequences = st.text("ACDEFGHIKLMNPQRSTVWYXBZUOJacdj*-.", min_size=1)


@settings(max_examples=50)
@given(st.lists(st.builds(Record, words, sequences, lines), min_size=1))
def test_what_is_written_is_read_back(records: list[Record]):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.fasta"
        write_fasta(path, iter(records))
        assert read(path) == records
        assert len(path.read_bytes().split(b"\n")) == 2 * len(records) + 1
        first = path.read_bytes()
        write_fasta(path, read_fasta(path))  # onto the file that is being read
        assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (Record("", "MKV"), "''"),
        (Record("P 1", "MKV"), "'P 1'"),
        (Record("P1\n", "MKV"), r"'P1\\n'"),
        (Record("P\0", "MKV"), r"'P\\x00'"),
        (Record("P\ud800", "MKV"), r"'P\\ud800'"),
        (Record("P1", "MKV", "two\nlines"), "'P1'"),
        (Record("P1", "MKV", " loc"), "'P1'"),
        (Record("P1", "MKV", "\0"), "'P1'"),
        (Record("P1", ""), "'P1'"),
        (Record("P1", "MK V"), "'P1'"),
        (Record("P1", "MK\nV"), "'P1'"),
        (Record("P1", "MK>V"), "'P1'"),
        (Record("P1", "MKÉ"), "'P1'"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, record: Record, named: str):
    path = written(tmp_path, WHOLE)
    with pytest.raises(SequenceError, match=f"record {named} has .* FASTA can't hold; (use an id|pass it)"):
        write_fasta(path, [RECORDS[0], record])
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [WHOLE]


def test_no_records_are_not_written(tmp_path: Path):
    path = tmp_path / "a.fasta"
    with pytest.raises(SequenceError, match=r"no records to write to .*a.fasta; give at least one"):
        write_fasta(path, [])
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path):
    path = written(tmp_path, b"old")

    def chunks() -> Iterator[str]:
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_text(path, chunks())
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"old"]


def test_an_error_of_this_package_passes_through_a_write(tmp_path: Path):
    def chunks() -> Iterator[str]:
        yield "new"
        raise StorageError("no more", "wait")

    with pytest.raises(StorageError, match=r"^no more; wait$"):
        replace_text(tmp_path / "a.fasta", chunks())
    assert not list(tmp_path.iterdir())


def test_a_written_file_has_the_permissions_of_any_other(tmp_path: Path):
    path = tmp_path / "a.fasta"
    write_fasta(path, RECORDS)
    assert path.stat().st_mode == written(tmp_path, b"", "b").stat().st_mode


def test_writing_where_nothing_can_be_written_says_so(tmp_path: Path):
    path = tmp_path / "none" / "a.fasta"
    with pytest.raises(StorageError, match=r"none.a\.fasta can't be written: .*; check its folder"):
        write_fasta(path, RECORDS)
    with pytest.raises(StorageError, match=r"can't be written: .*; check its folder"):
        write_fasta(tmp_path, RECORDS)  # a folder stands there
