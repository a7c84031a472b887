"""One large file over HTTP, resumed where it stopped, and published only when it is whole.

While a transfer runs, its bytes lie in ``TARGET.part`` and what they belong to in ``TARGET.part.json``: the URL, the
server's validator (a strong ETag, or Last-Modified) and the length. The next attempt, or the next run, asks for the
rest with Range and If-Range, so that a server whose file has changed since sends it whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit

from proteus_pipeline.errors import ConfigError, IntegrityError, StorageError
from proteus_pipeline.stores.files import replace_atomic, sha256_file, storage_error, write_atomic

if TYPE_CHECKING:
    import requests

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there and, where the server says it, how many there will be."""

OFFLINE_REMEDY = (
    "check the network, or register a local file with `proteus model register NAME --version V --weights PATH`"
)
_RESUME = "run it again to resume: what arrived is kept"
_CHUNK = 1 << 17
_BACKOFF_S = 0.25
_BUSY = {408, 425, 429}
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class _InterruptedError(StorageError):
    """A failure that another attempt may get past."""


def download(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    progress: Progress | None = None,
    timeout_s: float = 30.0,
    attempts: int = 3,
) -> str:
    """Fetch a file and return its SHA-256, in hexadecimal.

    Parameters
    ----------
    url
        http or https. A user, a password or a query in it goes to the server, and into no message or file.
    target
        Where it goes. When it is there and has the digest asked for, nothing is requested; else it is replaced.
    sha256
        The whole file's, where it is known.
    progress
        Called after each chunk.
    timeout_s
        How long to wait for a connection, and for each next piece of the answer.
    attempts
        How many requests may be made before a cut or failing transfer is an error.

    Raises
    ------
    ConfigError
        When `url` is no http or https URL.
    IntegrityError
        When the bytes are not what `sha256`, or the server's own length, says; they are removed, and `target` stays as it was.
    StorageError
        When the server can't be reached or refuses, the transfer keeps breaking off, or the disk can't take it.

    """
    public = public_url(url)
    if sha256 is not None and target.is_file() and sha256_file(target) == sha256.lower():
        return sha256.lower()
    part = target.with_name(target.name + ".part")
    with _locked(part) as file:
        partial = _Partial.load(part, file, public)
        _Transfer(url, public, partial, progress, timeout_s, checked=sha256 is not None).run(attempts)
        digest = partial.hasher.hexdigest()
        if sha256 is not None and digest != sha256.lower():
            partial.reset()
            raise IntegrityError(
                f"{public} has SHA-256 {digest}, expected {sha256.lower()}",
                "run it again; if it says the same, the file at that address is another one",
            )
        replace_atomic(part, target)
        partial.sidecar.unlink(missing_ok=True)
    return digest


