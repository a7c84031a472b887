"""Which kind of place a location names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from proteus_pipeline.errors import ConfigError
from proteus_pipeline.stores.store import LocalStore

if TYPE_CHECKING:
    from proteus_pipeline.stores.s3_access import Patience
    from proteus_pipeline.stores.store import Store

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


def scheme_of(location: Path | str) -> str:
    """Return the scheme of a location in lower case; empty for a path.

    A URL that went through `Path` has lost a slash, and is one still.

    >>> scheme_of("s3://group/cache"), scheme_of(Path("s3://group/cache")), scheme_of("../cache")
    ('s3', 's3', '')
    """
    found = _SCHEME.match(str(location))
    return found[1].lower() if found else ""


def check_location(location: Path | str) -> None:
    """Refuse a location that is no path and no S3 URL; nothing is asked of a server.

    Raises
    ------
    ConfigError
        Saying what can be used.

    """
    from proteus_pipeline.stores.s3_access import parse_url

    scheme = scheme_of(location)
    if scheme == "s3":
        parse_url(str(location))
    elif scheme == "file":
        raise ConfigError(f"{location} is a file URL", "write the path alone")
    elif scheme:
        raise ConfigError(f"{scheme}:// is no place for embeddings", "use a folder's path, or s3://BUCKET/PREFIX")


def open_place(location: Path | str, patience: Patience | None = None) -> Store:
    """Return the place that a location names: a folder of this machine, or ``s3://BUCKET/PREFIX``.

    Parameters
    ----------
    location
        A path or an S3 URL.
    patience
        For how long a server is asked; as long as a push or a pull may take where None.

    Raises
    ------
    ConfigError
        For any other scheme.

    """
    check_location(location)
    if scheme_of(location) != "s3":
        return LocalStore(location)
    from proteus_pipeline.stores.s3 import S3Store
    from proteus_pipeline.stores.s3_access import PATIENT

    return S3Store(str(location), patience=patience or PATIENT)
