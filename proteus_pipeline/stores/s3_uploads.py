"""Files on their way into a bucket: whole there, or not at all, and compared with what was sent."""

from __future__ import annotations

import hashlib
import secrets
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import IntegrityError, StorageError
from proteus_pipeline.stores import s3_access
from proteus_pipeline.stores.counts import count
from proteus_pipeline.stores.files import TEMPORARY_PREFIX, storage_error
from proteus_pipeline.stores.ranges import PART_BYTES

if TYPE_CHECKING:
    from proteus_pipeline.stores.s3 import S3Store
    from proteus_pipeline.stores.s3_access import Bucket

_SENT_AT_ONCE = 8
_MOST_PARTS = 10_000
# Below this a file is one request, which can say that it must not be there yet.
_ONE_REQUEST = 16 << 20
_ABORT_SECONDS = 3
_SENT = "proteus_cache_sent_bytes_total"


class Upload:
    """A file that is written here, in the system's temporary folder (``TMPDIR``), or lies here, and is sent when it is whole."""

    def __init__(self, store: S3Store, where: Bucket, name: str) -> None:
        self._store, self._where, self._name = store, where, name
        self.path = Path(tempfile.gettempdir(), f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{Path(name).suffix}")
        self._taken = False

    def take(self, path: Path) -> bool:
        self.path, self._taken = path, True
        return True

    def publish(self) -> None:
        try:
            self._send()
        except StorageError:
            raise  # it says already what it is about
        except OSError as error:
            raise storage_error("send", f"{self._store.location}/{self._name}", error) from error
        finally:
            self.discard()

    def discard(self) -> None:
        if not self._taken:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def _send(self) -> None:
        store, name, size = self._store, self._name, self._size()
        if size <= _ONE_REQUEST:
            put(store, name, self.path.read_bytes())
            return
        part = max(PART_BYTES, -(-size // _MOST_PARTS))
        if _is_there(store, name):
            raise StorageError(f"{store.location}/{name} is there already", "look at who wrote it there")

        def in_parts(there: Any) -> Any:
            return there.put(name, self.path, use_multipart=True, chunk_size=part, max_concurrency=_SENT_AT_ONCE)

        try:
            with ThreadPoolExecutor(1, "md5") as pool:  # reading it takes as long as a fast line does
                summing = pool.submit(_multipart_etag, self.path, part)
                result = store.ask("write", name, in_parts, writing=True)
                expected = summing.result()
        except BaseException:
            # Nobody sees the parts of an upload that failed, but they are paid for.
            with suppress(Exception):
                abort(self._where, name)
            raise
        if _etag(result) != expected and not self._same(size):
            raise _arrived_otherwise(store, name)
        count(_SENT, size, cache="shared")

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError as error:
            raise StorageError(f"cannot write {self._store.location}/{self._name}: nothing was written", "") from error

    def _same(self, size: int) -> bool:
        store, name = self._store, self._name
        with self.path.open("rb") as file:
            for start in range(0, size, _ONE_REQUEST):
                sent = file.read(_ONE_REQUEST)
                if store.read(name, start, len(sent)) != sent:
                    return False
        return store.size(name) == size


def put(store: S3Store, name: str, data: bytes, *, mode: str = "", arbitrated: bool = False) -> bool:
    """Write a file by one request; repeated where its answer was lost, since what is there then is seen to be ours.

    Parameters
    ----------
    store, name, data
        What to write where.
    mode
        ``create`` or ``overwrite``; where not given, ``create`` on servers that have it.
    arbitrated
        Return False where another one was first; else that is an error.

    Raises
    ------
    StorageError
        When it can't be written, or is there already.

    """
    from obstore.exceptions import AlreadyExistsError, BaseError

    how: Any = mode or ("overwrite" if store.honours().create_only == "unknown" else "create")
    began, attempt = time.monotonic(), 0
    while True:
        try:
            result = store.ask("write", name, lambda there: there.put(name, data, mode=how), writing=True)
        except AlreadyExistsError as error:
            # Of a first try that is another's, whatever its bytes.
            if (attempt or not arbitrated) and store.read(name) == data:
                return True
            if arbitrated:
                return False
            raise StorageError(f"{store.location}/{name} is there already", "look at who wrote it there") from error
        except StorageError as error:
            # obstore repeats no request of which it can't know whether it was carried out.
            late = time.monotonic() - began > store.patience.retrying or attempt >= store.patience.retries
            if late or not isinstance(error.__cause__, BaseError) or not s3_access.transient(error.__cause__):
                raise
            s3_access.pause(attempt)
            attempt += 1
            continue
        if _etag(result) != hashlib.md5(data, usedforsecurity=False).hexdigest() and store.read(name) != data:
            raise _arrived_otherwise(store, name)
        count(_SENT, len(data), cache="shared")
        return True


def abort(where: Bucket, name: str) -> None:
    """Give up all unfinished uploads of a name, within some seconds."""
    from botocore.config import Config

    session, _, endpoint = s3_access.from_chain(where)
    few = Config(connect_timeout=_ABORT_SECONDS, read_timeout=_ABORT_SECONDS, retries={"total_max_attempts": 1})
    region = where.region or session.get_config_variable("region") or s3_access.REGION
    client = session.create_client("s3", endpoint_url=endpoint, region_name=region, config=few)
    key = f"{where.prefix}/{name}".lstrip("/")
    for upload in client.list_multipart_uploads(Bucket=where.bucket, Prefix=key).get("Uploads", ()):
        client.abort_multipart_upload(Bucket=where.bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def _is_there(store: S3Store, name: str) -> bool:
    try:
        store.size(name)
    except FileNotFoundError:
        return False
    return True


def _arrived_otherwise(store: S3Store, name: str) -> IntegrityError:
    with suppress(StorageError):
        store.remove(name)
    return IntegrityError(f"{store.location}/{name} did not arrive as it was sent", "try again; check the server")


def _etag(result: Any) -> str:
    return str(result["e_tag"] or "").strip('"')


def _multipart_etag(path: Path, part: int) -> str:
    """Return the ETag that S3 gives a file that comes in parts: the MD5 of theirs."""
    sums = []
    with path.open("rb") as file:
        while data := file.read(part):
            sums.append(hashlib.md5(data, usedforsecurity=False).digest())
    return f"{hashlib.md5(b''.join(sums), usedforsecurity=False).hexdigest()}-{len(sums)}"
