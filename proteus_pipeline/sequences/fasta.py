"""FASTA files: read record by record, plain or gzip; written whole or not at all.

What is read is what the file says: lower case, gaps and stops are kept for `proteus_pipeline.sequences.rules` to judge.
Only the layout is undone here: line ends of any system, a byte order mark, blank lines, spaces and tabs within a
sequence, and the ``;`` comment lines of Pearson's original format.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import re
import secrets
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from proteus_pipeline.errors import SequenceError, StorageError

_GZIP = b"\x1f\x8b"
_UNDECODABLE = re.compile("[\ud800-\udfff]")  # what errors="surrogateescape" leaves of bytes that are no UTF-8
_NO_LINE = re.compile("[\r\n\0\ud800-\udfff]")
_WRITABLE = re.compile(r"[A-Za-z*.-]+")


@dataclass(frozen=True)
class Record:
    """One protein of a FASTA file.

    Attributes
    ----------
    id
        The header's first word.
    sequence
        The letters, with no white space.
    description
        The rest of the header line, stripped.

    """

    id: str
    sequence: str
    description: str = ""


def read_fasta(path: Path, override: str = "data.fasta") -> Iterator[Record]:
    """Yield a file's records in order, holding one at a time.

    Gzip is known by its first bytes, not by the file's name.

    Parameters
    ----------
    path
        The file.
    override
        As for `text_lines`.

    Raises
    ------
    SequenceError
        While iterating: for a file that is missing, unreadable, empty, binary, cut short or corrupt; for text before
        the first header, a header without an id, a record without a sequence.

    """
    header, start = "", 0
    body: list[str] = []
    for number, line in enumerate(text_lines(path, override), 1):
        if line.startswith(">"):
            if start:
                yield _record(path, start, header, body)
            header, start, body = line[1:], number, []
        elif line.startswith(";"):
            continue
        elif start:
            body.append(line)
        elif line.strip():
            raise SequenceError(
                f"{path}, line {number}: text before the first header",
                f"start each record with a line '>ID', or name a FASTA file{_by(override)}",
            )
    if not start:
        raise SequenceError(f"{path} has no records", "start each record with a line '>ID'")
    yield _record(path, start, header, body)


def _record(path: Path, start: int, header: str, body: list[str]) -> Record:
    words = header.split(maxsplit=1)
    if not words:
        raise SequenceError(f"{path}, line {start}: a header without an id", "write an id directly after '>'")
    name = words[0]
    sequence = "".join(body).replace("\n", "").replace(" ", "").replace("\t", "")
    if not sequence:
        raise SequenceError(
            f"{path}, line {start}: record {shown(name)} has no sequence", "add its sequence or remove its header"
        )
    if ">" in sequence:  # files joined where the first had no last line end: the second record would be lost
        raise SequenceError(
            f"{path}, line {start}: record {shown(name)} has '>' within its sequence",
            "put each header at the start of a line of its own",
        )
    return Record(name, sequence, words[1].strip() if len(words) > 1 else "")


def write_fasta(path: Path, records: Iterable[Record]) -> None:
    """Write records in the order given, one line a sequence; `read_fasta` gives the same records back.

    Raises
    ------
    SequenceError
        For no records, or one that would not be read back as it is.
    StorageError
        When the file can't be written. What was at `path` before is then still there.

    """
    replace_text(path, _fasta_lines(path, records))


def _fasta_lines(path: Path, records: Iterable[Record]) -> Iterator[str]:
    record = None
    for record in records:
        if record.id.split() != [record.id] or not (is_one_line(record.id) and is_one_line(record.description)):
            raise SequenceError(
                f"record {shown(record.id)} has a header that FASTA can't hold",
                "use an id without white space and a description of one line, stripped",
            )
        if not _WRITABLE.fullmatch(record.sequence):
            raise SequenceError(
                f"record {shown(record.id)} has a sequence that FASTA can't hold", "pass it through rules.clean first"
            )
        header = f"{record.id} {record.description}" if record.description else record.id
        yield f">{header}\n{record.sequence}\n"
    if record is None:
        raise SequenceError(f"there are no records to write to {path}", "give at least one")


def is_one_line(text: str) -> bool:
    """Say whether text can be written on one line of a file and read back from it, stripped."""
    return text == text.strip() and not _NO_LINE.search(text)


def shown(name: str) -> str:
    """Return an id as messages quote it: on one line, cut to 60 characters."""
    return repr(name if len(name) <= 60 else name[:57] + "...")


def text_lines(path: Path, override: str) -> Iterator[str]:
    r"""Yield the lines of a UTF-8 text file, plain or gzip, with ``\n`` for whatever line ends it has, and no BOM.

    Parameters
    ----------
    path
        The file.
    override
        The config key that names it, for messages: ``data.fasta``; empty for a file that was given by itself.

    Raises
    ------
    SequenceError
        While iterating: for a file that can't be opened or read, is empty, or holds anything but text.

    """
    number = 0
    try:
        with path.open("rb") as stream:
            start = stream.peek(2)[:2]
            if not start:
                raise SequenceError(f"{path} is empty", f"name one with records{_by(override)}")
            for number, line in enumerate(_decoded(stream, gzipped=start == _GZIP), 1):
                if "\0" in line or (not line.isascii() and _UNDECODABLE.search(line)):
                    raise SequenceError(
                        f"{path}, line {number}: binary data, not UTF-8 text",
                        f"name a text file, plain or gzip,{_by(override)}",
                    )
                yield line.removeprefix("\ufeff") if number == 1 else line
    except EOFError as error:
        raise SequenceError(f"{path} is cut short after line {number} (gzip)", "copy or download it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise SequenceError(
            f"{path} is corrupt after line {number} (gzip: {error})", "copy or download it again"
        ) from error
    except OSError as error:
        raise _unreadable(path, override, error) from error


def _by(override: str) -> str:
    return f" with {override}=PATH" if override else ""


def _decoded(stream: BinaryIO, *, gzipped: bool) -> io.TextIOWrapper:
    source = gzip.GzipFile(fileobj=stream, mode="rb") if gzipped else stream
    # Bytes that are no UTF-8 pass here, so that the caller can say on which line they are.
    return io.TextIOWrapper(source, encoding="utf-8", errors="surrogateescape")


def _unreadable(path: Path, override: str, error: OSError) -> SequenceError:
    if isinstance(error, FileNotFoundError):
        return SequenceError(f"there is no file {path}", f"name one that exists{_by(override)}")
    if isinstance(error, IsADirectoryError):
        return SequenceError(f"{path} is a directory", f"name a file{_by(override)}")
    if isinstance(error, PermissionError):
        return SequenceError(
            f"no permission to read {path}", f"allow it with chmod, or name another file{_by(override)}"
        )
    return SequenceError(f"{path} can't be read: {error.strerror or error}", f"name another file{_by(override)}")


def replace_text(path: Path, chunks: Iterable[str]) -> None:
    """Write text to `path` so that a reader, or a crash, finds the old file or the new one and nothing between.

    Raises
    ------
    StorageError
        When it can't be written. This package's errors raised by `chunks` pass through, and `path` stays as it was.

    """
    # As stores/files.py does it, which is above this room: the same names, the same order.
    part = path.with_name(f".tmp-{secrets.token_hex(8)}{path.suffix}")
    try:
        try:
            with part.open("x", encoding="utf-8", newline="\n") as stream:
                stream.writelines(chunks)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(path)
            _flush_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)
    except StorageError:  # an OSError too
        raise
    except OSError as error:
        raise StorageError(
            f"{path} can't be written: {error.strerror or error}", "check its folder, its permissions, and free space"
        ) from error


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems can't; the file is in its place by then.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)
