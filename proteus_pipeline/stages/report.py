"""report: one page that says what the result is and what it came from. The same inputs give the same bytes."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

from proteus_pipeline.stages.drift import Drift
from proteus_pipeline.stages.page import Page, Point, render
from proteus_pipeline.stages.probing import Prediction
from proteus_pipeline.stages.project import COUNTS, DRIFT, DRIFTS, MAP, METRICS, PREDICTIONS, REPORT, Project
from proteus_pipeline.stores.files import write_atomic

if TYPE_CHECKING:
    from pathlib import Path


def run(here: Project) -> None:
    """Write results/report.html."""
    work = here.work
    compared = _json(work / DRIFT)
    page = Page(
        title="Protein embeddings and what they tell",
        lineage=_lineage(here),
        metrics=_json(work / METRICS)["probe"],
        predictions=[
            Prediction(r["id"], r["actual"], r["predicted"], int(r["fold"])) for r in _rows(work / PREDICTIONS)
        ],
        points=[Point(r["id"], float(r["x"]), float(r["y"]), r["label"]) for r in _rows(work / MAP)],
        compare=_comparison(compared),
        drifts=[
            Drift(r["id"], float(r["cosine"]), float(r["relative_l2"]), float(r["max_abs"]))
            for r in _rows(work / DRIFTS)
        ],
    )
    write_atomic(work / REPORT, render(page).encode())
    here.record("report", page=REPORT)


def _comparison(compared: dict[str, Any]) -> dict[str, Any] | None:
    if compared["status"] != "ok":
        return None
    probe = compared["probe"]["candidate"]
    value = {"candidate": compared["candidate"], "drift": compared["drift"]}
    return value | ({"probe": probe} if probe["status"] == "ok" else {})


def _lineage(here: Project) -> dict[str, str]:
    composed = here.composed
    model, data, e = composed["stages"]["embed"]["model"], composed["data"], composed["embedding"]
    counts = _json(here.work / COUNTS)
    entry = here.catalogue.get(model["name"])
    lineage = {"Model": model["reference"]}
    if entry:
        lineage["What it is"] = entry.description
    numbers = (
        f"{e['precision']}, {e['numerics']}, stored as {e['stored']}, engine revision {composed['engine_revision']}"
    )
    return lineage | {
        "Trunk digest": model["trunk_digest"],
        "Model digest": model["digest"],
        "Layer": str(composed["stages"]["embed"]["layer"]),
        "Pooling": e["pooling"],
        "Numbers": numbers,
        "Sequences": f"{counts['kept']} proteins, {counts['unique']} distinct, {counts['residues']} residues",
        "FASTA": data["fasta"],
        "FASTA digest": data["fasta_digest"],
        "Labels": data["labels"] or f"{data['label_key']}= in the headers",
        "Labelled": str(counts["labelled"]),
        "Too long": f"{data['long']} above {data['max_length']} residues",
    }


def _json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
