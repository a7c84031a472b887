"""compose: params.yaml, conf/ and the registry become composed.yaml, which the other stages list their keys of.

It holds digests and no commit ids: the same choices give the same bytes, whichever way they were made. DVC can't see
what it depends on (tags, and files that the configuration names), so dvc.yaml has it run always; that is cheap, and a
stage after it runs only when a key it uses changed.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from proteus_pipeline.config.composition import COMMAND_LINE, PARAMS, Composition, compose, read_params
from proteus_pipeline.embeddings.cluster import ClusterOptions
from proteus_pipeline.embeddings.engine import ENGINES
from proteus_pipeline.embeddings.manifest import read_manifest
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.errors import ConfigError, ProteusError, StorageError, VersionNotFoundError
from proteus_pipeline.identity import digests
from proteus_pipeline.identity.names import Reference
from proteus_pipeline.models.architecture import resolve_layer
from proteus_pipeline.models.encoder import ENGINE_REVISION
from proteus_pipeline.registry.lock import Locked, read_lock, resolve_locked
from proteus_pipeline.registry.provision import provide
from proteus_pipeline.sequences.fasta import shown
from proteus_pipeline.sequences.rules import Rules
from proteus_pipeline.serving.settings import check_number
from proteus_pipeline.stages.notes import note
from proteus_pipeline.stages.probing import ProbeSettings
from proteus_pipeline.stages.project import CANDIDATE, COMPOSED, MANIFEST, Project, installed
from proteus_pipeline.stores.files import storage_error, write_atomic
from proteus_pipeline.stores.places import check_location, scheme_of
from proteus_pipeline.stores.redis_url import VARIABLE, given_url, parse_url

if TYPE_CHECKING:
    from proteus_pipeline.config.schema import CacheSettings, DataSettings, ReportSettings, RuntimeSettings
    from proteus_pipeline.registry.version import ModelVersion

SCHEMA = 1
LOCK = "models.lock"
_FEW = 5
MOST_CONTACT_MAPS = 24
_OF_A_CACHE = ("index", "runs", "seg", "uses.jsonl")
_NO_MODEL = {
    "reference": None,
    "name": None,
    "version": None,
    "digest": None,
    "trunk_digest": None,
    "description": None,
}


def run(project: Project, progress: Callable[[int, int | None], None] | None = None) -> None:
    """Write composed.yaml."""
    composition = compose(project.work, read_params(project.work / PARAMS))
    check_cache_folders(project, composition.settings.cache)
    value = resolve(project, composition, progress)
    write_atomic(project.work / COMPOSED, yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode())
    _drop_hollow_manifests(project, value)
    models = {name: stage["model"]["reference"] for name, stage in value["stages"].items()}
    project.record("compose", models=models)


def _drop_hollow_manifests(project: Project, composed: dict[str, Any]) -> None:
    """Remove a manifest whose embeddings are not in the cache: of a fresh clone, or of one that moved or was cleaned.

    Git brings a manifest, and DVC would take its stage for done; without the file the stage runs.
    """
    cache = project.cache(composed)
    for name in (MANIFEST, CANDIDATE):
        try:
            listed = read_manifest(project.work / name)
        except StorageError:
            continue  # none, an idle candidate's, or one that its stage will say is damaged
        found = cache.candidates([e.key for e in listed.entries])
        wanted = zip(listed.ids, listed.entries, strict=True)
        missing = [i for i, e in wanted if all(other.content != e.content for other in found.get(e.key, ()))]
        if missing:
            few = ", ".join(map(shown, missing[:_FEW])) + (", ..." if len(missing) > _FEW else "")
            text = f"{len(missing)} embeddings of {name} are not in {cache.path}; its stage runs: {few}"
            note(text)
            (project.work / name).unlink()


def resolve(
    project: Project, composition: Composition, progress: Callable[[int, int | None], None] | None = None
) -> dict[str, Any]:
    """Return what composed.yaml holds: the settings with every reference, layer and input file pinned down.

    Raises
    ------
    ConfigError
        When a value is wrong, naming its file and key; before any work.

    """
    settings = composition.settings
    value = resolve_stages(project, composition, ("embed", "compare"), progress)
    if settings.engine == "dask":  # here, and not where nothing is computed: a colleague may look without a cluster
        cluster_options(project, value["cluster"]).check_usable()
    value["data"] |= _input_digests(project, settings.data)
    return value


def resolve_stages(
    project: Project,
    composition: Composition,
    names: Sequence[str],
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Return what `resolve` does for some stages' models, without reading the input files."""
    settings = composition.settings
    if settings.engine not in ENGINES:
        raise composition.blame(
            ConfigError(f"{settings.engine!r} is no engine", f"use {' or '.join(ENGINES)}"), "engine"
        )
    _check_ranges(composition)
    stages = {
        name: _stage(project, composition, name, getattr(settings.stages, name).model, progress) for name in names
    }
    return {
        "schema": SCHEMA,
        "proteus_version": installed("proteus_pipeline"),
        "engine_revision": ENGINE_REVISION,
        "stages": stages,
        "data": dataclasses.asdict(settings.data),
        "embedding": dataclasses.asdict(settings.embedding),
        "probe": dataclasses.asdict(settings.probe),
        "report": dataclasses.asdict(settings.report),
        "cache": dataclasses.asdict(settings.cache),
        "engine": settings.engine,
        "runtime": dataclasses.asdict(settings.runtime),
        "cluster": dataclasses.asdict(settings.cluster),
    }


