"""embed: every sequence's embedding is in the cache, and a manifest says which it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from proteus_pipeline.embeddings.computing import Progress
from proteus_pipeline.embeddings.dask_engine import DaskEngine
from proteus_pipeline.embeddings.embedder import Outcome, embed_by
from proteus_pipeline.embeddings.engine import Engine, LocalEngine
from proteus_pipeline.embeddings.manifest import listed, write_manifest
from proteus_pipeline.embeddings.shard_task import Places, Weights
from proteus_pipeline.errors import IntegrityError
from proteus_pipeline.models.device import attested, on_gpu, resolve_device
from proteus_pipeline.sequences.fasta import Record, read_fasta
from proteus_pipeline.stages.compose import cluster_options, recipe_of
from proteus_pipeline.stages.project import CLUSTER, MANIFEST, SEQUENCES, Project

if TYPE_CHECKING:
    from proteus_pipeline.models.encoder import Encoder
    from proteus_pipeline.registry.version import ModelVersion


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
    project.record(stage, model=model, **summary(outcome), **attributed(project, composed, records, outcome))
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
    """Embed records by a stage's model: hits from the cache, the rest by the engine.

    Raises
    ------
    IntegrityError
        When the weights are not those composed.yaml was made with.
    StorageError
        When the weights or the cache can't be used.
    ClusterError
        When a cluster could not compute all of it.

    """
    return embed_by(
        engine_of(project, composed, stage, records),
        [r.sequence for r in records],
        trunk=composed["stages"][stage]["model"]["trunk_digest"],
        recipe=recipe_of(composed, stage),
        cache=project.cache(composed),
        progress=progress,
    )


def engine_of(project: Project, composed: dict[str, Any], stage: str, records: Sequence[Record]) -> Engine:
    """Return where a stage's misses are computed; nothing is started or loaded before there is one."""
    runtime = composed["runtime"]
    if composed["engine"] == "local":
        return LocalEngine(
            lambda: stage_encoder(project, composed, stage),
            lambda: attested(resolve_device(runtime["device"])),
            runtime["tokens_per_batch"],
        )
    cache, same_class = composed["cache"], composed["cache"]["accept"] == "same_class"
    shared = str(project.place(cache["shared"])) if cache["shared"] else None
    return DaskEngine(
        cluster_options(project, composed["cluster"]),
        lambda: _weights(project, composed, stage),
        Places(
            str(project.cache(composed).path.absolute()),
            shared,
            cache["local_bytes"],
            cache["write_back"],
            cache.get("redis"),
        ),
        lambda: project.device_class(runtime["device"]) if same_class else "",
        project.home / CLUSTER,
        {r.sequence: r.id for r in reversed(records)},
    )


def _weights(project: Project, composed: dict[str, Any], stage: str) -> Weights:
    """Return which weights the workers load, having made sure that they are there."""
    runtime, model = composed["runtime"], composed["stages"][stage]["model"]
    stage_version(project, composed, stage)
    return Weights(
        home=str(project.home.absolute()),
        reference=model["reference"],
        trunk=model["trunk_digest"],
        device=runtime["device"],
        max_memory_gb=runtime["max_memory_gb"],
        threads=None,  # cluster.threads says it, or what a worker has
        token_budget=runtime["tokens_per_batch"],
    )


def stage_version(project: Project, composed: dict[str, Any], stage: str) -> ModelVersion:
    """Return a stage's version, its weights fetched where they are not there.

    Raises
    ------
    IntegrityError
        When the weights are not those that the configuration was composed with.
    StorageError
        When they can't be had.

    """
    from proteus_pipeline.registry.provision import provide

    model = composed["stages"][stage]["model"]
    version = provide(project.manager, model["reference"], project.catalogue)
    if version.checkpoint.trunk_digest != model["trunk_digest"]:
        raise IntegrityError(
            f"{model['reference']} has trunk {version.checkpoint.trunk_digest}, composed.yaml {model['trunk_digest']}",
            "run: dvc repro compose",
        )
    return version


def stage_encoder(project: Project, composed: dict[str, Any], stage: str) -> Encoder:
    """Return an encoder of a stage's model in this process.

    Raises
    ------
    IntegrityError, StorageError
        As `stage_version`.
    CacheMemoryError
        When the weights have no room in ``runtime.max_memory_gb``.

    """
    import torch

    threads = composed["runtime"]["threads"]
    if threads:
        torch.set_num_threads(threads)
    version = stage_version(project, composed, stage)
    return project.models(composed).get_or_load(version).encoder()


def summary(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome's counts, as results/run.json has them."""
    fields = ("sequences", "unique", "hits", "derived", "computed", "tokens", "from_redis")
    seconds = ("seconds", "saved_seconds", "saved_gpu_seconds")
    counts = {field: getattr(outcome, field) for field in fields}
    counts |= {field: round(getattr(outcome, field), 3) for field in seconds}
    counts |= {"misses": outcome.misses, "other_classes": outcome.other_classes}
    return counts | ({"workers": outcome.workers} if outcome.workers else {})


def attributed(
    project: Project, composed: dict[str, Any], records: Sequence[Record], outcome: Outcome
) -> dict[str, Any]:
    """Return where a stage computed, and why each protein that it computed was not known, as results/run.json has it."""
    if not outcome.computed:
        return {"device_class": None, "gpu_seconds": 0.0, "missed": []}
    made_on = project.device_class(composed["runtime"]["device"])
    ids = {r.sequence: r.id for r in reversed(records)}
    missed = [
        {
            "id": ids[m.sequence],
            "differs": list(m.differs),
            "nearest": m.nearest and dict(m.nearest),
            "detail": m.detail,
        }
        for m in outcome.explained
    ]
    seconds = round(outcome.seconds, 3) if on_gpu(made_on) else 0.0
    return {"device_class": made_on, "gpu_seconds": seconds, "missed": missed}
