"""probe: what a linear model can read from the embeddings, beside amino-acid composition."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from proteus_pipeline.embeddings.manifest import load_embeddings
from proteus_pipeline.models.pooling import pool_residues
from proteus_pipeline.sequences.fasta import Record, read_fasta
from proteus_pipeline.sequences.labels import Label
from proteus_pipeline.stages.probing import ProbeResult, ProbeSettings, probe
from proteus_pipeline.stages.project import LABELS, MANIFEST, MAP, METRICS, PREDICTIONS, SEQUENCES, Project
from proteus_pipeline.stages.projection import project, variance_shares
from proteus_pipeline.stores.files import write_atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of the embedding map, as metrics.json names them.
AXES = ("first_variance", "second_variance")


def run(here: Project) -> None:
    """Write metrics.json, the predictions, and the embedding map."""
    result, records, vectors, labels = probe_manifest(here, MANIFEST)
    axes = project(vectors)
    metrics = {"probe": result.metrics, "map": dict(zip(AXES, variance_shares(vectors, axes), strict=True))}
    write_atomic(here.work / METRICS, (json.dumps(metrics, indent=1) + "\n").encode())
    rows: list[Sequence[Any]] = [(p.id, p.actual, p.predicted, p.fold) for p in result.predictions]
    write_csv(here, PREDICTIONS, ("id", "actual", "predicted", "fold"), rows)
    target = {label.id: label.target for label in labels}
    places = [(f"{x:.6g}", f"{y:.6g}") for x, y in axes]
    points = [(r.id, x, y, target.get(r.id, "")) for r, (x, y) in zip(records, places, strict=True)]
    write_csv(here, MAP, ("id", "x", "y", "label"), points)
    here.record("probe", sequences=len(records), labelled=len(labels), result=result.metrics["status"])


def probe_manifest(here: Project, manifest: str) -> tuple[ProbeResult, list[Record], NDArray[np.float32], list[Label]]:
    """Probe the embeddings a manifest lists; returns the records, their (N, D) vectors and labels with the result."""
    composed = here.composed
    ids, arrays = load_embeddings(here.work / manifest, here.cache(composed))
    by_id = dict(zip(ids, arrays, strict=True))
    records = list(read_fasta(here.work / SEQUENCES))
    vectors = np.stack([one_vector(by_id[r.id]) for r in records])
    labels = stored_labels(here)
    return probe_records(records, vectors, labels, ProbeSettings(**composed["probe"])), records, vectors, labels


def one_vector(embedding: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what a probe reads of a protein: a pooled embedding as it is, one per residue as its mean."""
    return embedding if embedding.ndim == 1 else pool_residues(embedding, "mean")


def probe_records(
    records: Sequence[Record], vectors: NDArray[np.float32], labels: Sequence[Label], settings: ProbeSettings
) -> ProbeResult:
    """Probe the (N, D) vectors of some records."""
    return probe(
        [r.id for r in records],
        vectors,
        [r.sequence for r in records],
        {label.id: label.target for label in labels},
        {label.id: label.group for label in labels if label.group},
        settings,
    )


def stored_labels(here: Project) -> list[Label]:
    """Return the labels that prepare wrote."""
    return [Label(row["id"], row["target"], row["group"]) for row in read_csv(here, LABELS)]


def read_csv(here: Project, source: str) -> list[dict[str, str]]:
    """Return the rows of a small table that a stage wrote."""
    # csv refuses fields of over 131,072 characters, and an id or a label may be as long as its file says.
    csv.field_size_limit(sys.maxsize)
    with (here.work / source).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(here: Project, target: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a small table, the same bytes for the same rows."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    write_atomic(here.work / target, out.getvalue().encode())
