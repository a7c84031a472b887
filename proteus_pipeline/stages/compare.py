"""compare: the same sequences under a second version, without switching the tree to it."""

from __future__ import annotations

import json
from typing import Any

from proteus_pipeline.embeddings.computing import Progress
from proteus_pipeline.embeddings.manifest import load_embeddings
from proteus_pipeline.stages.drift import drift, mismatch, summarise
from proteus_pipeline.stages.embed import embed_to_manifest
from proteus_pipeline.stages.probe import probe_manifest, write_csv
from proteus_pipeline.stages.project import CANDIDATE, DRIFT, DRIFTS, MANIFEST, METRICS, Project
from proteus_pipeline.stores.files import write_atomic

_COLUMNS = ("id", "cosine", "relative_l2", "max_abs")


def run(here: Project, progress: Progress | None = None) -> None:
    """Write the candidate's manifest, the drift of each sequence, and its summary; a no-op without a candidate."""
    stages = here.composed["stages"]
    reference = stages["compare"]["model"]["reference"]
    if reference is None:
        idle = {"status": "no candidate"}
        write_atomic(here.work / CANDIDATE, (json.dumps(idle) + "\n").encode())
        write_csv(here, DRIFTS, _COLUMNS, [])
        write_atomic(here.work / DRIFT, (json.dumps(idle) + "\n").encode())
        here.record("compare", model=None, sequences=0, unique=0, hits=0, derived=0, computed=0, seconds=0.0)
        return
    embed_to_manifest(here, "compare", CANDIDATE, progress)
    cache = here.cache(here.composed)
    ids, first = load_embeddings(here.work / MANIFEST, cache)
    _, second = load_embeddings(here.work / CANDIDATE, cache)
    why = mismatch(ids, first, second)
    names = [stages[stage]["model"]["name"] for stage in ("embed", "compare")]
    if names[0] != names[1]:
        # Spaces of equal width are still different spaces: a number would say nothing.
        why = f"{names[0]} and {names[1]} are different models"
    drifts = [] if why else drift(ids, first, second)
    write_csv(here, DRIFTS, _COLUMNS, [(d.id, d.cosine, d.relative_l2, d.max_abs) for d in drifts])
    probed = probe_manifest(here, CANDIDATE)[0].metrics
    own = json.loads((here.work / METRICS).read_text(encoding="utf-8"))["probe"]
    value = {
        "status": "ok",
        "model": stages["embed"]["model"]["reference"],
        "candidate": reference,
        "drift": summarise(drifts, why),
        "probe": {"model": scores(own), "candidate": scores(probed)},
    }
    write_atomic(here.work / DRIFT, (json.dumps(value, indent=1) + "\n").encode())


def scores(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return what the two versions differ in: composition and class counts are the same for both."""
    return {key: metrics[key] for key in ("status", "task", "embedding") if key in metrics}
