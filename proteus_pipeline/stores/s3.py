"""A bucket's prefix as a place for immutable files, on AWS S3 or a server that speaks its protocol."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from proteus_pipeline.errors import StorageError
from proteus_pipeline.stores import s3_access, s3_uploads
from proteus_pipeline.stores.counts import count
from proteus_pipeline.stores.files import TEMPORARY_PREFIX, storage_error
from proteus_pipeline.stores.memory import Memory
from proteus_pipeline.stores.ranges import PART_BYTES, Range, cut, joined, parts_of, spans_of
from proteus_pipeline.stores.s3_access import PATIENT, Bucket, Patience, parse_url
from proteus_pipeline.stores.store import Unfinished

if TYPE_CHECKING:
    from obstore.store import S3Store as Client

T = TypeVar("T")
_log = logging.getLogger(__name__)
_READ_AT_ONCE = 32
# Of a file on its way into a folder, so much is in memory.
_FETCHED_AT_ONCE = 16 * PART_BYTES
# No object is larger; a damaged index may ask for more.
_LARGEST = 5 << 40
# What is larger is read into memory that is used again: of as many parts as are read at once.
_STREAMED, _CHUNK = 1 << 20, 256 << 10
_PARTS = Memory(_READ_AT_ONCE * PART_BYTES)


@dataclass(frozen=True)
class Honours:
    """What a server was seen to do.

    Attributes
    ----------
    create_only
        ``refuses`` a second PUT that asks for nothing to be there, as it must; ``overwrites`` silently; or ``unknown``: it
        has no such PUT.
    removes
        Whether this user may remove objects.

    """

    create_only: str
    removes: bool


_probed: dict[tuple[str, str], Honours] = {}
_probing = threading.Lock()


class S3Store:
    """A prefix of a bucket.

    Files are published with ``If-None-Match: *``, but for those that need several requests: their names are unique, and it
    is asked before whether one is there. What arrives is compared with what was sent, by the MD5 that S3 returns as the
    ETag, or where an encrypted bucket returns another, by reading it back.

    Parameters
    ----------
    url
        ``s3://bucket/prefix``.
    endpoint, region, profile
        Where not given, as AWS's own tools find them.
    patience
        For how long the server is asked: every operation ends.

    Raises
    ------
    ConfigError
        For what is no such URL. Nothing is asked of a server yet.

    """

    def __init__(
        self,
        url: str,
        *,
        endpoint: str | None = None,
        region: str | None = None,
        profile: str | None = None,
        patience: Patience = PATIENT,
    ) -> None:
        parsed = parse_url(url)
        self._where = Bucket(parsed.bucket, parsed.prefix, endpoint or None, region or None, profile or None)
        self.location = self._where.url
        self.patience = patience
        self._clients: dict[bool, tuple[Client, str]] = {}
        self._opening = threading.Lock()
        self._process = os.getpid()
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._inside = threading.local()

    def __repr__(self) -> str:
        return f"S3Store({self.location!r})"

    def client(self, *, writing: bool = False) -> tuple[Client, str]:
        with self._opening:
            if self._clients and s3_access.forked_since(self._process):
                raise StorageError(
                    f"{self.location} was opened by the process that this one was forked from",
                    "start processes by spawn, or open it after the fork",
                )
            if writing not in self._clients:
                self._process = os.getpid()
                self._clients[writing] = s3_access.client(self._where, self.patience, writing=writing)
            return self._clients[writing]

    def ask(self, action: str, name: str, request: Callable[[Client], T], *, writing: bool = False) -> T:
        """Return what a request to the server gives, its errors as `StorageError` or `FileNotFoundError`."""
        from botocore.exceptions import BotoCoreError
        from obstore.exceptions import AlreadyExistsError, BaseError

        there, endpoint = self.client(writing=writing)
        try:
            return request(there)
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise s3_access.failure(action, f"{self.location}/{name}", endpoint, error, self.patience) from error
            raise FileNotFoundError(f"{self.location}/{name}") from None
        except AlreadyExistsError:
            raise
        except (BaseError, BotoCoreError, ValueError) as error:
            raise s3_access.failure(action, f"{self.location}/{name}", endpoint, error, self.patience) from error

    def names(self, folder: str) -> set[str]:
        return set(self.sizes(folder))

    def sizes(self, folder: str) -> dict[str, tuple[int, str]]:
        """Return the size and the ETag of each file in a folder."""

        def listed(there: Client) -> dict[str, tuple[int, str]]:
            found = {}
            for meta in there.list_with_delimiter(f"{folder}/")["objects"]:
                # Some servers list the folder itself too.
                file = meta["path"].removeprefix(f"{folder}/")
                if "/" not in file and file != folder and not file.startswith("."):
                    found[file] = (meta["size"], meta["e_tag"] or "")
            return found

        try:
            return self.ask("list", folder, listed)
        except FileNotFoundError:
            return {}

    def mark(self, folder: str) -> object:  # noqa: ARG002 - a Store's
        """Return None: nobody is told when a folder of a bucket changes, but by listing it."""
        return None

    def unchanged(self, folder: str, since: object) -> bool:  # noqa: ARG002 - a Store's
        return False

    def size(self, name: str) -> int:
        return int(self.ask("read", name, lambda there: there.head(name)["size"]))

    def read(self, name: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        return bytes(self._rest(name, offset) if nbytes is None else self.view(name, offset, nbytes))

    def view(self, name: str, offset: int, nbytes: int) -> memoryview:
        if nbytes <= 0 or offset >= _LARGEST:
            self.size(name)
            return memoryview(b"")
        nbytes = min(nbytes, _LARGEST - offset)
        if nbytes <= PART_BYTES:
            return self._part(name, offset, nbytes)
        return memoryview(self._rest(name, offset, nbytes))

    def _part(self, name: str, offset: int, nbytes: int) -> memoryview:
        def some(there: Client) -> memoryview:
            try:
                if nbytes < _STREAMED:
                    data = memoryview(there.get_range(name, start=offset, length=nbytes))[:nbytes]
                else:
                    data = _streamed(there, name, offset, nbytes)
            except Exception as error:
                if "status code: 416" in str(error):  # it ends before
                    return memoryview(b"")
                raise
            count("proteus_cache_fetched_bytes_total", len(data), cache="shared")
            return data

        return self.ask("read", name, some)

    def _rest(self, name: str, offset: int, nbytes: int | None = None) -> bytes:
        left = max(0, self.size(name) - offset)
        left = left if nbytes is None else min(left, nbytes)
        return b"".join(self.together([partial(self._part, name, *part) for part in parts_of(offset, offset + left)]))

    def together(self, requests: Sequence[Callable[[], T]]) -> list[T]:
        """Return what some requests give, many of them under way at a time."""
        # A thread of the pool that waited for others of it could wait for ever.
        if len(requests) < 2 or getattr(self._inside, "pool", False):
            return [request() for request in requests]
        pool = self._threads("s3")
        futures = [pool.submit(request) for request in requests]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _threads(self, name: str) -> ThreadPoolExecutor:
        """Return threads of one kind, each of which makes one request after the other."""
        with self._opening:
            if name not in self._pools:
                mark = partial(setattr, self._inside, "pool", True)
                self._pools[name] = ThreadPoolExecutor(_READ_AT_ONCE, name, mark)
            return self._pools[name]

    def read_many(self, name: str, offsets: list[int], buffers: list[memoryview]) -> list[bool]:
        found = self.ranges([(name, o, len(b)) for o, b in zip(offsets, buffers, strict=True)])
        for data, buffer in zip(found, buffers, strict=True):
            if len(data) == len(buffer):
                buffer[:] = data
        return [len(data) == len(buffer) for data, buffer in zip(found, buffers, strict=True)]

    def ranges(self, wanted: Sequence[Range]) -> list[memoryview]:
        """Return ranges of files, neighbours by one request, many requests at a time; fewer bytes where a file ends before.

        Parameters
        ----------
        wanted
            Of each range its file, offset and number of bytes.

        Raises
        ------
        FileNotFoundError
            When one of the files is not there.

        """
        found: list[list[memoryview]] = [[] for _ in wanted]
        spans = spans_of(wanted, _LARGEST)
        spanned = self.together([partial(self._span, name, start, end) for name, start, end, _ in spans])
        for (_, first, _, members), data in zip(spans, spanned, strict=True):
            for i in members:
                found[i].append(cut(data, first, *wanted[i][1:]))
        return [joined(pieces) for pieces in found]

    def begin_ranges(self, wanted: Sequence[Range]) -> dict[Range, list[tuple[Future[memoryview], int]]]:
        """Begin to read what `ranges` does; return of each range the spans to come that it lies in, and where they begin.

        The ranges are in the order in which they are asked for, and so roughly in that in which they come.
        """
        coming: dict[Range, list[tuple[Future[memoryview], int]]] = {}
        wanted = list(dict.fromkeys(wanted))  # a damaged index may have two entries in one place
        # Those first that are needed first, and not those that lie first.
        for name, start, end, members in sorted(spans_of(wanted, _LARGEST), key=lambda span: min(span[3])):
            # By threads of their own: what somebody waits for does not wait for what may be wanted later.
            future = self._threads("s3-ahead").submit(self._span, name, start, end)
            for i in members:
                one = wanted[i]
                coming[one] = sorted([*coming.pop(one, ()), (future, start)], key=lambda piece: piece[1])
        return coming

    def _span(self, name: str, start: int, end: int) -> memoryview:
        parts: list[memoryview] = []
        for at, nbytes in parts_of(start, end):
            parts.append(self._part(name, at, nbytes))
            if len(parts[-1]) < nbytes:
                break  # the file ends here, though a damaged index may ask for terabytes
        return joined(parts)

    def at_hand(self, name: str) -> AbstractContextManager[None]:  # noqa: ARG002 - a Store's
        return nullcontext()

    def map(self, name: str) -> memoryview:
        """Return a whole file's bytes, read: a bucket maps nothing."""
        return memoryview(self.read(name))

    def fetch(self, name: str, path: Path, size: int | None = None) -> None:
        """Copy a file to this machine, a part at a time; its size need not be asked for where it is known."""
        total = self.size(name) if size is None else size
        try:
            with path.open("xb") as file:
                for start in range(0, total, _FETCHED_AT_ONCE):
                    file.write(self.view(name, start, min(_FETCHED_AT_ONCE, total - start)))
        except OSError as error:
            if isinstance(error, (StorageError, FileNotFoundError)):
                raise
            raise storage_error("write", path, error) from error
        if path.stat().st_size != total:
            raise StorageError(f"{self.location}/{name} ended while it was read", "try again")

    def prefetch(self, name: str) -> None:
        """Do nothing: what is far away is asked for when it is needed."""

    def honours(self) -> Honours:
        """Return what the server does with a PUT that must not overwrite; seen once in a process.

        Raises
        ------
        StorageError
            When it can't be written to.

        """
        endpoint = self.client()[1]
        with _probing:
            known = _probed.get((endpoint, self.location))
            if known is None:
                known = _probed[endpoint, self.location] = self._probe()
            return known

    def _probe(self) -> Honours:
        from obstore.exceptions import AlreadyExistsError

        name = f"{TEMPORARY_PREFIX}probe-{secrets.token_hex(8)}"
        s3_uploads.put(self, name, b"1", mode="overwrite")
        create_only = "overwrites"
        try:
            self.ask("write", name, lambda there: there.put(name, b"2", mode="create"), writing=True)
        except AlreadyExistsError:
            create_only = "refuses"
        except StorageError as error:
            if "NotImplemented" not in str(error) and "answers 501" not in str(error):
                raise
            create_only = "unknown"
        if create_only == "overwrites":
            _log.warning(
                "%s overwrites objects without a word: a cache's names are nobody else's, but nothing can be arbitrated there",
                self.client()[1],
            )
        try:
            self.ask("remove", name, lambda there: there.delete(name), writing=True)
        except StorageError:
            return Honours(create_only, removes=False)
        return Honours(create_only, removes=True)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file where there is none of that name; False where there is one, whoever was first.

        Raises
        ------
        StorageError
            When the server can't be written to, or would overwrite: two who create the same would both be told that they did.

        """
        self._check(name)
        found = self.honours().create_only
        if found != "refuses":
            does = "overwrites objects without a word" if found == "overwrites" else "has no PUT that creates only"
            raise StorageError(
                f"cannot create {self.location}/{name}: {self.client()[1]} {does} (If-None-Match: *)",
                "use a server that honours it, as AWS, MinIO, Ceph and SeaweedFS do",
            )
        return s3_uploads.put(self, name, data, mode="create", arbitrated=True)

    def begin(self, name: str) -> Unfinished:
        self._check(name)
        return s3_uploads.Upload(self, self._where, name)

    def write(self, name: str, data: bytes) -> None:
        self._check(name)
        s3_uploads.put(self, name, data)

    def remove(self, name: str) -> None:
        self._check(name)
        with suppress(FileNotFoundError):
            self.ask("remove", name, lambda there: there.delete(name), writing=True)

    def _check(self, name: str) -> None:
        folder, _, file = name.partition("/")
        if (
            not folder
            or not file
            or folder.startswith(".")
            or "/" in file
            or file in {".", ".."}
            or not name.isprintable()
        ):
            raise StorageError(f"{name!r} is no name of a file in {self.location}", "look at who wrote it there")


def _streamed(there: Client, name: str, offset: int, nbytes: int) -> memoryview:
    """Return a part of a file, no longer than `PART_BYTES`."""
    part, got = _PARTS.lend(nbytes).data, 0
    for chunk in there.get(name, options={"range": (offset, offset + nbytes)}).stream(min_chunk_size=_CHUNK):
        some = memoryview(chunk)[: nbytes - got]  # no server should send more
        part[got : got + len(some)] = some
        got += len(some)
    return part[:got]
