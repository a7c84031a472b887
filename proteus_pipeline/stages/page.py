"""The report: one HTML file that says what was computed, by which model, and how well it predicts.

The file needs no network: plotly.js and the figures' data are inside it, and its content security policy lets it load
nothing. Equal pages give equal bytes. Ids and labels are data from a FASTA header, and are escaped wherever they go:
by jinja2 in the HTML, as unicode escapes in the figures' JSON, and as entities in what plotly reads as markup.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

from proteus_pipeline.stages.drift import Drift
from proteus_pipeline.stages.probing import Prediction

# Okabe and Ito's colours, without black: told apart by colour-blind readers, and seen on white and on near black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
# As many symbols as are no multiple of the colours, so that classes beyond the seventh get another pair.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star")
GREY = "#8A929B"
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
OTHER = "(other classes)"
MAX_CLASSES = 20
MAX_ROWS = 500
# More would be slow to draw as SVG; WebGL is missing on many a remote desktop, and needs eval.
MAX_POINTS = 4000
MAX_SHOWN = 80
BINS = 30
Drawn = TypeVar("Drawn")
_DIGEST = re.compile(r"(?:[a-z0-9]+:)?[0-9a-f]{16,}")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

SCORES = {
    "classification": {
        "accuracy": "Accuracy",
        "balanced_accuracy": "Balanced accuracy",
        "macro_f1": "Macro F1",
        "mcc": "Matthews correlation",
        "log_loss": "Log loss (lower is better)",
    },
    "regression": {
        "r2": "R²",
        "spearman": "Spearman correlation",
        "mae": "Mean absolute error (lower is better)",
        "rmse": "Root mean square error (lower is better)",
    },
}
IN_BARS = {"accuracy", "balanced_accuracy", "macro_f1", "mcc", "r2", "spearman"}
IN_LABEL_UNITS = {"mae", "rmse"}


@dataclass(frozen=True)
class Point:
    """A protein on the map; `label` is empty where none is known."""

    id: str
    x: float
    y: float
    label: str = ""


@dataclass(frozen=True)
class Page:
    """What a report says.

    Attributes
    ----------
    title
        Its heading.
    lineage
        What the result came from, in the order shown: model reference, digests, recipe, FASTA, counts.
    metrics, predictions
        The probe's.
    points
        The embedding map, of all proteins.
    compare
        None where no candidate was chosen; else ``candidate`` (its reference), ``drift`` (what `drift.summarise`
        returned) and, where it was probed in the same folds, ``probe`` (its metrics).
    drifts
        Each protein's drift under the candidate.

    """

    title: str
    lineage: Mapping[str, str]
    metrics: Mapping[str, Any]
    predictions: Sequence[Prediction]
    points: Sequence[Point]
    compare: Mapping[str, Any] | None = None
    drifts: Sequence[Drift] = ()


def render(page: Page) -> str:
    """Return the page as one self-contained HTML document."""
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    template = resources.files("proteus_pipeline.stages").joinpath("page.html").read_text("utf-8")
    # Whole lines of template logic leave no blank lines behind.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    task = page.metrics.get("task") if page.metrics["status"] == "ok" else None
    possible = {
        "scores": _score_bars(page, task) if task else None,
        "fit": _fit(page) if task == "regression" else None,
        "map": _map(page, task) if len(page.points) > 2 else None,
        "drift": _drift_bars(page.drifts),
    }
    figures = {name: figure for name, figure in possible.items() if figure}
    return environment.from_string(template).render(
        page=page,
        task=task,
        finding=_finding(page, task),
        lineage=[(key, value, bool(_DIGEST.fullmatch(value))) for key, value in page.lineage.items()],
        columns=list(_columns(page, task)),
        scores=_score_rows(page, task) if task else [],
        confusion=_confusion(page) if task == "classification" else None,
        predictions=page.predictions[:MAX_ROWS],
        furthest=_furthest(page.drifts),
        figures=figures,
        figures_json={name: _json(figure) for name, figure in figures.items()},
        plotlyjs=get_plotlyjs() if figures else "",
        most=MAX_POINTS,
        number=_number,
        small=_small,
    )


def _json(value: object) -> str:
    """Return JSON that can stand inside a script element: no character of it ends the element or opens a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _markup(text: str, most: int = MAX_SHOWN) -> str:
    """Escape text for plotly, which reads a subset of HTML; of the named entities it knows no quotes."""
    return html.escape(_clipped(text, most), quote=False)


