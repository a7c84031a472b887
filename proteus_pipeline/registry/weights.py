"""Weights as DVC keeps them: a pointer in git, content-addressed objects in DVC's cache.

The pointer and the directory object are written as DVC 3 writes them (docs: https://dvc.org/doc/user-guide/project-structure),
so every dvc command works on them. They are read and written here because ``import dvc.repo`` costs a second, and
because ``dvc add`` changes the working tree, which a registration must not.
"""

from __future__ import annotations

import configparser
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs

from proteus_pipeline.errors import IntegrityError, StorageError
from proteus_pipeline.registry.home import private_folder
from proteus_pipeline.registry.pointers import Pointer
from proteus_pipeline.registry.records import OBJECT_MD5
from proteus_pipeline.stores.files import (
    TEMPORARY_PREFIX,
    atomic_path,
    md5_file,
    sha256_file,
    storage_error,
    write_atomic,
)

_MD5 = re.compile(r"[0-9a-f]{32}")
# A value as DVC's configuration writes it: in quotes where it holds a comma or a #.
_REMOTE = re.compile(r"""'?remote "(?P<name>[^"]+)"'?""")
_ABANDONED_S = 3600.0
_VALUE = re.compile(r"""(["'])(?P<quoted>.*?)\1|(?P<bare>[^#]*)""")


@dataclass(frozen=True)
class StoredFolder:
    """A folder in the cache: its pointer, and one sha256 over its files' own."""

    pointer: Pointer
    sha256: str


class Objects:
    """Files by the MD5 of what they hold, as DVC lays them out: its cache, a backup, a remote in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def object(self, md5: str) -> Path:
        """Return where an object is, or would be.

        Raises
        ------
        IntegrityError
            When `md5` is none: it may come from a tag or a file of somebody who means another path.

        """
        if not OBJECT_MD5.fullmatch(md5):
            raise IntegrityError(f"{md5[:60]!r} is no MD5 of an object", "do not use what named it")
        return self.folder / md5[:2] / md5[2:]

    def is_sound(self, md5: str) -> bool:
        """Say whether an object is there and is what its name says: DVC trusts a read-only one without a look."""
        path = self.object(md5)
        return path.is_file() and md5_file(path) == md5.removesuffix(".dir")

    def add(self, source: Path, md5: str, *, ours: bool = False) -> None:
        """Take a file in; a sound object is kept.

        Parameters
        ----------
        source
            The file. It is copied, and the copy checked.
        md5
            What it should hold; with ``.dir`` for a directory object.
        ours
            Whether it is a scratch file of this process, whose MD5 has just been taken: it is moved, and not read again.

        Raises
        ------
        IntegrityError
            When what arrived is not what its name says; nothing is published then.

        """
        target = self.object(md5)
        if self.is_sound(md5):
            return
        with atomic_path(target) as temporary:
            try:
                _take(source, temporary, move=ours)
                temporary.chmod(0o444)
            except OSError as error:
                raise storage_error("write", target, error) from error
            if not ours and md5_file(temporary) != md5.removesuffix(".dir"):
                raise IntegrityError(
                    f"{source} does not hold {md5}", "its disk or its writer damaged it: look for a copy"
                )

    def sweep(self) -> None:
        """Remove temporary files that killed processes left: those that nobody has written to for an hour."""
        for path in self.folder.glob(f"*/{TEMPORARY_PREFIX}*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime >= _ABANDONED_S:
                    path.unlink()

    def take_out(self, md5: str, target: Path) -> None:
        """Move an object to `target`, on whatever disk that is.

        Raises
        ------
        StorageError
            When it can't be moved; it is then where it was.

        """
        try:
            shutil.move(self.object(md5), target)
        except OSError as error:
            raise storage_error("write", target, error) from error

    def remove(self, md5: str) -> int:
        """Remove an object, and return its bytes; 0 when it was not there."""
        path = self.object(md5)
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise storage_error("remove", path, error) from error
        return size

    def listing(self, pointer: Pointer) -> dict[str, str] | None:
        """Return the MD5 of each file by its name in the folder, or None when the directory object is missing.

        Raises
        ------
        IntegrityError
            When the directory object is not what its name says, or names a file outside the folder.

        """
        if not pointer.is_folder:
            return {PurePosixPath(pointer.path).name: pointer.md5}
        listing = self.object(pointer.md5)
        if not listing.exists():
            return None
        try:
            data = listing.read_bytes()
        except OSError as error:
            raise storage_error("read", listing, error) from error
        if hashlib.md5(data, usedforsecurity=False).hexdigest() + ".dir" != pointer.md5:
            raise IntegrityError(f"{listing} is damaged", "proteus model verify --repair")
        try:
            entries = {PurePosixPath(entry["relpath"]): str(entry["md5"]) for entry in json.loads(data)}
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise IntegrityError(f"{listing} is no directory of DVC's ({error})", "do not use these weights") from error
        for name, md5 in entries.items():
            # The listing is what its own name says, and may still come from somebody who means harm.
            if name.is_absolute() or ".." in name.parts or not _MD5.fullmatch(md5):
                raise IntegrityError(
                    f"{listing} names {name} ({md5}), outside its folder or the cache", "do not use these weights"
                )
        return {str(name): md5 for name, md5 in entries.items()}

    def files(self, pointer: Pointer) -> dict[str, Path] | None:
        """Return the place of each file by its name in the folder, or None when an object is missing.

        Raises
        ------
        IntegrityError
            As `listing`.

        """
        entries = self.listing(pointer)
        if entries is None:
            return None
        found = {name: self.object(md5) for name, md5 in entries.items()}
        return found if all(path.exists() for path in found.values()) else None


def _take(source: Path, target: Path, *, move: bool) -> None:
    if move:
        try:
            source.rename(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        else:
            return
    shutil.copyfile(source, target)


def quarantine(root: Path, objects: Objects, md5: str) -> Path | None:
    """Move an object out of the way, to .proteus/quarantine; None when it is not there. Nothing is ever deleted."""
    if not objects.object(md5).exists():
        return None
    target = private_folder(root) / "quarantine" / f"{md5}-{secrets.token_hex(4)}"
    target.parent.mkdir(exist_ok=True)
    objects.take_out(md5, target)
    return target


def sha256_of(files: Mapping[str, Path]) -> str:
    """Return one SHA-256 over a folder's files: over the lines ``SHA256  NAME``, sorted by name."""
    sums = "".join(f"{sha256_file(files[name])}  {name}\n" for name in sorted(files))
    return hashlib.sha256(sums.encode()).hexdigest()


