"""Where a group's weights lie on S3: a DVC remote, which plain ``dvc pull`` knows too.

``verify = true`` is part of it: without that, DVC takes what arrives for what its name says. Endpoint, region and
credentials are those of the environment or of ~/.aws, as AWS's own tools find them; none is written down here.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from proteus_pipeline.errors import ConfigError, StorageError
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.refs import exclusive
from proteus_pipeline.registry.weights import dvc_configurations, remote_names
from proteus_pipeline.stores.files import write_atomic

URL_VARIABLE = "PROTEUS_S3_URL"
_URL = re.compile(r"s3://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](?:/[\w.=+-]+)*/?", re.ASCII)
# DVC waits for a minute, five times over, unless it is told otherwise. Seconds.
_CONNECT_S, _READ_S = "5", "20"


@dataclass(frozen=True)
class Bucket:
    """A DVC remote on S3: its name and address, and what of its options is not configured yet."""

    name: str
    url: str
    lacks: Mapping[str, str] = field(default_factory=dict)

    def enter(self, root: Path) -> None:
        """Configure it for this clone; StorageError where that can't be written."""
        if self.lacks:
            _enter(root, self.name, self.lacks)


def find_bucket(root: Path, url: str | None = None) -> Bucket:
    """Return where the weights of the repository at `root` lie, or are to lie; it need not exist yet.

    Parameters
    ----------
    root
        The repository's top folder.
    url
        ``s3://BUCKET/PREFIX``; otherwise ``PROTEUS_S3_URL``'s, otherwise the default DVC remote, where it is on S3.

    Raises
    ------
    ConfigError
        When the URL is none of S3's.
    StorageError
        When none is named.

    """
    wanted = url or os.environ.get(URL_VARIABLE)
    known = _configured(root)
    if not wanted:
        default = next(iter(remote_names(root)), None)
        if default is None or not known.get(default, {}).get("url", "").startswith("s3://"):
            raise StorageError(
                f"no S3 bucket is named for the weights of {root}",
                f"give s3_url or {URL_VARIABLE}=s3://BUCKET/PREFIX, or dvc remote add --default NAME s3://BUCKET/PREFIX",
            )
        return _verifying(default, known[default])
    if not _URL.fullmatch(wanted):
        # Not quoted: it may hold a key.
        raise ConfigError(
            f"s3_url or {URL_VARIABLE} is not s3://BUCKET/PREFIX",
            "write it so; endpoint and keys come from AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or ~/.aws",
        )
    place = wanted.rstrip("/")
    if name := next((n for n, options in known.items() if options.get("url", "").rstrip("/") == place), None):
        return _verifying(name, known[name])
    options = {"url": place, "verify": "true", "connect_timeout": _CONNECT_S, "read_timeout": _READ_S}
    return Bucket(f"proteus-{hashlib.sha256(place.encode()).hexdigest()[:8]}", place, options)


def named_bucket(root: Path) -> str | None:
    """Return the DVC remote that ``PROTEUS_S3_URL`` names, configured for this clone; None where it names none.

    Raises
    ------
    ConfigError, StorageError
        As `find_bucket` and `Bucket.enter`.

    """
    if not os.environ.get(URL_VARIABLE):
        return None
    bucket = find_bucket(root)
    bucket.enter(root)
    return bucket.name


def _verifying(name: str, options: Mapping[str, str]) -> Bucket:
    """Return a configured remote, from which DVC is to check what arrives."""
    checks = options.get("verify", "").lower() in {"true", "yes", "1", "on"}
    return Bucket(name, options["url"].rstrip("/"), {} if checks else {"verify": "true"})


def _configured(root: Path) -> dict[str, dict[str, str]]:
    """Return the options of all DVC remotes by name, the strongest configuration's where several set one."""
    found: dict[str, dict[str, str]] = {}
    for _, parser in reversed(list(dvc_configurations(root))):
        for section in parser.sections():
            if named := re.fullmatch(r"""'?remote "([^"]+)"'?""", section):
                options = {key: value.strip().strip("'\"") for key, value in _items(parser, section)}
                found[named[1]] = found.get(named[1], {}) | options
    return found


def _items(parser: configparser.ConfigParser, section: str) -> list[tuple[str, str]]:
    return [(key, value or "") for key, value in parser.items(section)]


def _enter(root: Path, name: str, options: Mapping[str, str]) -> None:
    """Set options of a remote for this clone; whoever reads the configuration meanwhile finds all of it."""
    from configobj import ConfigObj, ConfigObjError

    path = root / ".dvc" / "config.local"
    with exclusive(Git(root)):
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            mode = path.stat().st_mode & 0o777 if lines else 0o644  # it may hold keys
            configuration = ConfigObj(lines, list_values=False)
            configuration.setdefault(f'remote "{name}"', {}).update(options)
            write_atomic(path, ("\n".join(configuration.write()) + "\n").encode(), mode=mode)
        except (ConfigObjError, OSError, UnicodeDecodeError) as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{path} can't be written ({error})", "mend it: dvc config --list") from error
