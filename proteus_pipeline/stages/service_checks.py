"""What ``proteus doctor`` looks at beyond the machine: Redis, S3, mirrors; by public addresses, never with a secret shown."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from urllib.parse import SplitResult, urlsplit

from proteus_pipeline.errors import ConfigError
from proteus_pipeline.models.mirrors import MIRROR
from proteus_pipeline.registry.weights import dvc_configurations
from proteus_pipeline.stages.looking import FAIL, OK, WARN, Check, Here, Look
from proteus_pipeline.stores.redis_url import VARIABLE, given_url, parse_url

_PATIENCE_S = 3.0
_PORTS = {"http": 80, "https": 443}


def _redis(here: Here) -> Iterator[Check]:
    """Ask the server as a run would: with the password, and by TLS where the URL says so."""
    from proteus_pipeline.stores.redis import RedisClient

    setting = here.composition.settings.cache.redis if here.is_project else None
    url = given_url(setting)
    if url is None:
        return
    said_by = "cache.redis" if setting else VARIABLE
    try:
        place, client = parse_url(url), RedisClient(url)
    except ConfigError as error:
        yield Check("redis", FAIL, f"{said_by}: {error.what}", error.remedy)
        return
    if client.answers:
        yield Check("redis", OK, f"{said_by}: {place} answers")
    else:
        what = f"{said_by}: {place} does not answer, or refuses us; runs go on without it, slower"
        yield Check("redis", WARN, what, f"start it, or correct {said_by}: host, port, user, password, TLS")


def _mirror(_: Here) -> Iterator[Check]:
    text = os.environ.get(MIRROR)
    url = _parsed(text) if text else None
    if text and (url is None or url.scheme not in _PORTS):
        yield Check("mirror", FAIL, f"{MIRROR} is no URL of http or https", "write it as https://HOST/PATH")
    elif url is not None:
        yield _reached("mirror", f"{MIRROR}: {_public(url)}", url, MIRROR)


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
        if address is None or address.scheme not in _PORTS:
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
