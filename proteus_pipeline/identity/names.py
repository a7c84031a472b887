"""What a model may be called, and how versions and references are written.

Names and version tags follow GTO's grammar (https://dvc.org/doc/gto), so that ``gto show`` and ``dvc artifacts`` read
the same tags. Versions are strict SemVer 2.0 (https://semver.org).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, total_ordering

import semver

from proteus_pipeline.errors import InvalidVersionError

MAX_NAME = 100
_SEGMENT = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?")
_FLOATING = re.compile(r"(0|[1-9]\d*)\.(?:(0|[1-9]\d*)\.)?x", re.ASCII)
_LOOSE = re.compile(r"v?(\d+)(?:\.(\d+))?(?:\.(\d+))?(.*)", re.ASCII)


def check_name(name: str) -> str:
    """Return `name` when it is a model name: letters, digits, ``_`` and ``-``, with ``/`` between parts.

    >>> check_name("esm2_t6_8M_UR50D")
    'esm2_t6_8M_UR50D'

    Raises
    ------
    InvalidVersionError
        For anything else: it would become a git tag and a path.

    """
    if not isinstance(name, str):
        raise InvalidVersionError(f"{name!r} is no model name", "write it as a text")
    shown = name if len(name) <= 60 else name[:57] + "..."
    if len(name) > MAX_NAME:
        raise InvalidVersionError(f"model name {shown!r} has {len(name)} characters", f"use at most {MAX_NAME}")
    if not all(_SEGMENT.fullmatch(part) for part in name.split("/")):
        raise InvalidVersionError(
            f"{shown!r} is no model name",
            "use letters, digits, '_' and '-', with a letter or digit first and last in each part between '/'",
        )
    return name


@total_ordering
@dataclass(frozen=True)
class Version:
    """A SemVer 2.0 version; ordered by precedence, and by build metadata where precedence is equal.

    >>> Version.parse("1.10.0") > Version.parse("1.9.0")
    True
    """

    text: str

    @classmethod
    def parse(cls, text: str) -> Version:
        """Read ``1.2.3``, ``v1.2.3``, ``1.2.3-rc.1+build``.

        Raises
        ------
        InvalidVersionError
            With the nearest valid version.

        """
        if not isinstance(text, str):
            raise InvalidVersionError(
                f"{text!r} is no semantic version (MAJOR.MINOR.PATCH)", "write it as a text: '1.0.0'"
            )
        bare = text.removeprefix("v")
        if bare.endswith(".lock"):
            raise InvalidVersionError(
                f"{text!r} ends in .lock, which git takes in no tag", "choose another pre-release"
            )
        if len(bare) <= MAX_NAME and semver.Version.is_valid(bare):
            return cls(bare)
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise InvalidVersionError(
            f"{shown!r} is no semantic version (MAJOR.MINOR.PATCH)", f"the nearest is {_nearest(bare)}"
        )

    @property
    def semver(self) -> semver.Version:
        return _parsed(self.text)

    def __lt__(self, other: Version) -> bool:
        mine, theirs = self.semver, other.semver
        if mine == theirs:
            return (mine.build or "") < (theirs.build or "")
        return bool(mine < theirs)

    def __str__(self) -> str:
        return self.text


@cache
def _parsed(text: str) -> semver.Version:
    """Return a version's parts, taken apart once: sorting asks for them again and again."""
    return semver.Version.parse(text)


def _nearest(text: str) -> str:
    found = _LOOSE.match(text.strip())
    if not found:
        return "1.0.0"
    major, minor, patch, rest = found.groups()
    core = f"{int(major[:9])}.{int((minor or '0')[:9])}.{int((patch or '0')[:9])}"
    with_rest = core + rest[:40]
    return with_rest if semver.Version.is_valid(with_rest) else core


@dataclass(frozen=True)
class Reference:
    """What a user writes to mean a version: exact (``name@v1.2.3``) or floating (``name``, ``name@latest``, ...).

    Attributes
    ----------
    name
        The model.
    selector
        For an exact reference the version's text; else ``current``, ``latest``, ``1.x`` or ``1.2.x``.
    exact
        Whether it names one version for ever.

    """

    name: str
    selector: str
    exact: bool

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference.

        >>> Reference.parse("esm2@1.2.3")
        Reference(name='esm2', selector='1.2.3', exact=True)
        >>> str(Reference.parse("esm2"))
        'esm2@current'

        Raises
        ------
        InvalidVersionError
            When it breaks the grammar.

        """
        if not isinstance(text, str):
            raise InvalidVersionError(f"{text!r} is no model reference", "write it as name@v1.2.3, in quotes")
        name, at, selector = text.partition("@")
        check_name(name)
        if not at:
            return cls(name, "current", exact=False)
        if selector in {"current", "latest"} or _FLOATING.fullmatch(selector):
            return cls(name, selector, exact=False)
        return cls(name, Version.parse(selector).text, exact=True)

    def selects(self, version: Version) -> bool:
        """Say whether ``1.x`` or ``1.2.x`` admits a version; pre-releases only count when named exactly."""
        if self.exact:
            return version.text == self.selector
        if version.semver.prerelease:
            return False
        found = _FLOATING.fullmatch(self.selector)
        if not found:
            return True
        major, minor = found.groups()
        return version.semver.major == int(major) and minor in {None, str(version.semver.minor)}

    def __str__(self) -> str:
        return f"{self.name}@v{self.selector}" if self.exact else f"{self.name}@{self.selector}"