def rules_of(data: dict[str, Any]) -> Rules:
    """Return the sequence rules in a composed ``data`` section."""
    return Rules(**{field.name: data[field.name] for field in dataclasses.fields(Rules)})


def recipe_of(composed: dict[str, Any], stage: str) -> Recipe:
    """Return the recipe of a stage in a composed configuration."""
    own, e = composed["stages"][stage], composed["embedding"]
    return Recipe(
        layer=own["layer"],
        pooling=e["pooling"],
        precision=e["precision"],
        numerics=e["numerics"],
        stored=e["stored"],
        window=own["window"],
        overlap=own["overlap"],
    )


def cluster_options(project: Project, settings: dict[str, Any]) -> ClusterOptions:
    """Return a composed ``cluster`` section; certificates are named from the project's root, as all paths are."""
    files = {
        n: str(project.home / Path(settings[n]).expanduser()) for n in ("tls_ca", "tls_cert", "tls_key") if settings[n]
    }
    return ClusterOptions(**settings | files)


def _stage(
    project: Project,
    composition: Composition,
    stage: str,
    reference: str | None,
    progress: Callable[[int, int | None], None] | None,
) -> dict[str, Any]:
    if reference is None:
        if stage == "embed":
            raise ConfigError(f"{composition.origin('model')}: the embed stage has no model", "set model=NAME@vX.Y.Z")
        return {"model": dict(_NO_MODEL), "layer": None, "window": None, "overlap": None}
    key = _source_key(composition, stage)
    try:
        version = _version(project, reference, progress, key if composition.origin(key) == COMMAND_LINE else "")
        locked = Locked.of(version)
        layers = extent(version, "layers")
    except (VersionNotFoundError, ConfigError) as error:
        raise composition.blame(error, key) from error
    except ProteusError as error:
        # Its own kind and exit code, with the key in front.
        raise type(error)(f"{composition.origin(key)}: {key}: {error.what}", error.remedy) from error
    try:
        layer = resolve_layer(composition.settings.embedding.layer, layers)
    except ConfigError as error:
        raise composition.blame(error, "embedding.layer") from error
    model: dict[str, str | None] = {"reference": version.reference, "name": version.name, "version": version.version}
    window, overlap = _windows(composition)
    model |= {"digest": locked.model, "trunk_digest": locked.trunk, "description": _description(project, version)}
    return {"model": model, "layer": layer, "window": window, "overlap": overlap}


