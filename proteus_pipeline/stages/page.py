"""The page: one HTML file that says what was computed, by which model, and how well it predicts.

The file needs no network: plotly.js and the figures' data are inside it, and its content security policy lets it load
nothing. Equal pages give equal bytes. Ids and labels are data from a FASTA header, and are escaped wherever they go:
by jinja2 in the HTML, as unicode escapes in the figures' JSON, and as entities in what plotly reads as markup.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from proteus_pipeline.stages import figures, wording
from proteus_pipeline.stages.contacts import SEPARATION
from proteus_pipeline.stages.figures import MAX_POINTS, OTHER, Point, largest
from proteus_pipeline.stages.wording import SCORES, clipped, number, small

if TYPE_CHECKING:
    from proteus_pipeline.stages.contacts import ContactMap
    from proteus_pipeline.stages.drift import Drift
    from proteus_pipeline.stages.probing import Prediction
    from proteus_pipeline.stages.standing import Standing

MAX_ROWS = 500
# An id or a label may be as long as its file says: tables show so many characters.
MAX_CELL = 160
IN_LABEL_UNITS = {"mae", "rmse"}
# Pairs at least this far apart in the sequence are what a fold is known by.
LONG_RANGE = 24
STRONGEST = 10
# Less would be said as 0.0 s.
SHOWN_SECONDS = 0.05
_DIGEST = re.compile(r"(?:[a-z0-9]+:)?[0-9a-f]{16,}")


@dataclass(frozen=True)
class Page:
    """What a report says.

    Attributes
    ----------
    title
        Its heading.
    model
        The reference of the version that it is about.
    lineage
        What the result came from, in the order shown: model reference, digests, recipe, FASTA, counts.
    metrics, predictions
        The probe's.
    points, variance
        The embedding map, of all proteins, and the share of the embeddings' variance along either axis.
    numbers
        What an embedding is made of, and how many: of a protein, or of each residue.
    compare
        None where no candidate was chosen; else ``candidate`` (its reference), ``drift`` (what `drift.summarise`
        returned) and, where it was probed in the same folds, ``probe`` (its metrics).
    drifts
        Each protein's drift under the candidate.
    contacts, no_contacts
        Contact maps of some proteins; why there are none: ``no contact head`` or ``no proteins``.
    standing
        The run, the versions and the cache as they are now; None in the result's own page, which has nothing of them.

    """

    title: str
    model: str
    lineage: Mapping[str, str]
    metrics: Mapping[str, Any]
    predictions: Sequence[Prediction]
    points: Sequence[Point]
    variance: Sequence[float] = ()
    numbers: tuple[str, int] | None = None
    compare: Mapping[str, Any] | None = None
    drifts: Sequence[Drift] = ()
    contacts: Sequence[ContactMap] = ()
    no_contacts: str = "no proteins"
    standing: Standing | None = None


def render(page: Page) -> str:
    """Return the page as one self-contained HTML document."""
    from jinja2 import Environment, StrictUndefined

    # Whole lines of template logic leave no blank lines behind.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"clip": lambda text: clipped(text, MAX_CELL), "number": number, "small": small}
    environment.filters |= {"seconds": wording.seconds, "size": wording.size, "reason": wording.reason}
    environment.filters |= {"recipe": wording.recipe, "count": lambda n: f"{n:,}", "by_class": wording.by_class}
    task = page.metrics.get("task") if page.metrics["status"] == "ok" else None
    drawn = _figures(page, task)
    return environment.from_string(_part("page.html")).render(
        page=page,
        task=task,
        finding=_finding(page, task),
        tiles=_tiles(page, task),
        lineage=[(key, value, bool(_DIGEST.fullmatch(value))) for key, value in page.lineage.items()],
        columns=list(_columns(page, task)),
        scores=_score_rows(page, task) if task else [],
        confusion=_confusion(page) if task == "classification" else None,
        predictions=page.predictions[:MAX_ROWS],
        points=page.points[:MAX_ROWS],
        furthest=_furthest(page.drifts),
        contacts=[_contact_facts(one) for one in page.contacts],
        separation=SEPARATION,
        long_range=LONG_RANGE,
        now=page.standing,
        figures=drawn,
        figures_json={name: _json(figure) for name, figure in drawn.items()},
        style=_part("page.css"),
        script=_part("page.js"),
        plotly=_plotly() if drawn else "",
        most=MAX_POINTS,
        asked=_asked(page.standing) if page.standing else {},
        subject=_subject(page),
        times=_times(page.standing) if page.standing else {},
    )


def _part(name: str) -> str:
    return resources.files("proteus_pipeline.stages").joinpath(name).read_text("utf-8")


@cache
def _plotly() -> str:
    """Return plotly.js, deflated, in base64: two fifths of its size, and any browser of these years can inflate it."""
    source = resources.files("plotly").joinpath("package_data/plotly.min.js").read_bytes()
    return base64.b64encode(zlib.compress(source, 9)).decode()


def _figures(page: Page, task: str | None) -> dict[str, dict[str, Any]]:
    answers = {one.id: one.predicted for one in page.predictions}
    possible = {
        "scores": figures.score_bars(task, _columns(page, task)) if task else None,
        "fit": figures.fit(page.predictions) if task == "regression" else None,
        "map": figures.embedding_map(page.points, answers, task, page.variance) if len(page.points) > 2 else None,
        "drift": figures.drift_bars(page.drifts),
    }
    possible |= {f"contacts-{place}": figures.contact_map(one) for place, one in enumerate(page.contacts)}
    return {name: figure for name, figure in possible.items() if figure}


def _json(value: object) -> str:
    """Return JSON that can stand inside a script element: no character of it ends the element or opens a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _finding(page: Page, task: str | None) -> list[str]:
    """Return the result in sentences."""
    absent = f"Embeddings of {len(page.points):,} proteins, and no probe of what they predict: there were "
    sentences = [_probed(page, task) if task else f"{absent}{page.metrics['status']}."]
    summary = page.compare["drift"] if page.compare else {}
    if page.compare and summary["comparable"]:
        sentences.append(
            f"Under the candidate {page.compare['candidate']} the median cosine distance between a protein's two "
            f"embeddings is {small(1 - summary['median_cosine'])}."
        )
    return sentences


