"""embed: every sequence's embedding is in the cache, and a manifest says which it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from proteus_pipeline.embeddings.computing import Progress
from proteus_pipeline.embeddings.embedder import Outcome, embed
from proteus_pipeline.embeddings.manifest import listed, write_manifest
from proteus_pipeline.errors import IntegrityError
from proteus_pipeline.models.device import attested, device_class, on_gpu, resolve_device
from proteus_pipeline.sequences.fasta import Record, read_fasta
from proteus_pipeline.stages.compose import recipe_of
from proteus_pipeline.stages.project import MANIFEST, SEQUENCES, Project

if TYPE_CHECKING:
    from proteus_pipeline.models.encoder import Encoder

# So many computed proteins are explained one by one in results/run.json; all of them are counted.
MOST_MISSED = 200


def run(project: Project, progress: Progress | None = None) -> Outcome:
    """Embed the prepared sequences, and write the manifest."""
    return embed_to_manifest(project, "embed", MANIFEST, progress)


def embed_to_manifest(project: Project, stage: str, target: str, progress: Progress | None) -> Outcome:
    """Embed the prepared sequences by a stage's model, and write its manifest."""
    composed = project.composed
    records = list(read_fasta(project.work / SEQUENCES))
    outcome = embed_records(project, composed, stage, records, progress)
    write_stage_manifest(project, target, stage, records, outcome)
    model = composed["stages"][stage]["model"]["reference"]
    project.record(stage, model=model, **summary(outcome), **attributed(composed, records, outcome))
    return outcome


def write_stage_manifest(
    project: Project, target: str, stage: str, records: Sequence[Record], outcome: Outcome
) -> None:
    """Write what `embed_records` did as a manifest."""
    composed = project.composed
    trunk = composed["stages"][stage]["model"]["trunk_digest"]
    rows = listed(project.cache(composed), outcome.entries)
    write_manifest(project.work / target, trunk, recipe_of(composed, stage).described(), [r.id for r in records], rows)


def embed_records(
    project: Project, composed: dict[str, Any], stage: str, records: Sequence[Record], progress: Progress | None = None
) -> Outcome:
    """Embed records by a stage's model: hits from the cache, the rest through the encoder.

    Raises
    ------
    IntegrityError
        When the weights are not those composed.yaml was made with.
    StorageError
        When the weights or the cache can't be used.

    """
    runtime = composed["runtime"]
    model = composed["stages"][stage]["model"]
    recipe = recipe_of(composed, stage)

    return embed(
        [r.sequence for r in records],
        trunk=model["trunk_digest"],
        recipe=recipe,
        cache=project.cache(composed),
        encoder=lambda: stage_encoder(project, composed, stage),
        attest=lambda: attested(resolve_device(runtime["device"])),
        token_budget=runtime["tokens_per_batch"],
        progress=progress,
    )


def stage_encoder(project: Project, composed: dict[str, Any], stage: str) -> Encoder:
    """Return an encoder of a stage's model, its weights fetched where they are not there.

    Raises
    ------
    IntegrityError
        When the weights are not those that the configuration was composed with.
    StorageError
        When they can't be had.
    CacheMemoryError
        When they have no room in ``runtime.max_memory_gb``.

    """
    import torch

    from proteus_pipeline.registry.provision import provide

    threads, model = composed["runtime"]["threads"], composed["stages"][stage]["model"]
    if threads:
        torch.set_num_threads(threads)
    version = provide(project.manager, model["reference"], project.catalogue)
    if version.checkpoint.trunk_digest != model["trunk_digest"]:
        raise IntegrityError(
            f"{model['reference']} has trunk {version.checkpoint.trunk_digest}, composed.yaml {model['trunk_digest']}",
            "run: dvc repro compose",
        )
    return project.models(composed).get_or_load(version).encoder()


def summary(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome's counts, as results/run.json has them."""
    fields = ("sequences", "unique", "hits", "derived", "computed", "tokens")
    seconds = ("seconds", "saved_seconds", "saved_gpu_seconds")
    return (
        {field: getattr(outcome, field) for field in fields}
        | {field: round(getattr(outcome, field), 3) for field in seconds}
        | {"misses": outcome.misses}
    )


def attributed(composed: dict[str, Any], records: Sequence[Record], outcome: Outcome) -> dict[str, Any]:
    """Return where a stage computed, and why each protein that it computed was not known, as results/run.json has it."""
    if not outcome.computed:
        return {"device_class": None, "gpu_seconds": 0.0, "missed": []}
    made_on = device_class(resolve_device(composed["runtime"]["device"]))
    ids = {r.sequence: r.id for r in reversed(records)}
    missed = [
        {
            "id": ids[m.sequence],
            "differs": list(m.differs),
            "nearest": m.nearest and dict(m.nearest),
            "detail": m.detail,
        }
        for m in outcome.explained[:MOST_MISSED]
    ]
    seconds = round(outcome.seconds, 3) if on_gpu(made_on) else 0.0
    return {"device_class": made_on, "gpu_seconds": seconds, "missed": missed}
