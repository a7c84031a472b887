"""Where fair-esm's files may be had besides their own address: a mirror, or the cache of torch hub.

``PROTEUS_FAIR_ESM_URL`` names a mirror: an http or https address below which the files lie as below fair-esm's own,
``models/NAME.pt`` and ``regression/NAME-contact-regression.pt``. It stands in wherever a source names fair-esm's address.

Whoever has used fair-esm has its files already: torch.hub keeps them under ``hub/checkpoints`` in ``TORCH_HOME``,
by default ``~/.cache/torch`` (torch/hub.py, _get_torch_home).
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from proteus_pipeline.errors import ConfigError
from proteus_pipeline.models.download import public_url
from proteus_pipeline.stores.files import atomic_path, sha256_file, storage_error

FAIR_ESM = "https://dl.fbaipublicfiles.com/fair-esm"
MIRROR = "PROTEUS_FAIR_ESM_URL"


def mirrored(url: str) -> str:
    """Return the address to use for one of a source's: the mirror's where it is fair-esm's own and one is named.

    Raises
    ------
    ConfigError
        When the mirror's is no http or https URL.

    """
    mirror = os.environ.get(MIRROR, "").rstrip("/")
    if not mirror or not url.startswith(f"{FAIR_ESM}/"):
        return url
    try:
        public_url(mirror)
    except ConfigError as error:
        raise ConfigError(f"{MIRROR}: {error.what}", error.remedy) from error
    return mirror + url.removeprefix(FAIR_ESM)


def take_from_torch_hub(url: str, target: Path, sha256: str | None) -> str | None:
    """Put torch hub's copy of one of fair-esm's files at `target`, and return its SHA-256.

    It is linked where both lie on one file system, else copied. None when it is not fair-esm's address, there is no
    copy that can be read, or it is not what `sha256` says: then the file is to be downloaded.

    Raises
    ------
    StorageError
        When `target` can't be written.

    """
    found = _torch_home() / "hub" / "checkpoints" / PurePosixPath(urlsplit(url).path).name
    if not url.startswith(f"{FAIR_ESM}/") or not os.access(found, os.R_OK) or not found.is_file():
        return None
    with suppress(_AnotherFileError), atomic_path(target) as temporary:
        try:
            os.link(found.resolve(), temporary)
        except OSError:  # another file system, or somebody else's file
            try:
                shutil.copyfile(found, temporary)
            except OSError as error:
                raise storage_error("write", target, error) from error
        digest = sha256_file(temporary)
        if sha256 is not None and digest != sha256:
            raise _AnotherFileError
        return digest
    return None


class _AnotherFileError(Exception):
    """The copy is not the file that was asked for."""


def _torch_home() -> Path:
    if home := os.environ.get("TORCH_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch"
