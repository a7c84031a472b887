"""Weights as DVC keeps them: a pointer in git, content-addressed objects in DVC's cache.

The pointer and the directory object are written as DVC 3 writes them (docs: https://dvc.org/doc/user-guide/project-structure),
so every dvc command works on them. They are read and written here because ``import dvc.repo`` costs a second, and
because ``dvc add`` changes the working tree, which a registration must not.
"""

from __future__ import annotations

import configparser
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs

from proteus_pipeline.errors import IntegrityError, StorageError
from proteus_pipeline.stores.files import atomic_path, md5_file, sha256_file, storage_error, write_atomic

_MD5 = re.compile(r"[0-9a-f]{32}")
_PLAIN = re.compile(r"(?!(?:null|true|false|yes|no|on|off|y|n)$)[a-z][\w-]*", re.IGNORECASE | re.ASCII)
# A value as DVC's configuration writes it: in quotes where it holds a comma or a #.
_VALUE = re.compile(r"""(["'])(?P<quoted>.*?)\1|(?P<bare>[^#]*)""")
_POINTER = re.compile(r"^-?\s*(md5|size|nfiles|path): (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Pointer:
    """What ``models/NAME.dvc`` says: the hash of a directory object, and what it comes to."""

    md5: str
    size: int
    files: int
    path: str

    def text(self) -> str:
        """Return the file as ``dvc add`` writes it."""
        return (
            f"outs:\n- md5: {self.md5}\n  size: {self.size}\n  nfiles: {self.files}\n  hash: md5\n"
            f"  path: {_scalar(self.path)}\n"
        )

    @classmethod
    def parse(cls, text: str, origin: str) -> Pointer:
        """Read a ``.dvc`` file of one folder.

        Raises
        ------
        IntegrityError
            When it is none.

        """
        fields = dict(_POINTER.findall(text))
        try:
            pointer = cls(fields["md5"].strip(), int(fields["size"]), int(fields["nfiles"]), fields["path"].strip("' "))
        except (KeyError, ValueError) as error:
            raise IntegrityError(
                f"{origin} is no DVC pointer to a folder ({error})", "git checkout it again"
            ) from error
        if not re.fullmatch(r"[0-9a-f]{32}\.dir", pointer.md5):
            raise IntegrityError(f"{origin} points to {pointer.md5!r}, not to a folder", "git checkout it again")
        return pointer


@dataclass(frozen=True)
class StoredFolder:
    """A folder in the cache: its pointer, and one sha256 over its files' own."""

    pointer: Pointer
    sha256: str


class DvcCache:
    """The content-addressed objects of the repository at `root`."""

    def __init__(self, root: Path) -> None:
        self._files = _cache_dir(root) / "files" / "md5"

    def object(self, md5: str) -> Path:
        return self._files / md5[:2] / md5[2:]

    def add_folder(self, folder: Path, name: str) -> StoredFolder:
        """Copy a folder's files into the cache, the directory object last; what is there already is kept."""
        entries, sums, size = [], [], 0
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        for relative in names:
            path = folder / relative
            md5 = md5_file(path)
            self._add_file(path, md5)
            entries.append({"md5": md5, "relpath": relative})
            sums.append(f"{sha256_file(path)}  {relative}\n")
            size += path.stat().st_size
        listing = json.dumps(entries, sort_keys=True).encode()
        digest = hashlib.md5(listing, usedforsecurity=False).hexdigest() + ".dir"
        if not _holds(self.object(digest), listing):
            write_atomic(self.object(digest), listing, mode=0o444)
        total = hashlib.sha256("".join(sums).encode()).hexdigest()
        return StoredFolder(Pointer(digest, size, len(entries), PurePosixPath(name).name), total)

    def _add_file(self, path: Path, md5: str) -> None:
        target = self.object(md5)
        if target.exists() and target.stat().st_size == path.stat().st_size and md5_file(target) == md5:
            return
        with atomic_path(target) as temporary:
            try:
                shutil.copyfile(path, temporary)
                temporary.chmod(0o444)
            except OSError as error:
                raise storage_error("write", target, error) from error

    def files(self, pointer: Pointer) -> dict[str, Path] | None:
        """Return the place of each file by its name in the folder, or None when an object is missing.

        Raises
        ------
        IntegrityError
            When the directory object is not what its name says, or names a file outside the folder.

        """
        listing = self.object(pointer.md5)
        if not listing.exists():
            return None
        data = listing.read_bytes()
        if hashlib.md5(data, usedforsecurity=False).hexdigest() + ".dir" != pointer.md5:
            raise IntegrityError(f"{listing} is damaged", f"remove it, then: dvc fetch models/{pointer.path}.dvc")
        try:
            entries = {PurePosixPath(entry["relpath"]): str(entry["md5"]) for entry in json.loads(data)}
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{listing} is no directory of DVC's ({error})", "do not use these weights") from error
        for name, md5 in entries.items():
            # The listing is what its own name says, and may still come from somebody who means harm.
            if name.is_absolute() or ".." in name.parts or not _MD5.fullmatch(md5):
                raise IntegrityError(
                    f"{listing} names {name} ({md5}), outside its folder or the cache", "do not use these weights"
                )
        found = {str(name): self.object(md5) for name, md5 in entries.items()}
        return found if all(path.exists() for path in found.values()) else None

    def checkout(self, pointer: Pointer, folder: Path) -> None:
        """Copy a stored folder to `folder`, as ``dvc checkout`` would; nothing when it is there."""
        files = self.files(pointer)
        if files is None or folder.exists():
            return
        temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
        try:
            for name, source in files.items():
                target = temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
            temporary.rename(folder)
        except OSError as error:
            if folder.exists():
                return  # another process has just put it there
            raise StorageError(
                f"{folder} can't be written ({error.strerror})", "free space, or run dvc checkout"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False


def _scalar(name: str) -> str:
    """Return a name as YAML writes it: in quotes where it would read as a number or a date."""
    if _PLAIN.fullmatch(name):
        return name
    from ruamel.yaml import YAML

    out = io.StringIO()
    YAML().dump({"path": name}, out)
    return out.getvalue().removeprefix("path: ").removesuffix("\n")


def _cache_dir(root: Path) -> Path:
    """Return DVC's cache folder: ``cache.dir`` of the first configuration that sets it, else .dvc/cache."""
    for path in _configurations(root):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise StorageError(f"{path} can't be read ({error})", "mend it: dvc config --list") from error
        if found := parser.get("cache", "dir", fallback=None):
            value = _VALUE.match(found)
            bare = (value["quoted"] or value["bare"] or "").strip() if value else found
            return (path.parent / Path(bare).expanduser()).resolve()
    return root / ".dvc" / "cache"


def _configurations(root: Path) -> Iterator[Path]:
    """Yield DVC's configuration files, the strongest first: of this clone, the repository, the user, the machine."""
    yield root / ".dvc" / "config.local"
    yield root / ".dvc" / "config"
    # The places are platformdirs' where these variables do not name them, as in dvc/dirs.py.
    yield Path(os.environ.get("DVC_GLOBAL_CONFIG_DIR") or platformdirs.user_config_dir("dvc", "iterative"), "config")
    yield Path(os.environ.get("DVC_SYSTEM_CONFIG_DIR") or platformdirs.site_config_dir("dvc", "iterative"), "config")
