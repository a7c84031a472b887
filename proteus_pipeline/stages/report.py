"""report: one page that says what the result is and what it came from. The same inputs give the same bytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from proteus_pipeline.stages.drift import Drift
from proteus_pipeline.stages.page import Page, Point, render
from proteus_pipeline.stages.probe import read_csv
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
            Prediction(r["id"], r["actual"], r["predicted"], int(r["fold"])) for r in read_csv(here, PREDICTIONS)
        ],
        points=[Point(r["id"], float(r["x"]), float(r["y"]), r["label"]) for r in read_csv(here, MAP)],
        compare=_comparison(compared),
        drifts=[
            Drift(r["id"], float(r["cosine"]), float(r["relative_l2"]), float(r["max_abs"]))
            for r in read_csv(here, DRIFTS)
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
    lineage = {"Model": model["reference"]}
    if model["description"]:
        lineage["What it is"] = model["description"]
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
        "Labelled": f"{counts['labelled']} ({counts['labels_ignored']} labels of other ids)",
        "Rules": f"unknown letters: {data['unknown']}; stops: {data['stops']}; gaps: {data['gaps']}; "
        f"one id twice: {data['duplicates']}; over {data['max_length']} residues: {data['long']}",
        "What they did": f"{counts['repeated']} repeated records, {counts['dropped']} dropped, "
        f"{counts['truncated']} truncated, {counts['windowed']} in windows, {counts['replaced']} residues replaced by X",
    }


def _json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