def _clipped(text: str, most: int = MAX_SHOWN) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".replace("-", MINUS)


def _small(value: float) -> str:
    """Return three significant digits, with a power of ten in place of e-07."""
    mantissa, e, exponent = f"{value:#.3g}".partition("e")
    shown = mantissa.rstrip(".").replace("-", MINUS)
    return f"{shown} {TIMES} 10{str(int(exponent)).translate(_SUPERSCRIPT)}" if e else shown


def _finding(page: Page, task: str | None) -> list[str]:
    """Return the result in sentences."""
    absent = f"Embeddings of {len(page.points):,} proteins, and no probe of what they predict: there were "
    sentences = [_probed(page, task) if task else f"{absent}{page.metrics['status']}."]
    summary = page.compare["drift"] if page.compare else {}
    if page.compare and summary["comparable"]:
        sentences.append(
            f"Under the candidate {page.compare['candidate']} the median cosine distance between a protein's two "
            f"embeddings is {_small(1 - summary['median_cosine'])}."
        )
    return sentences


def _probed(page: Page, task: str) -> str:
    metrics, gain = page.metrics, page.metrics["gain"]
    count = f"{len(page.predictions):,} proteins that it was not fitted on"
    embedding, composition = metrics["embedding"], metrics["composition"]
    if task == "regression":
        return (
            f"A linear probe on these embeddings predicts the values of {count} with R² {_number(embedding['r2'])}. "
            f"The same probe on amino-acid composition alone reaches {_number(composition['r2'])}; always naming the "
            "mean gets 0."
        )
    points = f"{abs(gain) * 100:.1f} percentage points {'less' if gain > 0 else 'more'}" if gain else "the same"
    return (
        f"A linear probe on these embeddings names the right class of {embedding['accuracy']:.1%} of {count}. "
        f"The same probe on amino-acid composition alone gets {composition['accuracy']:.1%}, {points}; always naming "
        f"the largest class gets {metrics['majority']:.1%}."
    )


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
        cells = [_small(scores[key]) if key in IN_LABEL_UNITS else _number(scores[key]) for scores in columns]
        if key == "accuracy":
            pairs = zip(cells, columns, strict=True)
            cells = [f"{cell} ± {_number(scores['accuracy_std'])}" for cell, scores in pairs]
        rows.append((label, cells))
    return rows


def _score_bars(page: Page, task: str) -> dict[str, Any]:
    keys = [key for key in SCORES[task] if key in IN_BARS]
    columns = _columns(page, task)
    return {
        "data": [
            {
                "type": "bar",
                "name": name,
                "x": [SCORES[task][key] for key in keys],
                "y": [scores[key] for key in keys],
                "text": [_number(scores[key], 2) for key in keys],
                "textposition": "outside",
                "cliponaxis": False,
                "hoverinfo": "skip",
                "marker": {"color": colour},
            }
            for colour, (name, scores) in zip(COLOURS, columns.items(), strict=False)
        ],
        "layout": {"barmode": "group", "height": 360, "xaxis": {"showgrid": False}, "yaxis": {"zeroline": True}},
    }


def _fit(page: Page) -> dict[str, Any]:
    drawn = _thinned(page.predictions)
    actual = [float(one.actual) for one in drawn]
    predicted = [float(one.predicted) for one in drawn]
    ends = [min(actual + predicted), max(actual + predicted)]
    return {
        "data": [
            {"type": "scatter", "mode": "lines", "name": "exact", "x": ends, "y": ends, "hoverinfo": "skip"}
            | {"line": {"color": GREY, "dash": "dash", "width": 1}},
            _markers("held-out prediction", actual, predicted, COLOURS[0], SYMBOLS[0])
            | {
                "hovertext": [
                    f"<b>{_markup(one.id)}</b><br>actual {_markup(one.actual)}<br>predicted {_markup(one.predicted)}"
                    for one in drawn
                ]
            },
        ],
        "layout": {
            "height": 460,
            "xaxis": {"title": {"text": "Actual"}},
            "yaxis": {"title": {"text": "Predicted, held out"}},
        },
    }


