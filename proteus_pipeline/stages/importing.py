"""``proteus cache import``: embeddings that were computed elsewhere, for a project's proteins and one of its versions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from proteus_pipeline.embeddings.imports import read_npz, read_pt
from proteus_pipeline.embeddings.index import Attestation, now
from proteus_pipeline.embeddings.stored import to_stored
from proteus_pipeline.errors import ConfigError
from proteus_pipeline.sequences.fasta import shown
from proteus_pipeline.stages.caching import Asked
from proteus_pipeline.stages.compose import extent
from proteus_pipeline.stages.project import Project

UNATTESTED = "unattested"


@dataclass(frozen=True)
class Loaded:
    """What an import did.

    Attributes
    ----------
    imported
        How many embeddings were taken.
    unknown
        The ids that no protein has.
    skipped
        How many were left, since the file says that they are of another layer or pooling.

    """

    imported: int
    unknown: list[str]
    skipped: int


def load(project: Project, this: Asked, source: Path) -> Loaded:
    """Take embeddings from a ``.npz``, or a folder of fair-esm's ``.pt`` files, into the cache, marked as unattested.

    Parameters
    ----------
    project
        Whose version is asked for.
    this
        The proteins that they are of, the weights and the recipe that they are taken to be by.
    source
        The file or folder.

    Raises
    ------
    StorageError
        When the source can't be read, or is no such file; nothing is then taken.
    ConfigError
        When an array does not fit its protein, or the model.

    """
    sequences = {r.id: r.sequence for r in this.records}
    width = extent(project.manager.resolve(this.reference), "width")
    unknown: list[str] = []
    skipped = 0
    publication = this.cache.begin(this.trunk, this.recipe)
    try:
        for row in read_npz(source) if source.suffix == ".npz" else read_pt(source):
            if row.id not in sequences:
                unknown.append(row.id)
                continue
            pooled = this.recipe.pooling != "per_residue"
            if row.layer not in {None, this.recipe.layer} or row.pooling not in {None, this.recipe.pooling}:
                skipped += 1
                continue
            sequence = sequences[row.id]
            if row.array.ndim != (1 if pooled else 2) or (not pooled and len(row.array) != len(sequence)):
                raise ConfigError(
                    f"the array of {shown(row.id)} is {row.array.shape}, for {len(sequence)} residues, {this.recipe.pooling}",
                    "choose embedding.pooling, and the FASTA file with --fasta",
                )
            if row.array.shape[-1] != width:
                raise ConfigError(
                    f"the array of {shown(row.id)} is {row.array.shape[-1]} wide, and {this.reference} makes {width}",
                    "name the model that made it: model=NAME@vX.Y.Z",
                )
            key = this.recipe.key(this.trunk, sequence)
            publication.add(key, to_stored(row.array, this.recipe.stored), len(sequence))
        if len(publication):
            publication.publish(Attestation(UNATTESTED, "", now(), 0.0, 0, "imported"))
    finally:
        publication.discard()
    this.cache.tidy()
    return Loaded(len(publication), unknown, skipped)