def _probed(page: Page, task: str) -> str:
    metrics, gain = page.metrics, page.metrics["gain"]
    count = f"{len(page.predictions):,} proteins that it was not fitted on"
    embedding, composition = metrics["embedding"], metrics["composition"]
    if task == "regression":
        return (
            f"A linear probe on these embeddings predicts the values of {count} with R² {number(embedding['r2'])}. "
            f"The same probe on amino-acid composition alone reaches {number(composition['r2'])}; always naming the "
            "mean gets 0."
        )
    points = f"{abs(gain) * 100:.1f} percentage points {'less' if gain > 0 else 'more'}" if gain else "the same"
    return (
        f"A linear probe on these embeddings names the right class of {embedding['accuracy']:.1%} of {count}. "
        f"The same probe on amino-acid composition alone gets {composition['accuracy']:.1%}, {points}; always naming "
        f"the largest class gets {metrics['majority']:.1%}."
    )


def _tiles(page: Page, task: str | None) -> list[tuple[str, str]]:
    """Return the figures at the head of the page: what each is, and its value."""
    tiles = [("Proteins", f"{len(page.points):,}")]
    if page.numbers:
        tiles.append((page.numbers[0], f"{page.numbers[1]:,}"))
    if task == "classification":
        tiles += [
            ("Accuracy of the probe", f"{page.metrics['embedding']['accuracy']:.1%}"),
            ("On composition alone", f"{page.metrics['composition']['accuracy']:.1%}"),
        ]
    if task == "regression":
        tiles += [
            ("R² of the probe", number(page.metrics["embedding"]["r2"])),
            ("On composition alone", number(page.metrics["composition"]["r2"])),
        ]
    if page.standing and (asked := _asked(page.standing)):
        tiles.append(("Known before this run", f"{asked['hits'] + asked['derived']:,} of {asked['unique']:,}"))
        if asked["saved_seconds"] >= SHOWN_SECONDS:
            tiles.append(("Computing time saved", wording.seconds(asked["saved_seconds"])))
    return tiles