def _thinned(items: Sequence[Drawn]) -> list[Drawn]:
    """Return at most MAX_POINTS of the items, evenly spaced."""
    count = min(len(items), MAX_POINTS)
    return [items[i * len(items) // count] for i in range(count)]


def _markers(name: str, x: Sequence[float], y: Sequence[float], colour: object, symbol: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "hoverinfo": "text",
        "marker": {"color": colour, "symbol": symbol, "size": 9, "opacity": 0.85, "line": {"width": 0.6}},
    }


def _largest(counts: Mapping[str, int]) -> list[str]:
    """Return the names of the classes that are shown by themselves, sorted."""
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    return sorted(ranked if len(ranked) <= MAX_CLASSES else ranked[: MAX_CLASSES - 1])


def _map(page: Page, task: str | None) -> dict[str, Any]:
    answers = {one.id: one.predicted for one in page.predictions}
    points = _thinned(page.points)
    known = [point for point in points if point.label]
    unknown = [point for point in points if not point.label]
    traces = []
    if task == "regression":
        trace = _map_trace("labelled", known, answers, [float(point.label) for point in known], 0)
        trace["marker"] |= {
            "colorscale": [[0, COLOURS[0]], [1, COLOURS[6]]],
            "showscale": True,
            "colorbar": {"title": {"text": "label"}},
        }
        traces = [trace]
    else:
        classes = _largest(Counter(point.label for point in known))
        for place, name in enumerate(classes):
            chosen = [point for point in known if point.label == name]
            traces.append(_map_trace(name, chosen, answers, COLOURS[place % len(COLOURS)], place))
        others = [point for point in known if point.label not in set(classes)]
        if others:
            traces.append(_map_trace(OTHER, others, answers, GREY, 1))
    if unknown:
        trace = _map_trace("no label", unknown, answers, GREY if known else COLOURS[0], 0)
        if known:
            trace["marker"] |= {"symbol": "x-thin-open", "line": {"width": 1.5}}
        traces.append(trace)
    return {
        "data": traces,
        "layout": {
            "height": 520 + 8 * len(traces),  # the legend grows below
            "showlegend": len(traces) > 1,
            "xaxis": {"title": {"text": "First principal component"}},
            "yaxis": {"title": {"text": "Second principal component"}, "scaleanchor": "x"},
        },
    }


def _map_trace(
    name: str, points: Sequence[Point], answers: Mapping[str, str], colour: object, symbol: int
) -> dict[str, Any]:
    xs, ys = [point.x for point in points], [point.y for point in points]
    trace = _markers(_markup(name, most=32), xs, ys, colour, SYMBOLS[symbol % len(SYMBOLS)])
    trace["hovertext"] = [
        f"<b>{_markup(point.id)}</b>"
        + (f"<br>{_markup(point.label)}" if point.label else "<br>no label")
        + (f"<br>predicted {_markup(answers[point.id])}" if point.id in answers else "")
        for point in points
    ]
    return trace


def _confusion(page: Page) -> dict[str, Any]:
    """Return the confusion matrix: class names, and for each actual class its counts, shares and recall."""
    actual = Counter(one.actual for one in page.predictions)
    names = _largest(actual)
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
        "names": [_clipped(name) for name in names],
        "rows": [
            {
                "name": _clipped(name),
                "cells": [(count, f"{count / sum(row):.3f}") for count in row],
                "total": sum(row),
                "recall": f"{hits / sum(row):.0%}",
            }
            for name, row, hits in zip(names, counts, right, strict=True)
        ],
    }


def _furthest(drifts: Iterable[Drift]) -> list[Drift]:
    return sorted(drifts, key=lambda one: (one.cosine, -one.relative_l2, one.id))[:10]


def _drift_bars(drifts: Sequence[Drift]) -> dict[str, Any] | None:
    import numpy as np

    distances = np.asarray([max(0.0, 1.0 - one.cosine) for one in drifts])
    if not len(distances) or distances.max() == 0:
        return None
    counts, edges = np.histogram(distances, bins=BINS, range=(0.0, float(distances.max())))
    return {
        "data": [
            {
                "type": "bar",
                "x": ((edges[:-1] + edges[1:]) / 2).tolist(),
                "y": counts.tolist(),
                "width": np.diff(edges).tolist(),
                "hoverinfo": "text",
                "hovertext": [
                    f"{count} proteins<br>{_small(low)} to {_small(high)}"
                    for count, low, high in zip(counts.tolist(), edges.tolist(), edges[1:].tolist(), strict=False)
                ],
                "marker": {"color": COLOURS[0], "line": {"width": 0.6}},
            }
        ],
        "layout": {
            "height": 320,
            "showlegend": False,
            "bargap": 0,
            "xaxis": {"title": {"text": f"Cosine distance (1 {MINUS} cosine similarity)"}, "exponentformat": "power"},
            "yaxis": {"title": {"text": "Proteins"}},
        },
    }