def extent(version: ModelVersion, name: str) -> int:
    """Return a version's ``layers`` or ``width``: of its record, where it has one, which needs no weights."""
    return int(version.record.architecture[name] if version.record else getattr(version.checkpoint.architecture, name))


def _description(project: Project, version: ModelVersion) -> str | None:
    """Return what a version's metadata or the catalogue says it is, for the page."""
    told = version.record.metadata.get("description") if version.record else None
    entry = project.catalogue.get(version.name)
    return str(told) if told else entry.description if entry else None


def _windows(composition: Composition) -> tuple[int, int]:
    """Return a window's length and overlap, zeros where long sequences are not windowed: then neither matters."""
    data = composition.settings.data
    return (data.max_length, data.overlap) if data.long == "window" else (0, 0)


def _source_key(composition: Composition, stage: str) -> str:
    """Return the key a stage's model was set by: its own, or the general one it refers to."""
    own, general = f"stages.{stage}.model", "model" if stage == "embed" else "candidate"
    return own if composition.origin(own) in {PARAMS, COMMAND_LINE} else general


def _version(
    project: Project, reference: str, progress: Callable[[int, int | None], None] | None, given: str
) -> ModelVersion:
    """Return a version; `given` is the key that the command line set, which `proteus model lock` would not see."""
    locked, wanted = read_lock(project.work / LOCK), Reference.parse(reference)
    remedy = ""
    if given:
        exact = f"{wanted.name}@vX.Y.Z, as proteus model list has it"
        remedy = f"give an exact one, {exact}, or: proteus run {given}={wanted} --update"
    try:
        return resolve_locked(project.manager, reference, locked, remedy)
    except VersionNotFoundError:
        # A fresh clone has no tags: what the catalogue knows is fetched, checked, and tagged.
        if not wanted.exact and str(wanted) in locked:
            wanted = Reference.parse(f"{wanted.name}@{locked[str(wanted)].version}")
        version = provide(project.manager, str(wanted), project.catalogue, progress=progress)
        return version if wanted.exact else resolve_locked(project.manager, reference, locked, remedy)


def _check_ranges(composition: Composition) -> None:
    """Build every value type once, so that a wrong value is an error here and not in the middle of the work."""
    s = composition.settings
    checks: list[tuple[str, Callable[[], object]]] = [
        ("data", lambda: rules_of(dataclasses.asdict(s.data))),
        ("probe", lambda: ProbeSettings(**dataclasses.asdict(s.probe))),
        ("embedding", lambda: _recipe_values(composition)),
        ("report", lambda: _check_report(s.report)),
        ("cache", lambda: _check_cache(s.cache)),
        ("runtime", lambda: _check_runtime(s.runtime)),
        ("cluster", lambda: ClusterOptions(**dataclasses.asdict(s.cluster))),
    ]
    for section, check in checks:
        try:
            check()
        except ConfigError as error:
            key = next((k for k in composition.origins if k in error.what and "." in k), section)
            raise ConfigError(f"{composition.origin(key)}: {error.what}", error.remedy) from error


def _recipe_values(composition: Composition) -> None:
    e = composition.settings.embedding
    Recipe(0, e.pooling, e.precision, e.numerics, e.stored, *_windows(composition))


def _check_report(settings: ReportSettings) -> None:
    if not 0 <= settings.contacts <= MOST_CONTACT_MAPS:
        raise ConfigError(f"report.contacts is {settings.contacts}", f"use 0 to {MOST_CONTACT_MAPS} proteins")
    if settings.contacts_max_length < 1:
        raise ConfigError(f"report.contacts_max_length is {settings.contacts_max_length}", "use 1 or more residues")


