"""Pages for tests, and a reader that takes one as a browser would."""

from __future__ import annotations

import html.parser
import json

import numpy as np

from proteus_pipeline.stages import standing
from proteus_pipeline.stages.contacts import ContactMap
from proteus_pipeline.stages.drift import drift, summarise
from proteus_pipeline.stages.figures import Point
from proteus_pipeline.stages.page import Page
from proteus_pipeline.stages.probing import ProbeSettings, probe
from proteus_pipeline.stages.projection import project

HOSTILE = (
    """</script><script>alert("x")</script><img src=x onerror='alert(1)'>&amp;<!--{{ 7 * 7 }}<a href="http://x">"""
)


class Reader(html.parser.HTMLParser):
    """A page as a browser would take it: its elements, its text outside scripts, and its scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.inside: dict[str, str | None] | None = None
        self.skipping = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.inside = dict(attrs)
            self.scripts.append((self.inside, ""))
        self.skipping = tag == "style"

    def handle_endtag(self, tag):
        if tag == "script":
            self.inside = None
        if tag == "style":
            self.skipping = False

    def handle_data(self, data):
        if self.inside is not None:
            self.scripts[-1] = (self.inside, self.scripts[-1][1] + data)
        elif not self.skipping:
            self.text += data

    def figure(self, name):
        [text] = [text for attributes, text in self.scripts if attributes.get("id") == f"figure-{name}"]
        return json.loads(text)

    def figures(self):
        drawn = {str(a["id"]): text for a, text in self.scripts if a.get("type") == "application/json"}
        return {name.removeprefix("figure-"): json.loads(text) for name, text in drawn.items()}

    @property
    def plotly(self):
        return [text.strip() for attributes, text in self.scripts if attributes.get("id") == "plotly"]

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def words(reader):
    return " ".join(reader.text.split())


def a_page(task="classification", rename=str, relabel=str):
    rng = np.random.default_rng(0)
    ids = [rename(f"p{i}") for i in range(36)]
    vectors = rng.normal(size=(36, 6)).astype(np.float32)
    vectors[:, 0] += np.arange(36) % 3 * 2
    texts = ["".join(row) for row in rng.choice(list("ACDEFGHIKL"), (36, 20))]
    labels = [relabel("abc"[i % 3]) if task == "classification" else str(i / 4) for i in range(36)]
    result = probe(ids, vectors, texts, dict(zip(ids[:33], labels, strict=False)), {}, ProbeSettings())
    other = vectors + rng.normal(size=vectors.shape) * 0.01
    drifts = drift(ids, list(vectors), list(other))
    return Page(
        title="Locations",
        model="esm2@v1.0.0",
        lineage={"Model": "esm2@v1.0.0", "Trunk digest": "0123456789abcdef" * 2},
        metrics=result.metrics,
        predictions=result.predictions,
        points=[
            Point(name, float(x), float(y), label if i < 33 else "")
            for i, (name, label, (x, y)) in enumerate(zip(ids, labels, project(vectors), strict=True))
        ],
        compare={"candidate": "esm2@v1.1.0", "drift": summarise(drifts), "probe": result.metrics},
        drifts=drifts,
        contacts=[ContactMap(ids[0], texts[0], ((1, 9, 80), (2, 20, 7))), ContactMap(ids[1], texts[1], ())],
    )


def hostile_standing() -> standing.Standing:
    moment = standing.Moment("2026-01-31 18:00:00", HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    recipe = dict.fromkeys(("layer", "pooling", "precision", "numerics", "stored", "trunk"), HOSTILE)
    missed = {"id": HOSTILE, "differs": [HOSTILE], "nearest": recipe, "detail": HOSTILE}
    counts = dict.fromkeys(("sequences", "unique", "hits", "derived", "computed"), 1)
    stats = dict.fromkeys(("entries", "segments", "bytes", "raw_bytes", "hits", "derived", "misses"), 1)
    run = standing.StageRun(
        HOSTILE,
        "run",
        counts,
        device_class=HOSTILE,
        misses={HOSTILE: 1},
        missed=[missed, {"id": 5}],
        other_classes={HOSTILE: 1},
    )
    row = standing.VersionRow(HOSTILE, True, HOSTILE, HOSTILE, HOSTILE, HOSTILE, None, HOSTILE)
    return standing.Standing(
        HOSTILE, True, HOSTILE, 1.0, {HOSTILE: HOSTILE}, [run],
        [standing.ModelHistory(HOSTILE, HOSTILE, [row], 1, [moment], 1)], [(HOSTILE, HOSTILE)],
        standing.CacheState(stats, 5, HOSTILE, [(recipe, HOSTILE, 1, 1, HOSTILE)], 1, [moment]),
    )  # fmt: skip