class DvcCache(Objects):
    """The content-addressed objects of the repository at `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        super().__init__(_cache_dir(root) / "files" / "md5")

    @property
    def is_own(self) -> bool:
        """Whether the cache lies in the repository: one elsewhere may serve other projects too."""
        return self.folder.resolve().is_relative_to(self.root.resolve())

    def add_folder(self, folder: Path, name: str, *, ours: bool = False) -> StoredFolder:
        """Take a folder's files into the cache, the directory object last; what is there already is kept.

        They are copied, or moved where the folder is `ours`: a scratch folder of this process.
        """
        self.sweep()
        entries, size = [], 0
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        total = sha256_of({relative: folder / relative for relative in names})
        for relative in names:
            path = folder / relative
            md5 = md5_file(path)
            size += path.stat().st_size
            self.add(path, md5, ours=ours)
            entries.append({"md5": md5, "relpath": relative})
        listing = json.dumps(entries, sort_keys=True).encode()
        digest = hashlib.md5(listing, usedforsecurity=False).hexdigest() + ".dir"
        if not self.is_sound(digest):
            write_atomic(self.object(digest), listing, mode=0o444)
        return StoredFolder(Pointer(digest, size, len(entries), PurePosixPath(name).name), total)

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


def _cache_dir(root: Path) -> Path:
    """Return DVC's cache folder: ``cache.dir`` of the first configuration that sets it, else .dvc/cache."""
    for path, parser in dvc_configurations(root):
        if found := parser.get("cache", "dir", fallback=None):
            value = _VALUE.match(found)
            bare = (value["quoted"] or value["bare"] or "").strip() if value else found
            return (path.parent / Path(bare).expanduser()).resolve()
    return root / ".dvc" / "cache"


def remote_names(root: Path) -> list[str]:
    """Return the names of DVC's remotes, the default one first; read without DVC, which takes a second to import."""
    names: dict[str, None] = {}
    for _, parser in dvc_configurations(root):
        if default := parser.get("core", "remote", fallback=None):
            names.setdefault(default.strip())
    for _, parser in dvc_configurations(root):
        for section in parser.sections():
            if found := _REMOTE.fullmatch(section):
                names.setdefault(found["name"])
    return list(names)


def remote_settings(root: Path) -> list[dict[str, str]]:
    """Return what DVC's configuration says of each remote, the default one first; the strongest file's word counts."""
    found: dict[str, dict[str, str]] = {name: {} for name in remote_names(root)}
    for _, parser in dvc_configurations(root):
        for section in parser.sections():
            if match := _REMOTE.fullmatch(section):
                found[match["name"]] = dict(parser[section]) | found[match["name"]]
    return list(found.values())


def dvc_configurations(root: Path) -> Iterator[tuple[Path, configparser.ConfigParser]]:
    """Yield DVC's configurations as they are read, the strongest first.

    Raises
    ------
    StorageError
        When one can't be read.

    """
    for path in _configurations(root):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise StorageError(f"{path} can't be read ({error})", "mend it: dvc config --list") from error
        yield path, parser


def _configurations(root: Path) -> Iterator[Path]:
    """Yield DVC's configuration files, the strongest first: of this clone, the repository, the user, the machine."""
    yield root / ".dvc" / "config.local"
    yield root / ".dvc" / "config"
    # The places are platformdirs' where these variables do not name them, as in dvc/dirs.py.
    yield Path(os.environ.get("DVC_GLOBAL_CONFIG_DIR") or platformdirs.user_config_dir("dvc", "iterative"), "config")
    yield Path(os.environ.get("DVC_SYSTEM_CONFIG_DIR") or platformdirs.site_config_dir("dvc", "iterative"), "config")
