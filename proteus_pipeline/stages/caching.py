"""What ``proteus cache`` asks of a project: its settings, its proteins, its versions, for the cache's own verbs."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.config.composition import PARAMS, compose, read_params
from proteus_pipeline.config.overrides import parse
from proteus_pipeline.embeddings.cache import Content, EmbeddingCache
from proteus_pipeline.embeddings.explaining import Miss, Plan
from proteus_pipeline.embeddings.imports import read_npz, read_pt
from proteus_pipeline.embeddings.index import Attestation
from proteus_pipeline.embeddings.manifest import read_manifest
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.stored import to_stored
from proteus_pipeline.errors import ConfigError, ProteusError, StorageError
from proteus_pipeline.models.device import device_class, matmul_rate, resolve_device
from proteus_pipeline.sequences.fasta import Record
from proteus_pipeline.stages.adhoc import composed_of
from proteus_pipeline.stages.compose import recipe_of
from proteus_pipeline.stages.embed import embed_records
from proteus_pipeline.stages.project import MANIFEST, Project

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.checking import Audited
    from proteus_pipeline.embeddings.housekeeping import Cleaning
    from proteus_pipeline.registry.version import ModelVersion

# What the encoder reaches of a machine's products: half, or more (benchmarks/encoder_vs_peers.py).
_SHARE_OF_PRODUCTS = 0.5
UNATTESTED = "unattested"


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

    """
    composition = compose(project.work, read_params(project.work / PARAMS), changes=parse(overrides))
    settings = composition.settings
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
    device = resolve_device(this.composed["runtime"]["device"])
    found = this.cache.plan(this.sequences, this.trunk, this.recipe, architecture.width, device_class(device))
    if found.seconds is not None or not found.misses:
        return found
    import torch

    mean_length = round(found.tokens / found.misses) - 2
    flops = found.misses * architecture.flops(mean_length)
    return dataclasses.replace(found, seconds=flops / (_SHARE_OF_PRODUCTS * matmul_rate(device, torch.float32)))


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


def versions_by_trunk(project: Project) -> dict[str, list[str]]:
    """Return the live versions that have each trunk."""
    found: dict[str, list[str]] = {}
    for versions in project.manager.list_models().values():
        for version in versions:
            if version.record:
                found.setdefault(version.record.trunk_digest, []).append(version.reference)
    return found


def contents(project: Project, cache: EmbeddingCache) -> list[tuple[Content, list[str]]]:
    """Return what is in a cache, with the versions whose weights made it."""
    names = versions_by_trunk(project)
    return [(content, names.get(content.trunk, [])) for content in cache.contents()]


def trunk_of(project: Project, reference: str) -> tuple[ModelVersion, str]:
    """Return the version that a reference means, and its trunk digest.

    Raises
    ------
    VersionNotFoundError
        When there is none.

    """
    version = project.manager.resolve(reference)
    return version, version.record.trunk_digest if version.record else version.checkpoint.trunk_digest


def collect(project: Project, cache: EmbeddingCache, grace_days: float, *, dry_run: bool) -> Cleaning:
    """Remove what no tag and no composed.yaml reaches.

    A cache outside of the project may be other projects' too: there, no weights count as unreachable.
    """
    trunks: set[str] | None = None
    if cache.path.resolve().is_relative_to(project.home.resolve()):
        trunks = set(versions_by_trunk(project))
        try:
            stages = project.composed["stages"].values()
            trunks |= {stage["model"]["trunk_digest"] for stage in stages if stage["model"]["trunk_digest"]}
        except (ProteusError, KeyError, TypeError):
            pass  # nothing was composed yet
    return cache.gc(trunks=trunks, grace_seconds=grace_days * 86400, dry_run=dry_run)


def compute_lost(project: Project) -> int:
    """Compute what the pipeline's manifest lists and the cache has lost; return how many those were.

    Raises
    ------
    StorageError
        When the cache can't be written, or the weights not be fetched.

    """
    try:
        listed = {e.key for e in read_manifest(project.work / MANIFEST).entries}
    except StorageError:
        return 0  # nothing was run yet
    this = asked(project, None, ())
    lost = listed - this.cache.candidates(list(listed)).keys()
    records = [r for r in this.records if this.recipe.key(this.trunk, r.sequence) in lost]
    return embed_records(project, this.composed, "embed", records).computed if records else 0


def load(this: Asked, source: Path) -> tuple[int, list[str]]:
    """Take embeddings from a ``.npz``, or a folder of fair-esm's ``.pt`` files, into the cache, marked as unattested.

    Parameters
    ----------
    this
        The proteins that they are of, the weights and the recipe that they are taken to be by.
    source
        The file or folder.

    Returns
    -------
    tuple
        How many were taken, and the ids that no protein has. What a file says is of another layer or pooling is left.

    Raises
    ------
    StorageError
        When the source can't be read, or is no such file; nothing is then taken.
    ConfigError
        When an array does not fit its protein.

    """
    sequences = {r.id: r.sequence for r in this.records}
    unknown: list[str] = []
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    publication = this.cache.begin(this.trunk, this.recipe)
    try:
        for row in read_npz(source) if source.suffix == ".npz" else read_pt(source):
            if row.id not in sequences:
                unknown.append(row.id)
                continue
            pooled = this.recipe.pooling != "per_residue"
            if row.layer not in {None, this.recipe.layer} or row.pooling not in {None, this.recipe.pooling}:
                continue
            sequence = sequences[row.id]
            if row.array.ndim != (1 if pooled else 2) or (not pooled and len(row.array) != len(sequence)):
                raise ConfigError(
                    f"the array of {row.id} is {row.array.shape}, for {len(sequence)} residues, {this.recipe.pooling}",
                    "choose embedding.pooling, and the FASTA file with --fasta",
                )
            key = this.recipe.key(this.trunk, sequence)
            publication.add(key, to_stored(row.array, this.recipe.stored), len(sequence))
        if len(publication):
            publication.publish(Attestation(UNATTESTED, "", now, 0.0, 0, "imported"))
    finally:
        publication.discard()
    this.cache.tidy()
    return len(publication), unknown
