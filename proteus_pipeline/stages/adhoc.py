"""``proteus embed``: one FASTA file through the cache, with the project's settings, outside DVC."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proteus_pipeline.config.composition import PARAMS, compose, overlay, read_params
from proteus_pipeline.config.overrides import parse
from proteus_pipeline.embeddings.embedder import Outcome, Progress
from proteus_pipeline.embeddings.export import FORMAT, check_target, export
from proteus_pipeline.errors import ConfigError
from proteus_pipeline.sequences.fasta import read_fasta
from proteus_pipeline.sequences.rules import clean
from proteus_pipeline.stages.compose import recipe_of, resolve_stages, rules_of
from proteus_pipeline.stages.embed import described, embed_records
from proteus_pipeline.stages.project import Project


def embed_file(
    project: Project, fasta: Path, overrides: Sequence[str], output: Path | None, progress: Progress | None = None
) -> Outcome:
    """Embed a FASTA file, and write the embeddings to `output` where one is given.

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
    changes = parse(overrides)
    data = changes.get("data", {})
    if isinstance(data, dict):  # else compose says what is wrong with it
        if "fasta" in data:
            raise ConfigError("the FASTA file is given twice", "leave data.fasta= out")
        # The file is named from where the user stands, not from the project's root.
        changes = overlay(changes, {"data": {"fasta": str(fasta.absolute())}})
    composition = compose(project.work, read_params(project.work / PARAMS), changes=changes)
    composed = resolve_stages(project, composition, ("embed",))
    records, _ = clean(read_fasta(fasta), rules_of(composed["data"]))
    ids = [r.id for r in records]
    if output is not None:
        check_target(output, composed["embedding"]["pooling"], ids)
    outcome = embed_records(project, composed, "embed", records, progress)
    if output is not None:
        export(output, project.cache(composed), ids, outcome.entries, _provenance(composed))
    return outcome


def _provenance(composed: dict[str, Any]) -> dict[str, Any]:
    """Return how an export's embeddings came to be."""
    model = composed["stages"]["embed"]["model"]
    recipe = described(recipe_of(composed, "embed"))
    return {"format": FORMAT, "model": model["reference"], "trunk": model["trunk_digest"], "recipe": recipe}