def _check_cache(settings: CacheSettings) -> None:
    from proteus_pipeline.embeddings.cache import EmbeddingCache

    EmbeddingCache(
        ".",
        accept=settings.accept,
        max_bytes=settings.max_bytes,
        policy=settings.policy,
        shared=settings.shared,
        local_bytes=settings.local_bytes,
        write_back=settings.write_back,
    )
    if settings.redis:  # what the environment says is blamed on no file
        check_redis(settings)


def check_redis(settings: CacheSettings) -> None:
    """Refuse a Redis that can't be one, and a password that params.yaml or conf/ would give to git.

    Raises
    ------
    ConfigError
        Without any part of the URL.

    """
    url = given_url(settings.redis)
    if url is None:
        return
    said_by = "cache.redis" if settings.redis else VARIABLE
    try:
        place = parse_url(url)
    except ConfigError as error:
        raise ConfigError(f"{said_by}: {error.what}", error.remedy) from None
    if settings.redis and place.password:
        raise ConfigError("cache.redis holds a password, which git would keep", f"give the URL by {VARIABLE}")


def check_cache_folders(project: Project, settings: CacheSettings) -> None:
    """Refuse a cache that can't be a folder, and a shared one that is no cache. No server is asked.

    Raises
    ------
    StorageError
        Naming the key and the path.
    ConfigError
        For a URL that can't be used.

    """
    if scheme_of(settings.path):
        raise ConfigError(f"cache.path is {settings.path}, and has to be a folder", "set cache.shared to a URL")
    path = project.home / Path(settings.path).expanduser()
    there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise StorageError(f"cache.path is {path}, and {there} is no folder", "set cache.path=FOLDER")
    check_redis(settings)
    if settings.shared and scheme_of(settings.shared):
        check_location(settings.shared)
    elif settings.shared:
        check_is_cache(project.home / Path(settings.shared).expanduser(), "cache.shared")


def check_is_cache(path: Path, said_by: str) -> None:
    """Refuse a path that a cache is to be read from, and that is none: a wrong path would look like an empty cache.

    Parameters
    ----------
    path
        The cache's folder.
    said_by
        What names it: a key, or an option.

    Raises
    ------
    StorageError
        When there is no folder, or one that no cache has written to.

    """
    if not path.is_dir():
        why = "is no folder" if os.path.lexists(path) else "does not exist"
        raise StorageError(f"{said_by}: {path} {why}", "name the folder of an embedding cache")
    if not any((path / name).exists() for name in _OF_A_CACHE):
        raise StorageError(f"{said_by}: {path} is no embedding cache", f"it has none of {', '.join(_OF_A_CACHE)}")


def _check_runtime(runtime: RuntimeSettings) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", runtime.device):
        raise ConfigError(f"runtime.device is {runtime.device!r}", "use auto, cpu, cuda or cuda:N")
    if runtime.threads is not None and runtime.threads < 1:
        raise ConfigError(f"runtime.threads is {runtime.threads}", "use 1 or more, or null for torch's own choice")
    if runtime.tokens_per_batch < 1:
        raise ConfigError(f"runtime.tokens_per_batch is {runtime.tokens_per_batch}", "use 1 or more; 1536 suits a CPU")
    if runtime.max_memory_gb is not None:
        check_number("runtime.max_memory_gb", runtime.max_memory_gb, above=0)


def _input_digests(project: Project, data: DataSettings) -> dict[str, str | None]:
    """Return digests of the input files' bytes, by which the stages notice an edit."""
    return {
        "fasta_digest": _file_digest(project.find_file(data.fasta), "data.fasta"),
        "labels_digest": _file_digest(project.find_file(data.labels), "data.labels") if data.labels else None,
    }


def _file_digest(path: Path, key: str) -> str:
    try:
        return digests.of_record("file", digests.of_file(path))
    except FileNotFoundError as error:
        raise StorageError(f"{key}: {path} does not exist", f"set {key}=PATH, from the project's root") from error
    except OSError as error:
        raise storage_error("read", path, error) from error
