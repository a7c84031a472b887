from __future__ import annotations

import base64
import json
import re
import zlib
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_pages import HOSTILE, Reader, a_page, hostile_standing, words
from plotly.offline import get_plotlyjs

from proteus_pipeline.stages import figures, standing, wording
from proteus_pipeline.stages import page as module
from proteus_pipeline.stages.drift import Drift, summarise
from proteus_pipeline.stages.figures import COLOURS, Point
from proteus_pipeline.stages.page import render
from proteus_pipeline.stages.standing import StageRun


@pytest.fixture(scope="module")
def classified():
    return a_page()


@pytest.fixture(scope="module")
def read(classified):
    return Reader(render(classified))


def test_equal_pages_give_equal_bytes(classified):
    assert render(classified) == render(a_page())
    assert render(classified) != render(replace(classified, title="Other"))


def test_it_says_what_the_result_is(classified, read):
    text = words(read)
    accuracy = classified.metrics["embedding"]["accuracy"]
    assert f"names the right class of {accuracy:.1%} of 33 proteins" in text
    assert f"amino-acid composition alone gets {classified.metrics['composition']['accuracy']:.1%}" in text
    for value in (
        "esm2@v1.0.0",
        "esm2@v1.1.0",
        "0123456789abcdef" * 2,
        f"{classified.metrics['embedding']['mcc']:.3f}",
    ):
        assert value in text


