"""How an S3 bucket is reached: its URL, credentials and endpoint as AWS's own tools find them, and what its errors mean."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from obstore.store import S3Config, S3Credential
    from obstore.store import S3Store as Client

REGION = "us-east-1"
_URL = re.compile(r"s3://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9])(?:/(?P<prefix>.*))?", re.DOTALL)
# What every S3 client, DVC's and this one, writes as the same key; so that no name needs an escape.
_PREFIX = re.compile(r"[^\x00-\x20\x7f%#?*\\\"<>^`{|}~\[\]]+")
_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,64})</Code>")
_STATUS = re.compile(r"status code: (\d{3}(?: [A-Z][A-Za-z]+)*)")
# What a server says of a key: where it lists, obstore keeps no more of its answer than this.
_REFUSALS = (
    "403", "401", "AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "InvalidToken",
    "AllAccessDisabled", "AccountProblem",
)  # fmt: skip
# How long obstore may use what botocore gave it before it asks again; botocore renews what is short-lived by itself.
_CREDENTIALS_LAST = timedelta(minutes=5)
_ENDPOINT = re.compile(r"https?://[A-Za-z0-9._~:@%\[\]-]+(/[A-Za-z0-9._~/-]*)?")
_FORM = "write s3://BUCKET/PREFIX"


@dataclass(frozen=True)
class Patience:
    """For how long a server is asked, in seconds: every operation ends, well or with an error, within `longest`.

    Attributes
    ----------
    connect
        For a connection.
    stall
        For the next bytes of an answer.
    request
        For one request in all; a part of an upload is one.
    retries, retrying
        How often a request is repeated, and until when after the first one began.

    """

    connect: float
    stall: float
    request: float
    retries: int
    retrying: float

    @property
    def longest(self) -> float:
        """What one operation may take where the server answers nothing, or a byte now and then."""
        return self.retrying + self.request


# Reading through must not hold a run that can compute: 10 s where a server hangs, 70 s at the very worst.
QUICK = Patience(connect=3.0, stall=10.0, request=60.0, retries=2, retrying=5.0)
# A push or a pull: 80 s where a server hangs and is read from, 180 s at the worst.
PATIENT = Patience(connect=5.0, stall=20.0, request=120.0, retries=5, retrying=60.0)


@dataclass(frozen=True)
class Bucket:
    """Where a store lies, and how it is reached; holds no secret.

    Attributes
    ----------
    bucket, prefix
        Of its URL.
    endpoint, region, profile
        None for what the AWS chain says.

    """

    bucket: str
    prefix: str
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None

    @property
    def url(self) -> str:
        """As `parse_url` takes it."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def parse_url(url: str) -> Bucket:
    """Return the bucket and prefix of ``s3://bucket/prefix``.

    Raises
    ------
    ConfigError
        When it is no such URL. What stands before an ``@`` is not repeated.

    >>> parse_url("s3://group/embeddings/")
    Bucket(bucket='group', prefix='embeddings', endpoint=None, region=None, profile=None)
    """
    if "@" in url:
        raise ConfigError("an S3 URL holds no credentials", f"{_FORM}, and the key in AWS_ACCESS_KEY_ID or a profile")
    found = _URL.fullmatch(url)
    if found is None:
        raise ConfigError(f"{url!r} is no S3 URL", _FORM)
    prefix = (found["prefix"] or "").strip("/")
    parts = prefix.split("/") if prefix else []
    if not all(_PREFIX.fullmatch(part) and part not in {".", ".."} for part in parts) or len(prefix) > 700:
        raise ConfigError(
            f"{url!r} has a prefix that can't be used", f"{_FORM}, of letters, digits, - _ . and single /"
        )
    return Bucket(found["bucket"], prefix)


