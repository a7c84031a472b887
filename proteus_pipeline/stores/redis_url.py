"""Where Redis is: a URL, read once, and a place that can be named without its password."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from proteus_pipeline.errors import ConfigError

VARIABLE = "PROTEUS_REDIS_URL"
_SCHEMES = {"redis": False, "rediss": True}
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_REMEDY = "write redis://USER:PASSWORD@HOST:PORT/0, or rediss:// for TLS, with %XX for / ? # @ : in a password"


@dataclass(frozen=True)
class RedisPlace:
    """A server, and who we are there; shown without the secret.

    Attributes
    ----------
    host, port, db
        Where.
    username, password
        Empty where none are needed.
    tls
        Whether the connection is encrypted, and the server's certificate and name checked.
    files
        ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile``: paths.

    """

    host: str
    port: int = 6379
    db: int = 0
    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    tls: bool = False
    files: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis{'s' if self.tls else ''}://{host}:{self.port}/{self.db}"

    def options(self) -> dict[str, Any]:
        """Return what a connection of redis-py takes."""
        known: dict[str, Any] = {"host": self.host, "port": self.port, "db": self.db}
        known |= {"username": self.username or None, "password": self.password or None}
        if self.tls:
            known |= {"ssl_cert_reqs": "required", "ssl_check_hostname": True, **dict(self.files)}
        return known


def given_url(setting: str | None) -> str | None:
    """Return the URL that a setting gives, or else ``PROTEUS_REDIS_URL``, or None.

    >>> given_url("redis://db.example.org")
    'redis://db.example.org'
    """
    return setting or os.environ.get(VARIABLE) or None


def parse_url(url: str) -> RedisPlace:
    """Read a URL.

    >>> str(parse_url("rediss://ada:secret@db.example.org/2"))
    'rediss://db.example.org:6379/2'

    Raises
    ------
    ConfigError
        When it can't be read, or asks for what would weaken the connection. No part of the URL is shown: in
        one that is wrong, anything may be the password.

    """
    parts = _split(url)
    if parts is None:
        raise ConfigError("the URL of Redis can't be read", _REMEDY)
    if parts.scheme not in _SCHEMES:
        raise ConfigError("the URL of Redis is none that begins with redis:// or rediss://", _REMEDY)
    host = parts.hostname
    if not host or parts.fragment or any(c.isspace() or not c.isprintable() for c in url):
        raise ConfigError("the URL of Redis names no host, or has a character that has to be escaped", _REMEDY)
    number = parts.path.strip("/") or "0"
    if not (number.isascii() and number.isdigit() and len(number) < 6):
        raise ConfigError("the URL of Redis ends in something that is no number of a database", _REMEDY)
    tls = _SCHEMES[parts.scheme]
    files = _options(parts.query, tls=tls)
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return RedisPlace(host, parts.port or 6379, int(number), user, password, tls, files)


def _split(url: str) -> SplitResult | None:
    """Return a URL's parts; None where it has none: what urllib says then may hold a part of the password."""
    try:
        parts = urlsplit(url)
        usable = parts.port != 0
    except (ValueError, TypeError, AttributeError):
        return None
    return parts if usable else None


def _options(query: str, *, tls: bool) -> tuple[tuple[str, str], ...]:
    pairs = parse_qsl(query, keep_blank_values=True)
    for name, value in pairs:
        if name not in _FILES or not tls:
            raise ConfigError(
                "the URL of Redis has an option that it can't have",
                f"use only {', '.join(_FILES)}, and only with rediss://; certificates are always checked",
            )
        if not Path(value).is_file():
            raise ConfigError(f"the URL of Redis gives a file as {name} that is not there", "check the path")
    return tuple(pairs)
