"""report: one page that says what the result is and what it came from. The same inputs give the same bytes.

The run, the versions and the cache differ from run to run. `write_page` adds them to a page of its own, results/run.html,
which is no output of a stage.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from proteus_pipeline.embeddings.manifest import read_manifest
from proteus_pipeline.errors import ProteusError, StorageError
from proteus_pipeline.stages.compose import recipe_of
from proteus_pipeline.stages.contacts import ContactMap
from proteus_pipeline.stages.drift import Drift
from proteus_pipeline.stages.figures import Point
from proteus_pipeline.stages.page import Page, render
from proteus_pipeline.stages.probe import AXES, read_csv
from proteus_pipeline.stages.probing import Prediction
from proteus_pipeline.stages.project import (
    COMPOSED,
    CONTACTS,
    COUNTS,
    DRIFT,
    DRIFTS,
    MANIFEST,
    MAP,
    METRICS,
    PREDICTIONS,
    REPORT,
    Project,
)  # fmt: skip
from proteus_pipeline.stores.files import storage_error, write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from proteus_pipeline.embeddings.manifest import Manifest
    from proteus_pipeline.stages.standing import Standing

_AGAIN = "run: proteus run"
Made = TypeVar("Made")


def run(here: Project) -> None:
    """Write results/report.html."""
    write_atomic(here.work / REPORT, render(_page(here)).encode())
    here.record("report", page=REPORT)


def write_page(here: Project, target: Path) -> int:
    """Write the page of the result, with the run, the versions and the cache as they stand; return its bytes.

    Parameters
    ----------
    here
        The project; nothing in it is computed, or changed but for the page.
    target
        The file; replaced where there is one.

    Raises
    ------
    StorageError
        When a result is missing, damaged or of other choices than composed.yaml's, or the page can't be written.

    """
    from proteus_pipeline.stages.standing import standing

    if target.is_dir():
        raise StorageError(f"{target} is a folder", "name a file: -o FILE.html")
    now = standing(here)
    text = render(_page(here, now)).encode()
    write_atomic(target, text)
    return len(text)


def _page(here: Project, now: Standing | None = None) -> Page:
    composed, work = here.composed, here.work
    manifest = read_manifest(work / MANIFEST)
    _check_choices(composed, manifest)
    compared = _loaded(here, DRIFT, _json)
    contacts = _loaded(here, CONTACTS, _contacts)
    metrics = _loaded(here, METRICS, _metrics)
    points = _rows(here, MAP, lambda r: Point(r["id"], float(r["x"]), float(r["y"]), r["label"]))
    if [point.id for point in points] != list(manifest.ids):
        raise StorageError(f"{MAP} is of other proteins than {MANIFEST}", _AGAIN)
    return Page(
        title="Protein embeddings and what they tell",
        model=composed["stages"]["embed"]["model"]["reference"],
        lineage=_lineage(here, manifest, compared.get("candidate"), now),
        metrics=metrics["probe"],
        predictions=_rows(
            here, PREDICTIONS, lambda r: Prediction(r["id"], r["actual"], r["predicted"], int(r["fold"]))
        ),
        points=points,
        variance=metrics["map"],
        numbers=_numbers(manifest),
        compare=_comparison(compared),
        drifts=_rows(
            here, DRIFTS, lambda r: Drift(r["id"], float(r["cosine"]), float(r["relative_l2"]), float(r["max_abs"]))
        ),
        contacts=contacts["maps"],
        no_contacts=contacts["status"],
        standing=now,
    )


def _check_choices(composed: Mapping[str, Any], manifest: Manifest) -> None:
    """Refuse results that an interrupted run left of older choices: the page would name the wrong weights."""
    trunk = composed["stages"]["embed"]["model"]["trunk_digest"]
    if manifest.trunk != trunk or manifest.recipe != recipe_of(dict(composed), "embed").described():
        raise StorageError(f"{MANIFEST} was made by other choices than {COMPOSED} holds", _AGAIN)


def _comparison(compared: dict[str, Any]) -> dict[str, Any] | None:
    if compared["status"] != "ok":
        return None
    probe = compared["probe"]["candidate"]
    value = {"candidate": compared["candidate"], "drift": compared["drift"]}
    return value | ({"probe": probe} if probe["status"] == "ok" else {})


def _lineage(here: Project, manifest: Manifest, candidate: str | None, now: Standing | None) -> dict[str, str]:
    composed = here.composed
    model, data, e = composed["stages"]["embed"]["model"], composed["data"], composed["embedding"]
    counts = _loaded(here, COUNTS, _json)
    lineage = {"Model": model["reference"]}
    if model["description"]:
        lineage["What it is"] = model["description"]
    numbers = (
        f"{e['precision']}, {e['numerics']}, stored as {e['stored']}, engine revision {composed['engine_revision']}"
    )
    classes = sorted({entry.device_class for entry in manifest.entries})
    if candidate:
        lineage["Candidate"] = candidate
    lineage |= {
        "Trunk digest": model["trunk_digest"],
        "Model digest": model["digest"],
        "Layer": f"{composed['stages']['embed']['layer']} (0 is before the first block)",
        "Pooling": e["pooling"],
        "Numbers": numbers,
        "Computed on": ", ".join(classes),
        "Sequences": f"{counts['kept']:,} proteins, {counts['unique']:,} distinct, {counts['residues']:,} residues",
        "FASTA": data["fasta"],
        "FASTA digest": data["fasta_digest"],
        "Labels": _labels(data, counts),
        "Rules": f"unknown letters: {data['unknown']}; stops: {data['stops']}; gaps: {data['gaps']}; "
        f"one id twice: {data['duplicates']}; over {data['max_length']:,} residues: {data['long']}",
        "What they did": f"{counts['repeated']} repeated records, {counts['dropped']} dropped, "
        f"{counts['truncated']} truncated, {counts['windowed']} in windows, {counts['replaced']} residues replaced by X",
    }
    if now is not None:
        lineage["Commit"] = now.commit or "none yet"
        lineage["Tracked files"] = {True: "differ from the commit", False: "as committed", None: "not committed yet"}[
            now.dirty
        ]
    return lineage


def _labels(data: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """Return where the labels are from, and how many there are."""
    labelled = f"{counts['labelled']:,} of {counts['kept']:,} proteins"
    if not data["labels"]:
        header = f"{data['label_key']}= in the headers"
        return f"{header}, {labelled}" if counts["labelled"] else f"none; the headers have no {data['label_key']}="
    ignored = counts["labels_ignored"]
    return f"{data['labels']}, {labelled}" + (f"; {ignored:,} labels of other ids" if ignored else "")


def _metrics(path: Path) -> dict[str, Any]:
    value = _json(path)
    # A result of an earlier version of this code has none of the map.
    shares = value.get("map", {})
    return {"probe": dict(value["probe"]), "map": [float(shares[axis]) for axis in AXES] if shares else []}


def _numbers(manifest: Manifest) -> tuple[str, int] | None:
    """Return what the embeddings are made of; None where there is none."""
    for entry in manifest.entries:
        return f"Numbers a {'residue' if len(entry.shape) > 1 else 'protein'}", entry.shape[-1]
    return None


def _contacts(path: Path) -> dict[str, Any]:
    value = _json(path)
    maps = [
        ContactMap(str(m["id"]), str(m["sequence"]), tuple((int(i), int(j), int(p)) for i, j, p in m["pairs"]))
        for m in value["maps"]
    ]
    for one in maps:
        if not all(1 <= i < j <= len(one.sequence) for i, j, _ in one.pairs):
            raise ValueError(one.id)
    return {"status": str(value["status"]), "maps": maps}


def _json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _rows(here: Project, source: str, of_row: Callable[[dict[str, str]], Made]) -> list[Made]:
    return _loaded(here, source, lambda _: [of_row(row) for row in read_csv(here, source)])


def _loaded(here: Project, source: str, read: Callable[[Path], Made]) -> Made:
    """Return a result that another stage wrote.

    Raises
    ------
    StorageError
        When there is none, or it can't be read.

    """
    try:
        return read(here.work / source)
    except ProteusError:
        raise
    except FileNotFoundError as error:
        raise StorageError(f"{source} does not exist", _AGAIN) from error
    except OSError as error:
        raise storage_error("read", here.work / source, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{source} is damaged", _AGAIN) from error