def public_url(url: str) -> str:
    """Return a URL as it may be shown: without user, password, query and fragment.

    >>> public_url("https://me:secret@example.org/a.pt?token=1")
    'https://example.org/a.pt'

    Raises
    ------
    ConfigError
        When it is no http or https URL.

    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        shown = re.sub(r"//[^/]*@", "//", url.partition("?")[0])
        raise ConfigError(f"{shown!r} is no URL to download from", "write http://HOST/PATH or https://HOST/PATH")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """Open the partial file for this process alone; an empty one is removed at the end."""
    busy = StorageError(f"another process is downloading {part.stem}", "wait until it has finished, then run it again")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)
    except OSError as error:
        raise storage_error("write", part, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:
            pass  # A file system without locks: as safe as it can be there.
        # Between open and lock another process may have published the file that this one opened.
        if not part.exists() or not os.path.samestat(part.stat(), os.fstat(file.fileno())):
            raise busy
        try:
            yield file
        finally:
            with suppress(OSError):
                if part.exists() and part.stat().st_size == 0:
                    part.unlink()
                    part.with_name(part.name + ".json").unlink(missing_ok=True)


@dataclass
class _Partial:
    """The bytes that have arrived, and what is known of the file that they begin."""

    part: Path
    file: BinaryIO
    url: str
    have: int = 0
    total: int | None = None
    validator: str | None = None

    def __post_init__(self) -> None:
        self.hasher = hashlib.sha256()
        self.sidecar = self.part.with_name(self.part.name + ".json")

    @classmethod
    def load(cls, part: Path, file: BinaryIO, url: str) -> _Partial:
        partial = cls(part, file, url)
        try:
            known = json.loads(partial.sidecar.read_bytes())
            total, validator = known["total"], known["validator"]
            fits = known["url"] == url and isinstance(validator, str) and isinstance(total, int | None)
        except (OSError, ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            partial.reset()
            return partial
        partial.total, partial.validator = total, validator
        try:
            while chunk := file.read(1 << 20):
                partial.hasher.update(chunk)
                partial.have += len(chunk)
        except OSError as error:
            raise storage_error("read", part, error) from error
        if total is not None and partial.have > total:
            partial.reset()
        return partial

    @property
    def complete(self) -> bool:
        return self.have > 0 and self.have == self.total

    def reset(self) -> None:
        """Forget everything; the sidecar first, so that it never describes bytes that it does not belong to."""
        try:
            self.sidecar.unlink(missing_ok=True)
            if os.fstat(self.file.fileno()).st_size:
                self.file.truncate(0)
            self.file.seek(0)
        except OSError as error:
            raise storage_error("write", self.part, error) from error
        self.have, self.total, self.validator, self.hasher = 0, None, None, hashlib.sha256()

    def begin(self, total: int | None, validator: str | None) -> None:
        """Start over with a file of which the server says this."""
        self.reset()
        self.total, self.validator = total, validator
        if validator is not None:
            known = {"url": self.url, "validator": validator, "total": total}
            write_atomic(self.sidecar, json.dumps(known).encode())

    def append(self, chunk: bytes) -> None:
        left = memoryview(chunk)
        try:
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            raise storage_error("write", self.part, error) from error
        self.hasher.update(chunk)
        self.have += len(chunk)


@dataclass
class _Transfer:
    """One file's requests."""

    url: str
    public: str
    partial: _Partial
    progress: Progress | None
    timeout_s: float
    checked: bool
    connected: bool = False

    def run(self, attempts: int) -> None:
        """Make requests until all is here; between two of them, wait twice as long each time."""
        for number in range(1, attempts + 1):
            try:
                self.attempt()
                break
            except _InterruptedError as error:
                if number >= attempts:
                    raise StorageError(error.what, error.remedy) from error
            time.sleep(_BACKOFF_S * 2**number)

    def attempt(self) -> None:
        """Make one request for what is missing, and append what it brings.

        Raises
        ------
        _InterruptedError
            When another attempt may succeed.

        """
        partial = self.partial
        if partial.complete:
            return
        if partial.validator is None:
            partial.reset()
        # Bytes and lengths must be the file's own, not those of a compressed transfer.
        headers = {"Accept-Encoding": "identity"}
        if partial.have and partial.validator is not None:
            headers |= {"Range": f"bytes={partial.have}-", "If-Range": partial.validator}
        with self._get(headers) as response:
            self._check_status(response)
            if response.status_code == 206:
                self._continue(response)
            else:
                partial.begin(_length(response.headers), _validator(response.headers))
            self._check_length(response)
            for chunk in self._chunks(response):
                partial.append(chunk)
                if self.progress is not None:
                    self.progress(partial.have, partial.total)
        if partial.total is not None and partial.have < partial.total:
            raise self._cut()
        if partial.total is not None and partial.have > partial.total:
            found, expected = partial.have, partial.total
            partial.reset()
            raise IntegrityError(f"{self.public} has {found:,} bytes, expected {expected:,}", "check the address")

    def _get(self, headers: Mapping[str, str]) -> requests.Response:
        import requests

        try:
            response = requests.get(self.url, headers=headers, stream=True, timeout=self.timeout_s)
        except requests.RequestException as error:
            what = f"cannot reach {urlsplit(self.public).netloc} for {self.public}: {self._reason(error)}"
            unreachable = _never_connected(error) and not self.connected
            passing = isinstance(error, requests.ConnectionError | requests.Timeout)
            if unreachable or not passing or isinstance(error, requests.exceptions.SSLError):
                raise StorageError(what, OFFLINE_REMEDY) from error
            raise _InterruptedError(what, OFFLINE_REMEDY) from error
        self.connected = True
        return response

    def _check_status(self, response: requests.Response) -> None:
        status = response.status_code
        asked = "Range" in response.request.headers
        if status == 200 or (status == 206 and asked):
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                raise StorageError(f"{self.public} came compressed ({encoding}), unasked", OFFLINE_REMEDY)
            return
        what = f"{self.public} answered {status} {response.reason}".rstrip()
        if status == 416 and asked:
            self.partial.reset()
            raise _InterruptedError(what, "run it again")
        if status >= 500 or status in _BUSY:
            raise _InterruptedError(what, "run it again later")
        raise StorageError(
            what,
            "check the address, or register a local file with `proteus model register NAME --version V --weights PATH`",
        )

    def _continue(self, response: requests.Response) -> None:
        """Check that a partial answer goes on where the bytes here end, in the same file."""
        partial = self.partial
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        start, total = found.groups() if found else ("", "")
        fits = (
            start == str(partial.have)
            and (partial.total is None or total in {"*", str(partial.total)})
            and _validator(response.headers) in {None, partial.validator}
        )
        if not fits:
            partial.reset()
            raise _InterruptedError(f"{self.public} answered with another part than was asked for", "run it again")
        if partial.total is None and total != "*":
            partial.total = int(total)

    def _check_length(self, response: requests.Response) -> None:
        chunked = response.headers.get("Transfer-Encoding", "").lower() == "chunked"
        if self.partial.total is None and not self.checked and not chunked:
            raise StorageError(f"{self.public} does not say how long it is, so a cut can't be seen", OFFLINE_REMEDY)

    def _chunks(self, response: requests.Response) -> Iterator[bytes]:
        import requests

        try:
            yield from response.iter_content(_CHUNK)
        except requests.RequestException as error:
            raise self._cut(self._reason(error)) from error

    def _cut(self, reason: str = "the server stopped sending") -> _InterruptedError:
        partial = self.partial
        whole = "an unknown number of bytes" if partial.total is None else f"{partial.total:,} bytes"
        remedy = "run it again" if partial.validator is None else _RESUME
        return _InterruptedError(f"{self.public} broke off after {partial.have:,} of {whole}: {reason}", remedy)

    def _reason(self, error: BaseException) -> str:
        """Return the operating system's reason: requests' own text holds the URL with its secrets."""
        import requests

        if isinstance(error, requests.Timeout):
            return f"no answer within {self.timeout_s:g} s"
        for cause in _causes(error):
            if isinstance(cause, TimeoutError):
                return f"no answer within {self.timeout_s:g} s"
            if isinstance(cause, OSError) and cause.strerror:
                return cause.strerror[:1].lower() + cause.strerror[1:]
        closed = isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError)
        return "the connection was closed" if closed else type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _never_connected(error: BaseException) -> bool:
    import requests
    from urllib3.exceptions import NewConnectionError

    if isinstance(error, requests.ConnectTimeout | requests.exceptions.ProxyError):
        return True
    return any(isinstance(cause, NewConnectionError) for cause in _causes(error))


def _length(headers: Mapping[str, str]) -> int | None:
    text = headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() else None


def _validator(headers: Mapping[str, str]) -> str | None:
    # If-Range takes no weak ETag: it may stay the same when bytes change.
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified")
