"""The page's figures, as plotly takes them: dictionaries of data and layout, without colours that depend on the theme."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from proteus_pipeline.stages.wording import SCORES, clipped, number, small

if TYPE_CHECKING:
    from proteus_pipeline.stages.contacts import ContactMap
    from proteus_pipeline.stages.drift import Drift
    from proteus_pipeline.stages.probing import Prediction

# Okabe and Ito's colours, without black: told apart by colour-blind readers, and seen on white and on near black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
# As many symbols as are no multiple of the colours, so that classes beyond the seventh get another pair.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star")
GREY = "#8A929B"
MINUS = "\N{MINUS SIGN}"
OTHER = "(other classes)"
MAX_CLASSES = 20
# More would be slow to draw as SVG; WebGL is missing on many a remote desktop, and needs eval.
MAX_POINTS = 4000
BINS = 30
# A contact map's height in pixels where there is room; the page makes it less where it is narrow.
SQUARE = 560
IN_BARS = {"accuracy", "balanced_accuracy", "macro_f1", "mcc", "r2", "spearman"}
Drawn = TypeVar("Drawn")


@dataclass(frozen=True)
class Point:
    """A protein on the map; `label` is empty where none is known."""

    id: str
    x: float
    y: float
    label: str = ""


def score_bars(task: str, columns: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return bars of the scores for which higher is better, a group for each score and a bar for each probe."""
    keys = [key for key in SCORES[task] if key in IN_BARS]
    # A score that is worse than none at all may be far below 0.
    lowest = 1.12 * min(0.0, *(scores[key] for scores in columns.values() for key in keys))
    return {
        "data": [
            {
                "type": "bar",
                "name": name,
                "orientation": "h",
                "x": [scores[key] for key in keys],
                "y": [SCORES[task][key] for key in keys],
                "text": [number(scores[key], 2) for key in keys],
                "textposition": "outside",
                "cliponaxis": False,
                "hoverinfo": "skip",
                "marker": {"color": colour},
            }
            for colour, (name, scores) in zip(COLOURS, columns.items(), strict=False)
        ],
        "layout": {
            "barmode": "group",
            "height": 60 + 28 * len(keys) * max(len(columns), 2),
            "xaxis": {"zeroline": True, "range": [lowest, 1.12]},  # with room for the numbers beside the bars
            "yaxis": {"autorange": "reversed", "showgrid": False, "ticksuffix": "  "},
        },
    }


def fit(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return held-out predictions of a regression against their labels."""
    drawn = thinned(predictions)
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


def embedding_map(
    points: Sequence[Point], answers: Mapping[str, str], task: str | None, variance: Sequence[float] = ()
) -> dict[str, Any]:
    """Return the proteins' places, coloured by label; pointing at one says its id, label and prediction.

    Parameters
    ----------
    points
        Of all proteins; where they are more than `MAX_POINTS`, some are drawn.
    answers
        What the probe predicted, by id.
    task
        The probe's; None where there was none.
    variance
        The share of all variance along either axis; none where that is not known.

    """
    shares = [f" ({share:.0%} of the variance)" for share in variance] or ["", ""]
    drawn = thinned(points)
    known = [point for point in drawn if point.label]
    unknown = [point for point in drawn if not point.label]
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
        classes = largest(Counter(point.label for point in known))
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
            "xaxis": {"title": {"text": f"PC1{shares[0]}"}},
            "yaxis": {"title": {"text": f"PC2{shares[1]}"}, "scaleanchor": "x"},
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


def drift_bars(drifts: Sequence[Drift]) -> dict[str, Any] | None:
    """Return a histogram of cosine distances; None where all are 0."""
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
                    f"{count} proteins<br>{small(low)} to {small(high)}"
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


def contact_map(one: ContactMap) -> dict[str, Any]:
    """Return a protein's contact map. ``meta`` holds the pairs: the page makes the square of them, most of which is empty."""
    ends = [0.5, len(one.sequence) + 0.5]
    axis = {"range": ends, "constrain": "domain", "title": {"text": "Residue"}, "showgrid": False, "mirror": True}
    return {
        "data": [
            {
                "type": "heatmap",
                "zmin": 0,
                "zmax": 1,
                "hoverinfo": "text",
                "hoverongaps": False,
                "meta": {"sequence": one.sequence, "pairs": [list(pair) for pair in one.pairs]},
                # Below, where it takes no width from the square.
                "colorbar": {"title": {"text": "Probability", "side": "bottom"}, "thickness": 10, "outlinewidth": 0}
                | {"orientation": "h", "x": 0.5, "y": 0, "yref": "container", "yanchor": "bottom", "len": 0.7},
            }
        ],
        "layout": {
            "height": SQUARE,
            "xaxis": axis,
            "yaxis": axis | {"range": ends[::-1], "scaleanchor": "x"},
        },
    }


def thinned(items: Sequence[Drawn]) -> list[Drawn]:
    """Return at most `MAX_POINTS` of the items, evenly spaced."""
    count = min(len(items), MAX_POINTS)
    return [items[i * len(items) // count] for i in range(count)]


def largest(counts: Mapping[str, int]) -> list[str]:
    """Return the names of the classes that are shown by themselves, sorted."""
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    return sorted(ranked if len(ranked) <= MAX_CLASSES else ranked[: MAX_CLASSES - 1])


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


def _markup(text: str, most: int = 80) -> str:
    """Escape text for plotly, which reads a subset of HTML; of the named entities it knows no quotes."""
    return html.escape(clipped(text, most), quote=False)