def _subject(page: Page) -> str:
    """Return what the page is about: which weights, and of which file."""
    return " on ".join(filter(None, (page.model, page.lineage.get("FASTA"))))


def _times(now: Standing) -> dict[str, str]:
    """Return the columns of time that a run has numbers for: headings by the names of `StageRun`'s fields."""
    columns = {"saved_seconds": "Time saved", "gpu_seconds": "GPU time"}
    return {key: said for key, said in columns.items() if any(getattr(r, key) >= SHOWN_SECONDS for r in now.runs)}


def _asked(now: Standing) -> dict[str, Any]:
    """Return what all stages of a run together asked of the cache; nothing where none did."""
    runs = [run for run in now.runs if run.counts and run.status == "run"]
    if not runs:
        return {}
    asked: dict[str, Any] = {key: sum(r.counts[key] for r in runs) for key in ("unique", "hits", "derived", "computed")}
    times = ("seconds", "saved_seconds", "gpu_seconds", "saved_gpu_seconds")
    return asked | {key: sum(getattr(r, key) for r in runs) for key in times}


def _columns(page: Page, task: str | None) -> dict[str, Mapping[str, float]]:
    """Return the probes that can be set side by side: their headings and scores."""
    if not task:
        return {}
    columns = {"Embeddings": page.metrics["embedding"], "Composition": page.metrics["composition"]}
    candidate = (page.compare or {}).get("probe") or {}
    if candidate.get("status") == "ok" and candidate["task"] == task:
        columns["Candidate's embeddings"] = candidate["embedding"]
    return columns


def _score_rows(page: Page, task: str) -> list[tuple[str, list[str]]]:
    columns = _columns(page, task).values()
    rows = []
    for key, label in SCORES[task].items():
        cells = [small(scores[key]) if key in IN_LABEL_UNITS else number(scores[key]) for scores in columns]
        if key == "accuracy":
            pairs = zip(cells, columns, strict=True)
            cells = [f"{cell} ± {number(scores['accuracy_std'])}" for cell, scores in pairs]
        rows.append((label, cells))
    return rows


def _confusion(page: Page) -> dict[str, Any]:
    """Return the confusion matrix: class names, and for each actual class its counts, shares and recall."""
    actual = Counter(one.actual for one in page.predictions)
    names = largest(actual)
    place = {name: i for i, name in enumerate(names)}
    if len(names) < len(actual):
        names.append(OTHER)
    counts = [[0] * len(names) for _ in names]
    right = [0] * len(names)
    for one in page.predictions:
        row = place.get(one.actual, len(place))
        counts[row][place.get(one.predicted, len(place))] += 1
        right[row] += one.actual == one.predicted
    return {
        "names": [clipped(name) for name in names],
        "rows": [
            {
                "name": clipped(name),
                "cells": [(count, f"{count / sum(row):.3f}") for count in row],
                "total": sum(row),
                "recall": f"{hits / sum(row):.0%}",
            }
            for name, row, hits in zip(names, counts, right, strict=True)
        ],
    }


def _furthest(drifts: Iterable[Drift]) -> list[Drift]:
    return sorted(drifts, key=lambda one: (one.cosine, -one.relative_l2, one.id))[:10]


def _contact_facts(one: ContactMap) -> dict[str, Any]:
    """Return what is said of a contact map in words: how many likely contacts, and the strongest."""
    likely = [(i, j) for i, j, percent in one.pairs if percent >= 50]
    strongest = sorted(one.pairs, key=lambda pair: (-pair[2], pair))[:STRONGEST]
    return {
        "id": one.id,
        "length": len(one.sequence),
        "likely": len(likely),
        "long": sum(j - i >= LONG_RANGE for i, j in likely),
        "strongest": [
            (f"{one.sequence[i - 1]}{i}", f"{one.sequence[j - 1]}{j}", j - i, f"{percent / 100:.2f}")
            for i, j, percent in strongest
        ],
    }
