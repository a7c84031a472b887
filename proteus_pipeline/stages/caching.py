"""What ``proteus cache`` asks of a project: its settings, its proteins, its versions, for the cache's own verbs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.config.composition import PARAMS, compose, read_params
from proteus_pipeline.config.overrides import parse
from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.contents import Content
from proteus_pipeline.embeddings.explaining import Miss, Plan
from proteus_pipeline.embeddings.manifest import read_manifest
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.errors import ConfigError, ProteusError, StorageError
from proteus_pipeline.models.architecture import resolve_layer
from proteus_pipeline.models.device import matmul_rate, resolve_device
from proteus_pipeline.models.pooling import POOLINGS
from proteus_pipeline.registry.bucket import URL_VARIABLE
from proteus_pipeline.registry.weights import remote_settings
from proteus_pipeline.sequences.fasta import Record
from proteus_pipeline.stages.adhoc import composed_of
from proteus_pipeline.stages.compose import check_cache_folders, extent, recipe_of
from proteus_pipeline.stages.embed import embed_records
from proteus_pipeline.stages.notes import note
from proteus_pipeline.stages.project import CANDIDATE, COMPOSED, MANIFEST, Project
from proteus_pipeline.stores.files import storage_error
from proteus_pipeline.stores.places import check_location, scheme_of
from proteus_pipeline.stores.s3_access import parse_url

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.checking import Audited
    from proteus_pipeline.embeddings.housekeeping import Cleaning
    from proteus_pipeline.registry.version import ModelVersion
    from proteus_pipeline.stores.store import Store

# What the encoder reaches of a machine's products: half, or more (benchmarks/encoder_vs_peers.py).
_SHARE_OF_PRODUCTS = 0.5
# Beside what DVC keeps in its remote.
_IN_REMOTE = "embeddings"
_S3_FORM = (
    "write s3://BUCKET/PREFIX, of letters, digits, - _ . and single /, and the key in AWS_ACCESS_KEY_ID or a profile"
)


@dataclass(frozen=True)
class Asked:
    """Proteins, and what is wanted of them.

    Attributes
    ----------
    cache
        Of the settings.
    records
        Clean.
    reference, trunk
        The version of the embed stage, and its weights.
    recipe
        What its embeddings are made by.
    composed
        All settings.

    """

    cache: EmbeddingCache
    records: list[Record]
    reference: str
    trunk: str
    recipe: Recipe
    composed: dict[str, Any]

    @property
    def sequences(self) -> list[str]:
        """Of the records, in their order."""
        return [r.sequence for r in self.records]


def settings_cache(project: Project, overrides: Sequence[str]) -> EmbeddingCache:
    """Return the cache that the settings name; no version is looked up.

    Raises
    ------
    ConfigError
        When an override is wrong.
    StorageError
        When ``cache.path`` or ``cache.shared`` can't be a cache.

    """
    composition = compose(project.work, read_params(project.work / PARAMS), changes=parse(overrides))
    settings = composition.settings
    check_cache_folders(project, settings.cache)
    return project.cache({"cache": dataclasses.asdict(settings.cache), "runtime": dataclasses.asdict(settings.runtime)})


def asked(project: Project, fasta: Path | None, overrides: Sequence[str]) -> Asked:
    """Return the proteins of a file, or of the settings' own, and what the embed stage makes of them.

    Raises
    ------
    ConfigError
        When an override is wrong.
    SequenceError
        When the file can't be used.

    """
    composed, records = composed_of(project, fasta, overrides)
    model = composed["stages"]["embed"]["model"]
    return Asked(
        project.cache(composed),
        records,
        model["reference"],
        model["trunk_digest"],
        recipe_of(composed, "embed"),
        composed,
    )


def plan(project: Project, this: Asked) -> Plan:
    """Return what embedding the proteins would take; where these weights never ran here, by what this machine can do."""
    version = project.manager.resolve(this.reference)
    architecture = version.checkpoint.architecture
    wanted = this.composed["runtime"]["device"]
    here = project.device_class(wanted)
    found = this.cache.plan(this.sequences, this.trunk, this.recipe, architecture.width, here)
    if found.seconds is not None or not found.misses:
        return found
    import torch

    mean_length = round(found.tokens / found.misses) - 2
    flops = found.misses * architecture.flops(mean_length)
    return dataclasses.replace(
        found, seconds=flops / (_SHARE_OF_PRODUCTS * matmul_rate(resolve_device(wanted), torch.float32))
    )


def explain(this: Asked, only: str | None) -> tuple[list[str], list[Miss]]:
    """Return the ids that were asked for, and why those of them that are misses are.

    Parameters
    ----------
    this
        The proteins.
    only
        One id; all where None.

    Raises
    ------
    ConfigError
        When there is no protein of that id.

    """
    records = [r for r in this.records if only in {None, r.id}]
    if not records:
        raise ConfigError(
            f"{only!r} is no file, and no protein of {this.composed['data']['fasta']}", "give one of both"
        )
    return [r.id for r in records], this.cache.explain([r.sequence for r in records], this.trunk, this.recipe)


def audit(project: Project, this: Asked, sample: int) -> list[Audited]:
    """Compute a sample of what is stored of the proteins once more, by the registered weights.

    Raises
    ------
    IntegrityError
        When the weights are not what their tag says.

    """
    from proteus_pipeline.registry.provision import provide
    from proteus_pipeline.serving.interface import ModelInterface

    provide(project.manager, this.reference, project.catalogue)
    model = ModelInterface(this.reference, version_manager=project.manager)
    device = resolve_device(this.composed["runtime"]["device"])
    return this.cache.audit(this.sequences, model, this.recipe, sample=sample, device=device)


def versions_by_trunk(project: Project) -> tuple[dict[str, list[str]], list[ProteusError]]:
    """Return the live versions that have each trunk, and why some versions' trunk can't be told.

    The weights of a version without a record, which ``gto register`` or a person tagged, are read for it.
    """
    found: dict[str, list[str]] = {}
    unknown: list[ProteusError] = []
    for versions in project.manager.list_models().values():
        for version in versions:
            try:
                found.setdefault(_trunk(version), []).append(version.reference)
            except ProteusError as error:
                unknown.append(error)
    return found, unknown


def _trunk(version: ModelVersion) -> str:
    if version.damage:
        raise version.damage
    return version.record.trunk_digest if version.record else version.checkpoint.trunk_digest


def contents(project: Project, cache: EmbeddingCache) -> list[tuple[Content, list[str]]]:
    """Return what is in a cache, with the versions whose weights made it."""
    names, _ = versions_by_trunk(project)
    return [(content, names.get(content.trunk, [])) for content in cache.contents()]


def trunk_of(project: Project, reference: str) -> tuple[ModelVersion, str]:
    """Return the version that a reference means, and its trunk digest.

    Raises
    ------
    VersionNotFoundError
        When there is none.

    """
    version = project.manager.resolve(reference)
    return version, _trunk(version)


def invalidate(
    version: ModelVersion,
    cache: EmbeddingCache,
    reason: str,
    *,
    layer: int | None = None,
    pooling: str | None = None,
    dry_run: bool = False,
) -> int:
    """Hide embeddings of a version's weights; return how many.

    Parameters
    ----------
    version, cache
        Whose embeddings, and where.
    reason
        Why.
    layer
        Only those of this layer, which may count from the end; of all where None.
    pooling
        Only those of this pooling; of all where None.
    dry_run
        Only count.

    Raises
    ------
    ConfigError
        For a layer or a pooling that there is not, or an empty reason; nothing is then hidden.
    CacheInvalidationError
        When it can't be carried out.

    """
    if not reason.strip():
        raise ConfigError("--reason is empty", "say why: explain shows it to whoever wonders")
    recipe: dict[str, Any] = {}
    if layer is not None:
        layers = extent(version, "layers")
        try:
            recipe["layer"] = resolve_layer(layer, layers)
        except ConfigError as error:
            raise ConfigError(
                f"--layer is {layer}, and {version.reference} has {layers} layers", error.remedy
            ) from error
    if pooling is not None:
        if pooling not in POOLINGS:
            raise ConfigError(f"--pooling is {pooling!r}", f"use one of {', '.join(POOLINGS)}")
        recipe["pooling"] = pooling
    return cache.invalidate(_trunk(version), reason, dry_run=dry_run, **recipe)


def collect(project: Project, cache: EmbeddingCache, grace_days: float, *, dry_run: bool) -> Cleaning:
    """Remove what no tag and no composed.yaml reaches.

    A cache outside of the project may be other projects' too: there, no weights count as unreachable. Nor do they where
    it can't be told which weights somebody has; a note on stderr then says why.
    """
    trunks: set[str] | None = None
    if cache.path.resolve().is_relative_to(project.home.resolve()):
        try:
            trunks = _reachable(project)
        except ProteusError as error:
            text = " ".join(str(error).split())
            note(f"no weights count as unreachable, since some can't be told: {text}")
    return cache.gc(trunks=trunks, grace_seconds=grace_days * 86400, dry_run=dry_run)


def _reachable(project: Project) -> set[str]:
    """Return the trunks of all live versions, and of composed.yaml.

    Raises
    ------
    ProteusError
        When one can't be told.

    """
    found, unknown = versions_by_trunk(project)
    if unknown:
        raise unknown[0]
    if not os.path.lexists(project.work / COMPOSED):
        return set(found)  # nothing was composed yet
    try:
        stages = project.composed["stages"]
        composed = [stages[name]["model"]["trunk_digest"] for name in stages]
    except (KeyError, TypeError) as error:
        raise StorageError(f"{COMPOSED} is damaged", "run: dvc repro compose") from error
    except OSError as error:
        if isinstance(error, ProteusError):
            raise
        raise storage_error("read", project.work / COMPOSED, error) from error
    return found.keys() | {str(trunk) for trunk in composed if trunk is not None}


def compute_lost(project: Project, overrides: Sequence[str]) -> int:
    """Compute what the pipeline's manifests list and the cache has lost; return how many those were.

    Parameters
    ----------
    project
        Whose manifests: the embed stage's, and where a candidate is set that can be composed, the compare stage's.
    overrides
        Hydra overrides, such as the cache's path.

    Raises
    ------
    StorageError
        When the cache can't be written, or the weights not be fetched.

    """
    computed = 0
    for stage, name in (("embed", MANIFEST), ("compare", CANDIDATE)):
        try:
            listed = {e.key for e in read_manifest(project.work / name).entries}
        except StorageError:
            continue  # nothing was run yet, or no candidate
        try:
            composed, records = composed_of(project, None, overrides, stage)
        except ProteusError:
            if stage == "embed":
                raise
            continue
        model = composed["stages"][stage]["model"]
        if model["trunk_digest"] is None:
            continue  # the candidate was set back since
        recipe = recipe_of(composed, stage)
        lost = listed - project.cache(composed).candidates(list(listed)).keys()
        gone = [r for r in records if recipe.key(model["trunk_digest"], r.sequence) in lost]
        computed += embed_records(project, composed, stage, gone).computed if gone else 0
    return computed


def other_cache(project: Project, cache: EmbeddingCache, location: str | None) -> Store | Path | str:
    """Return the cache to copy to or from: as named, else ``PROTEUS_S3_URL``, ``cache.shared``, or the DVC remote's bucket.

    Raises
    ------
    StorageError
        When none is named anywhere.
    ConfigError
        When its URL can't be used.

    """
    if not location and (url := os.environ.get(URL_VARIABLE)):
        try:
            parse_url(url)
        except ConfigError:
            # Not quoted: it may hold a key.
            raise ConfigError(f"{URL_VARIABLE}: it is no S3 URL that can be used", _S3_FORM) from None
        return url
    if location:
        check_location(location)
        return location if scheme_of(location) else Path(location).expanduser()
    if cache.shared:
        return cache.shared
    from proteus_pipeline.stores.s3 import S3Store

    for remote in remote_settings(project.home):
        if scheme_of(remote.get("url", "")) == "s3":
            url = f"{remote['url'].rstrip('/')}/{_IN_REMOTE}"
            return S3Store(
                url, endpoint=remote.get("endpointurl"), region=remote.get("region"), profile=remote.get("profile")
            )
    raise StorageError(
        "no other cache is named", "name a folder or s3://BUCKET/PREFIX, or set PROTEUS_S3_URL, or cache.shared"
    )
