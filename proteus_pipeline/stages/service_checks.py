"""What ``proteus doctor`` looks at beyond the machine: Redis, S3, mirrors; by public addresses, never with a secret shown."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from urllib.parse import SplitResult, urlsplit

from proteus_pipeline.models.mirrors import MIRROR
from proteus_pipeline.registry.weights import dvc_configurations
from proteus_pipeline.stages.diagnosis import FAIL, OK, WARN, Check, Here, Look

_PATIENCE_S = 3.0
_PORTS = {"redis": 6379, "rediss": 6379, "http": 80, "https": 443}


def _redis(_: Here) -> Iterator[Check]:
    yield from _address("redis", "PROTEUS_REDIS_URL", ("redis", "rediss"), "redis://HOST:PORT/0")


def _mirror(_: Here) -> Iterator[Check]:
    yield from _address("mirror", MIRROR, ("http", "https"), "https://HOST/PATH")


def _address(name: str, variable: str, schemes: tuple[str, ...], form: str) -> Iterator[Check]:
    """Check that a variable is a URL, and that something listens there."""
    text = os.environ.get(variable)
    if not text:
        return
    url = _parsed(text)
    if url is None or url.scheme not in schemes:
        yield Check(name, FAIL, f"{variable} is no URL of {' or '.join(schemes)}", f"write it as {form}")
    else:
        yield _reached(name, f"{variable}: {_public(url)}", url, variable)


def _s3(here: Here) -> Iterator[Check]:
    """Check the bucket's form, and that its endpoint listens, where one is named: AWS's own is not asked."""
    text = os.environ.get("PROTEUS_S3_URL")
    url = _parsed(text) if text else None
    if text and (url is None or url.scheme != "s3"):
        yield Check("s3", FAIL, "PROTEUS_S3_URL is no URL of a bucket", "write it as s3://BUCKET/PREFIX")
    elif url is not None:
        yield Check("s3", OK, f"PROTEUS_S3_URL: s3://{url.hostname}{url.path}")
    endpoints = {name: os.environ[name] for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if os.environ.get(name)}
    if here.is_repository:
        for _, parser in dvc_configurations(here.root):
            for section in parser.sections():
                if found := parser.get(section, "endpointurl", fallback=None):
                    endpoints.setdefault(f"endpointurl of {section.strip(chr(39))}", found)
    for said_by, endpoint in endpoints.items():
        address = _parsed(endpoint)
        if address is None or address.scheme not in {"http", "https"}:
            yield Check("s3", FAIL, f"{said_by} is no URL", "write it as https://HOST:PORT")
        else:
            yield _reached("s3", f"{said_by}: {_public(address)}", address, said_by)


def _parsed(text: str) -> SplitResult | None:
    try:
        url = urlsplit(text.strip())
        whole = bool(url.hostname) and url.port != 0
    except ValueError:
        return None
    return url if whole else None


def _public(url: SplitResult) -> str:
    """Return scheme, host and port: user, password, path and query may hold secrets."""
    return f"{url.scheme}://{url.hostname}" + (f":{url.port}" if url.port else "")


def _reached(name: str, what: str, url: SplitResult, said_by: str) -> Check:
    try:
        with socket.create_connection((url.hostname, url.port or _PORTS[url.scheme]), timeout=_PATIENCE_S):
            return Check(name, OK, f"{what} answers")
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        return Check(name, WARN, f"{what} does not answer ({reason})", f"start it, or correct {said_by}")


LOOKS: dict[str, Look] = {"redis": _redis, "s3": _s3, "mirror": _mirror}