def client(where: Bucket, patience: Patience, *, writing: bool) -> tuple[Client, str]:
    """Return obstore's client of a bucket, and what its endpoint is called in errors.

    Credentials come by botocore's chain: environment, profile files, web identity, container and instance metadata; so do
    the endpoint (``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``, a profile), the region and the CA bundle.

    Parameters
    ----------
    where
        The bucket.
    patience
        For how long it is asked.
    writing
        While a body is sent nothing is read: only the whole request is timed.

    Raises
    ------
    StorageError
        When there are no credentials, or the configuration can't be read.

    """
    from obstore.exceptions import BaseError
    from obstore.store import S3Store as Client

    session, provider, endpoint = from_chain(where)
    config: S3Config = {"region": where.region or session.get_config_variable("region") or REGION}
    if endpoint:
        if not _ENDPOINT.fullmatch(endpoint):  # obstore would panic
            raise StorageError(
                f"cannot reach {where.url}: its endpoint is no URL", "set AWS_ENDPOINT_URL=https://HOST:PORT"
            )
        config["endpoint"] = endpoint
    options: dict[str, Any] = {
        "allow_http": True,
        "connect_timeout": timedelta(seconds=patience.connect),
        "timeout": timedelta(seconds=patience.request),
    }
    if not writing:
        options["read_timeout"] = timedelta(seconds=patience.stall)
    backoff = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2}
    retry: Any = {
        "max_retries": patience.retries,
        "retry_timeout": timedelta(seconds=patience.retrying),
        "backoff": backoff,
    }
    try:
        if bundle := session.get_config_variable("ca_bundle"):
            with open(bundle, "rb") as file:  # noqa: PTH123 - as AWS_CA_BUNDLE says
                options["root_certificate"] = file.read()
        made: Any = Client(
            where.bucket,
            prefix=where.prefix or None,
            config=config,
            client_options=options,  # type: ignore[arg-type]
            retry_config=retry,
            credential_provider=provider,
        )
    except (BaseError, ValueError, OSError) as error:
        raise failure("reach", where.url, endpoint or "", error, patience) from error
    return made, _shown(endpoint) or "AWS"


def from_chain(where: Bucket) -> tuple[Any, Any, str | None]:
    """Return botocore's session, a provider of credentials from it, and the endpoint that is configured."""
    import botocore.session
    from botocore.configprovider import ConfiguredEndpointProvider
    from botocore.exceptions import BotoCoreError

    # Where no machine metadata is to be asked, say AWS_EC2_METADATA_DISABLED=true, as for every AWS tool.
    session = botocore.session.Session(profile=where.profile)
    try:
        found = session.get_credentials()
        endpoint = (
            where.endpoint
            or ConfiguredEndpointProvider(
                full_config=session.full_config, scoped_config=session.get_scoped_config(), client_name="s3"
            ).provide()
        )
    except BotoCoreError as error:
        raise StorageError(
            f"cannot reach {where.url}: {_line(error)}", "check AWS_PROFILE and ~/.aws/config"
        ) from error
    if found is None:
        raise StorageError(
            f"cannot reach {where.url}: there are no AWS credentials",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        )

    def provider() -> S3Credential:
        frozen = found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_LAST,
        }

    return session, provider, endpoint


def failure(action: str, what: str, endpoint: str, error: Exception, patience: Patience) -> StorageError:
    """Return the one line that says what an S3 client's error means, without a secret of it.

    Parameters
    ----------
    action, what
        ``read``, ``write``, ..., and which object.
    endpoint
        As `client` says it.
    error
        obstore's or botocore's.
    patience
        By which the server was asked.

    """
    text = str(error)
    code = _CODE.search(text)
    status = _STATUS.search(text)
    said = code[1] if code else status[1] if status else ""
    where = f"cannot {action} {what}"
    if said == "NoSuchBucket":
        return StorageError(f"{where}: there is no such bucket at {endpoint}", "make it, or name another one")
    if said.startswith(_REFUSALS) or type(error).__name__ in {"PermissionDeniedError", "UnauthenticatedError"}:
        return StorageError(
            f"{where}: {endpoint} refuses it ({said or 'access denied'})",
            "check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE) and the bucket's policy",
        )
    if said:
        return StorageError(f"{where}: {endpoint} answers {said}", "try again, or ask whoever runs it")
    if "kind: Timeout" in text or "TimedOut" in text:
        return StorageError(
            f"{where}: no answer from {endpoint} within {patience.longest:.0f} s", "check the server and the network"
        )
    if "kind: Connect" in text:
        return StorageError(
            f"{where}: nobody answers at {endpoint}", "check AWS_ENDPOINT_URL, and that the server runs"
        )
    if "HTTP error" in text or "kind: " in text:
        return StorageError(f"{where}: the connection to {endpoint} broke", "try again")
    return StorageError(f"{where}: {_line(error)}", "check the URL, and the AWS settings")


def transient(error: Exception) -> bool:
    """Say whether a request that failed so may succeed when it is repeated."""
    text = str(error)
    status = _STATUS.search(text)
    return status[1].startswith(("5", "429", "408")) if status else "HTTP error" in text or "kind: " in text


def pause(attempt: int) -> None:
    """Wait before a request is repeated for the given time, from 0."""
    time.sleep(min(0.1 * 2**attempt, 2.0))


def forked_since(process: int) -> bool:
    """Say whether this process is another one than that: obstore's threads do not survive a fork, and a call would hang."""
    return os.getpid() != process


def _shown(endpoint: str | None) -> str:
    """Return an endpoint without what may stand before an @."""
    return re.sub(r"//[^/@\s]*@", "//", endpoint or "")


def _line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "".join(c for c in _shown(line) if c.isprintable())[:200]