def test_the_page_loads_nothing(read):
    [policy] = [a["content"] for a in read.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert not read.all("link") + read.all("iframe") + read.all("img") + read.all("base")
    assert not [a for _, a in read.elements if "src" in a or "srcset" in a or "data" in a]
    assert all(str(a["href"]).startswith("#") for a in read.all("a"))


def test_nothing_but_plotly_itself_names_an_address(classified, read):
    [packed] = read.plotly
    assert zlib.decompress(base64.b64decode(packed)).decode() == get_plotlyjs()
    own = render(classified).replace(packed, "")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttp|import\(", own)


def test_the_page_is_small(classified):
    assert len(render(classified)) < 2_200_000


def test_the_figures_are_never_offered_to_a_cloud(classified):
    own = render(classified)
    assert 'showSendToCloud: false, plotlyServerURL: ""' in own


def test_headings_ids_and_tables_are_in_order(read):
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    ids = [a["id"] for _, a in read.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in read.all("a")} <= set(ids)
    assert {a["aria-labelledby"] for _, a in read.elements if "aria-labelledby" in a} <= set(ids)
    assert len(read.all("caption")) == len(read.all("table")) == 7
    assert all(a.get("scope") in {"col", "row"} for a in read.all("th"))
    assert read.all("html") == [{"lang": "en"}]


def test_plots_and_figures_go_together(read):
    drawn = [a["data-figure"] for a in read.all("div") if "data-figure" in a]
    assert sorted(drawn) == sorted(read.figures()) == ["contacts-0", "contacts-1", "drift", "map", "scores"]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_plotly_knows_every_property(task):
    drawn = Reader(render(a_page(task))).figures()
    always = {"scores", "map", "drift", "contacts-0", "contacts-1"}
    assert set(drawn) == always | ({"fit"} if task == "regression" else set())
    for figure in drawn.values():
        go.Figure(figure)


def test_the_map_colours_by_label_and_names_the_proteins(read):
    traces = read.figure("map")["data"]
    assert [trace["name"] for trace in traces] == ["a", "b", "c", "no label"]
    assert [trace["marker"]["color"] for trace in traces[:3]] == list(COLOURS[:3])
    assert len({trace["marker"]["symbol"] for trace in traces}) == 4
    assert traces[0]["hovertext"][0].startswith("<b>p0</b><br>a<br>predicted ")
    assert traces[3]["hovertext"][0] == "<b>p33</b><br>no label"
    assert sum(len(trace["x"]) for trace in traces) == 36


def test_the_axes_say_what_share_of_the_variance_they_hold(classified, read):
    known = Reader(render(replace(classified, variance=(0.4149, 0.2051))))
    titles = [[r.figure("map")["layout"][a]["title"]["text"] for a in ("xaxis", "yaxis")] for r in (known, read)]
    assert titles == [["PC1 (41% of the variance)", "PC2 (21% of the variance)"], ["PC1", "PC2"]]


def test_it_says_what_it_is_about_and_how_large_an_embedding_is(classified):
    page = replace(
        classified, lineage=classified.lineage | {"FASTA": "data/a.fasta"}, numbers=("Numbers a residue", 1280)
    )
    text = words(Reader(render(page)))
    assert "esm2@v1.0.0 on data/a.fasta" in text and "Numbers a residue1,280" in text


def test_only_times_that_there_are_have_columns(classified):
    now = SimpleNamespace(runs=[StageRun("embed", "run", saved_seconds=0.04)])
    assert module._times(now) == {}
    now.runs.append(StageRun("compare", "run", saved_seconds=0.4, gpu_seconds=1.0))
    assert module._times(now) == {"saved_seconds": "Time saved", "gpu_seconds": "GPU time"}


def test_it_says_which_stages_used_hits_of_other_device_classes(classified):
    now = hostile_standing()
    runs = [
        StageRun("embed", "run", other_classes={"cuda/sm_90": 4, "</bdi><img>": 1}),
        StageRun("probe", "run"),
        StageRun("compare", "unchanged", other_classes={"cpu/other": 2}),
    ]
    page = Reader(render(replace(classified, standing=replace(now, runs=runs))))
    assert "embed used hits from other device classes: 4 of cuda/sm_90, 1 of </bdi><img>. compare used" in words(page)
    assert "compare used hits from other device classes: 2 of cpu/other." in words(page)
    assert not page.all("img")
    without = render(replace(classified, standing=replace(now, runs=[StageRun("embed", "run")])))
    assert "device class" not in without


def test_a_runs_log_that_was_edited_names_no_classes():
    assert standing._run("embed", {"other_classes": ["cuda"]}).other_classes == {}
    assert standing._run("embed", {"other_classes": {"cuda/sm_90": 4}}).other_classes == {"cuda/sm_90": 4}


def test_the_confusion_matrix_counts_the_predictions(classified):
    matrix = module._confusion(classified)
    assert matrix["names"] == ["a", "b", "c"]
    pairs = [(one.actual, one.predicted) for one in classified.predictions]
    for row in matrix["rows"]:
        assert [count for count, _ in row["cells"]] == [pairs.count((row["name"], name)) for name in "abc"]


def test_many_classes_are_folded_into_one(classified):
    count = figures.MAX_CLASSES + 5
    predictions = [replace(classified.predictions[0], actual=f"c{i:02}", predicted=f"c{i:02}") for i in range(count)]
    matrix = module._confusion(replace(classified, predictions=[*predictions, predictions[0]]))
    assert len(matrix["names"]) == figures.MAX_CLASSES
    assert matrix["names"][-1] == "(other classes)"
    assert sum(row["total"] for row in matrix["rows"]) == count + 1
    assert {row["recall"] for row in matrix["rows"]} == {"100%"}


def test_regression_has_a_scatter_and_no_matrix():
    page = a_page("regression")
    read = Reader(render(page))
    assert "R²" in read.text
    assert "Which classes" not in read.text
    points = read.figure("fit")["data"][1]
    assert points["x"] == [float(one.actual) for one in page.predictions]
    assert points["y"] == [float(one.predicted) for one in page.predictions]
    assert read.figure("map")["data"][0]["marker"]["showscale"] is True


def test_without_labels_there_is_a_sentence_and_no_empty_plot(classified):
    points = [replace(point, label="") for point in classified.points]
    page = replace(
        classified, metrics={"status": "no labels"}, predictions=(), points=points, compare=None, drifts=(), contacts=()
    )
    read = Reader(render(page))
    assert "No labels were given, so nothing was predicted." in words(read)
    assert list(read.figures()) == ["map"]
    assert len(read.figure("map")["data"]) == 1
    assert "No candidate version is configured; choose one with candidate=NAME@vX.Y.Z." in words(read)


@pytest.mark.parametrize(("task", "need"), [("classification", "two classes"), ("regression", "four proteins")])
def test_too_few_labels_are_said_to_be(classified, task, need):
    metrics = {"status": "too few labels", "task": task, "labelled": 3}
    read = Reader(render(replace(classified, metrics=metrics, predictions=(), compare=None, drifts=(), contacts=())))
    assert "too few labels for a probe: 3 proteins are labelled" in words(read)
    assert need in words(read)


def test_with_nothing_to_draw_plotly_stays_out(classified):
    text = render(
        replace(
            classified, metrics={"status": "no labels"}, predictions=(), points=(), compare=None, drifts=(), contacts=()
        )
    )
    assert "A map needs at least 3 proteins; there are 0." in words(Reader(text))
    assert len(text) < 50_000


def test_left_out_classes_are_named(classified):
    read = Reader(render(replace(classified, metrics=classified.metrics | {"left_out": ["lonely", HOSTILE]})))
    assert "lonely, </script>" in words(read)


def test_versions_that_cant_be_compared_say_why(classified):
    compare = {"candidate": "other@v1.0.0", "drift": summarise([], "the versions' embeddings differ in width: 3 and 4")}
    read = Reader(render(replace(classified, compare=compare, drifts=())))
    assert (
        "other@v1.0.0 can't be compared number by number: the versions' embeddings differ in width: 3 and 4."
        in words(read)
    )
    assert "drift" not in read.figures()


def test_the_ten_that_moved_furthest_are_listed_first(classified):
    rows = module._furthest(classified.drifts)
    assert len(rows) == 10
    assert rows[0].cosine == min(one.cosine for one in classified.drifts)
    assert [one.cosine for one in rows] == sorted(one.cosine for one in rows)


def test_the_drift_histogram_counts_every_protein(read):
    assert sum(read.figure("drift")["data"][0]["y"]) == 36


def test_no_drift_is_a_sentence(classified):
    drifts = [Drift(point.id, 1.0, 0.0, 0.0) for point in classified.points]
    compare = {"candidate": "esm2@v1.1.0", "drift": summarise(drifts)}
    read = Reader(render(replace(classified, compare=compare, drifts=drifts)))
    assert "No embedding turned" in words(read)
    assert "drift" not in read.figures()


def test_hostile_names_are_text_everywhere(classified):
    page = a_page(rename=lambda name: name + HOSTILE, relabel=lambda label: label + HOSTILE)
    page = replace(page, title=HOSTILE, lineage={HOSTILE: HOSTILE})
    page = replace(page, compare=dict(page.compare or {}) | {"candidate": HOSTILE})
    text = render(page)
    read = Reader(text)
    # The same elements, with the same attributes, as with harmless names.
    harmless = Reader(render(replace(classified, lineage={"key": "value"})))
    tame = [element for element in harmless.elements if element[0] != "code"]
    assert [tag for tag, _ in read.elements if tag != "code"] == [tag for tag, _ in tame]
    assert {key for _, a in read.elements for key in a} == {key for _, a in harmless.elements for key in a}
    assert read.text.count(HOSTILE) > 100


def test_plotly_gets_no_markup_but_its_own():
    page = a_page(rename=lambda name: name + HOSTILE, relabel=lambda label: label + HOSTILE)
    drawn = Reader(render(page)).figures().values()
    shown = [text for figure in drawn for trace in figure["data"] for text in trace.get("hovertext", [])]
    shown += [trace["name"] for figure in drawn for trace in figure["data"] if "name" in trace]
    assert any("&lt;/script&gt;" in text for text in shown)
    assert {tag for text in shown for tag in re.findall(r"<[^>]*>?", text)} <= {"<b>", "</b>", "<br>"}


@given(st.text())
def test_figures_stand_inside_a_script(text):
    written = module._json({"text": text})
    assert json.loads(written) == {"text": text}
    assert not set("<>&\u2028\u2029") & set(written)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.25e-7, "1.25 \N{MULTIPLICATION SIGN} 10⁻⁷"),
        (0.0, "0.00"),
        (100.0, "100"),
        (12345.0, "1.23 \N{MULTIPLICATION SIGN} 10⁴"),
        (-0.5, "\N{MINUS SIGN}0.500"),
    ],
)
def test_small_numbers_are_legible(value, text):
    assert wording.small(value) == text


def test_large_pages_stay_small_and_say_so(classified):
    count = figures.MAX_POINTS * 3
    points = [Point(f"p{i}", float(i), 0.0) for i in range(count)]
    predictions = [replace(classified.predictions[i % 33], id=f"p{i}") for i in range(count)]
    read = Reader(render(replace(classified, points=points, predictions=predictions)))
    assert "4,000 of 12,000 proteins are drawn" in words(read)
    assert "The first 500 of 12,000 predictions" in words(read)
    drawn = read.figure("map")["data"][0]["x"]
    assert len(drawn) == figures.MAX_POINTS
    assert drawn == sorted(set(drawn))
    assert drawn[-1] > count - 4
