"""``proteus embed``: one FASTA file through the cache, with the project's settings, outside DVC."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proteus_pipeline.config.composition import PARAMS, compose, overlay, read_params
from proteus_pipeline.config.overrides import parse
from proteus_pipeline.embeddings.computing import Progress
from proteus_pipeline.embeddings.embedder import Outcome
from proteus_pipeline.embeddings.export import FORMAT, check_target, export
from proteus_pipeline.embeddings.shards import Part
from proteus_pipeline.errors import ConfigError
from proteus_pipeline.sequences.fasta import Record, read_fasta
from proteus_pipeline.sequences.rules import clean
from proteus_pipeline.stages.compose import check_cache_folders, recipe_of, resolve_stages, rules_of
from proteus_pipeline.stages.embed import embed_records
from proteus_pipeline.stages.project import Project


def embed_file(
    project: Project,
    fasta: Path,
    overrides: Sequence[str],
    output: Path | None,
    progress: Progress | None = None,
    part: Part | None = None,
) -> Outcome:
    """Embed a FASTA file, or a part of it, and write the embeddings to `output` where one is given.

    Raises
    ------
    ConfigError
        When an override is wrong, or the output's kind is not known or has no place for such embeddings; before any
        work.
    SequenceError
        When the file can't be used.
    StorageError
        When the output can't be written.

    """
    if output is not None:
        check_target(output)
    composed, records = composed_of(project, fasta, overrides)
    if part:
        mine = part.take(r.sequence for r in records)
        records = [r for r in records if r.sequence in mine]
        if output is not None and not records:
            raise ConfigError(
                f"part {part.number}/{part.of} of {fasta} has no sequence to write to {output}",
                "use no more parts than there are distinct sequences",
            )
    ids = [r.id for r in records]
    if output is not None:
        check_target(output, composed["embedding"]["pooling"], ids)
    outcome = embed_records(project, composed, "embed", records, progress)
    if output is not None:
        export(output, project.cache(composed), ids, outcome.entries, _provenance(composed))
    return outcome


def composed_of(
    project: Project, fasta: Path | None, overrides: Sequence[str], stage: str = "embed"
) -> tuple[dict[str, Any], list[Record]]:
    """Return what composed.yaml would hold for a stage, and the clean records of a file.

    Parameters
    ----------
    project
        Whose settings hold.
    fasta
        The file; None for the one that the settings name.
    overrides
        Hydra overrides.
    stage
        ``embed`` or ``compare``.

    Raises
    ------
    ConfigError
        When an override is wrong.
    SequenceError
        When the file can't be used.
    StorageError
        When ``cache.path`` or ``cache.shared`` can't be a cache.

    """
    changes = parse(overrides)
    data = changes.get("data", {})
    if fasta is not None and isinstance(data, dict):  # else compose says what is wrong with it
        if "fasta" in data:
            raise ConfigError("the FASTA file is given twice", "leave data.fasta= out")
        # The file is named from where the user stands, not from the project's root.
        changes = overlay(changes, {"data": {"fasta": str(fasta.absolute())}})
    composition = compose(project.work, read_params(project.work / PARAMS), changes=changes)
    check_cache_folders(project, composition.settings.cache)
    composed = resolve_stages(project, composition, (stage,))
    path = project.find_file(composed["data"]["fasta"]) if fasta is None else fasta
    records, _ = clean(read_fasta(path, "data.fasta" if fasta is None else ""), rules_of(composed["data"]))
    return composed, records


def _provenance(composed: dict[str, Any]) -> dict[str, Any]:
    """Return how an export's embeddings came to be."""
    model = composed["stages"]["embed"]["model"]
    recipe = recipe_of(composed, "embed").described()
    return {"format": FORMAT, "model": model["reference"], "trunk": model["trunk_digest"], "recipe": recipe}
