"""The report as a browser shows it: offline, in both themes, on a wide screen and on a telephone."""

from __future__ import annotations

import itertools
import json

import pytest

from gatework.bench import figures
from gatework.bench.comparison import Comparison, finished

pytestmark = pytest.mark.browser

WIDE, NARROW = 1280, 390
COLOURS = [f"c{i}" for i in range(figures.COLOURS)]


@pytest.fixture(scope="module")
def comparison(synthetic):
    return Comparison(*synthetic.build())


@pytest.fixture(scope="module")
def page(comparison, tmp_path_factory):
    return comparison.report(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def browser(screenshot, tmp_path_factory):
    pytest.importorskip("selenium", reason="browser tests need selenium: pip install selenium")
    try:
        screenshot.installed()
    except FileNotFoundError:
        pytest.skip("browser tests need Chromium and its driver: apt-get install chromium chromium-driver")
    browser = screenshot.driver(profile=str(tmp_path_factory.mktemp("profile")))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def show(browser, screenshot, page):
    """Open a page in some width and theme, its logs emptied before. A page that no test has touched is used again."""
    opened = []

    def show(path=page, width=WIDE, theme="light", touched=False):
        if opened != [(path, width, theme)]:
            browser.get("about:blank")
            for log in ("browser", "performance"):
                browser.get_log(log)
            features = [{"name": "prefers-color-scheme", "value": theme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            metrics = {"width": width, "height": 1400, "deviceScaleFactor": 1, "mobile": width < 700}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            screenshot.open_report(browser, path)
        opened[:] = [] if touched else [(path, width, theme)]
        return browser

    return show


def severe(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def requested(browser):
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}


def points(browser, plot):
    """How many marks each trace of a plot has, in the order of the traces that have any."""
    script = "return [...document.querySelectorAll(`#${arguments[0]} .trace`)].map(t => t.querySelectorAll('.point').length)"
    return [n for n in browser.execute_script(script, plot) if n]


def rgb(browser, text):
    """A colour in any notation of CSS as red, green, blue and opacity."""
    script = """
      const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
      context.fillStyle = arguments[0]; context.fillRect(0, 0, 1, 1);
      return [...context.getImageData(0, 0, 1, 1).data];
    """
    return browser.execute_script(script, text)


def contrast(one, other):
    """WCAG's ratio of two colours."""

    def luminance(colour):
        linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


# Offline and whole


def test_opens_from_a_file_without_a_network(show, page):
    browser = show(touched=True)
    assert severe(browser) == []
    urls = requested(browser)
    assert {url.partition(":")[0] for url in urls} <= {"file", "data", "blob"}
    assert [url for url in urls if url.startswith("file:")] == [page.as_uri()]
    assert browser.title == "shakespeare · gatework"


def test_the_network_is_seen_when_there_is_some(show, tmp_path):
    # The test above would pass with a log that records nothing.
    (tmp_path / "bad.html").write_text(
        "<html data-drawn='true'><img src='http://example.invalid/x.png'><script>console.error('seen')</script></html>"
    )
    browser = show(tmp_path / "bad.html")
    assert any("seen" in message for message in severe(browser))
    assert "http://example.invalid/x.png" in requested(browser)


def test_every_plot_is_drawn(show, comparison):
    browser = show()
    groups = (figures.quality, figures.curves, figures.lengths, figures.tuning, figures.routing, figures.inside)
    wanted = [figure.id for group in groups for figure in group(comparison)]
    assert browser.execute_script("return [...document.querySelectorAll('.plot')].map(p => p.id)") == wanted
    assert browser.execute_script("return [...document.querySelectorAll('.plot')].every(p => p.querySelector('svg.main-svg'))")


def test_quality_has_a_mark_for_every_run_and_mean(show, comparison):
    browser = show()
    runs = [len(row.scores) for row in comparison.rows]
    for plot in ("pareto-flops", "pareto-seconds", "pareto-parameters"):
        assert points(browser, plot) == [n for count in runs for n in (count, 1)]
        assert browser.execute_script(f"return document.querySelectorAll('#{plot} .errorbar').length") == len(comparison.rows)
    front = "return document.querySelectorAll('#pareto-flops .scatterlayer .js-line').length"
    assert browser.execute_script(front) == 1


def test_curves_have_a_mark_for_every_measurement(show, comparison):
    browser = show()
    for plot in ("curve-tokens", "curve-seconds"):
        click = f"document.querySelector('button[data-figure={plot}]').click()"
        browser.execute_script(click)
        broken = len(next(r for r in comparison.records if r["key"] == "final/moe/seed2")["curve"])
        drawn = points(browser, plot)
        assert sorted(drawn) == sorted([12] * 6 + [broken])
        fills = f"return document.querySelectorAll('#{plot} .js-fill').length"
        assert browser.execute_script(fills) == 6
        browser.execute_script(click)


def test_scores_against_length_have_a_mark_and_a_bar_for_every_length(show, comparison):
    browser = show()
    assert points(browser, "length-loss") == [3] * len(comparison.names)
    assert browser.execute_script("return document.querySelectorAll('#length-loss .errorbar').length") == 3 * len(comparison.names)


def test_tuning_and_bars(show, comparison):
    browser = show()
    done = [sum(finished(r) for r in comparison.runs(name, "tune")) for name in comparison.names]
    # Lines, a ring round the chosen trial, a cross for the one that broke.
    assert sorted(points(browser, "tune-rate")) == sorted([*done, *[1] * len(done), 1])
    assert points(browser, "tune-trials") == [4] * 6
    assert points(browser, "inside-0") == [8, 8, 8]
    assert points(browser, "inside-2") == [3]


# Toggles


def test_the_button_shows_the_whole_run_and_back(show):
    browser = show()
    button = "document.querySelector('button[data-figure=curve-tokens]')"
    span = "return document.getElementById('curve-tokens')._fullLayout.xaxis.range"
    half = browser.execute_script(span)
    assert half[0] > 0.4 * 2e6
    assert browser.execute_script(f"{button}.click(); return {button}.textContent") == "Second half"
    whole = browser.execute_script(span)
    assert whole[0] <= 33_334
    assert whole[1] >= 2e6
    assert browser.execute_script(f"{button}.click(); return {button}.textContent") == "Whole run"
    assert browser.execute_script(span) == half


def visible(browser):
    """Which variants the plots show, plot by plot, and which the legends say are shown."""
    script = """
      const seen = (traces) => [...new Set(traces.filter(t => t.visible && t.legendgroup).map(t => t.legendgroup))];
      const buttons = [...document.querySelectorAll("#curves button[data-variant]")];
      return [[...document.querySelectorAll("#quality .plot, #curves .plot, #tuning .plot")].map(p => seen(p._fullData)),
              buttons.filter(b => b.getAttribute("aria-pressed") === "true").map(b => b.dataset.variant)];
    """
    plots, pressed = browser.execute_script(script)
    assert len(plots) == 7
    assert all(sorted(names) == sorted(pressed) for names in plots)
    return pressed


def test_a_legend_hides_a_variant_in_all_plots(show, comparison):
    browser = show(touched=True)
    press = "document.querySelector(`#tuning button[data-variant=${arguments[0]}]`).click()"
    assert visible(browser) == comparison.names
    browser.execute_script(press, "wide")
    assert visible(browser) == ["baseline", "gated", "moe", "gla", "skip"]
    assert len(points(browser, "tune-trials")) == 5
    browser.execute_script(press, "wide")
    assert visible(browser) == comparison.names
    for _ in range(2):
        alone = "document.querySelector('#quality button[data-variant=gla]').dispatchEvent(new MouseEvent('dblclick'))"
        browser.execute_script(alone)
        assert visible(browser) in (["gla"], comparison.names)
    assert visible(browser) == comparison.names


def test_no_button_covers_the_plots_without_a_mouse(show):
    assert show().execute_script("return document.querySelectorAll('.modebar-btn').length") == 0


def test_no_button_uploads(show):
    browser = show(touched=True)
    mouse = "const real = matchMedia; window.matchMedia = (q) => q === '(hover: hover)' ? {matches: true} : real(q)"
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": mouse})
    titles = show(touched=True).execute_script(
        "return [...document.querySelectorAll('#pareto-flops .modebar-btn')].map(b => b.dataset.title)"
    )
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    assert "Reset axes" in titles
    assert not any(word in title.lower() for title in titles for word in ("share", "cloud", "studio", "edit"))


def test_details_open(show):
    browser = show()
    read = "d => { d.open = true; const text = d.innerText; d.open = false; return text }"
    shown = browser.execute_script(f"return [...document.querySelectorAll('#configurations details')].map({read})")
    assert len(shown) == 7
    assert '"mixer": "gla"' in shown[4]
    assert "Differs from the baseline in" in shown[4]


# Themes


@pytest.mark.parametrize("theme", ["light", "dark"], scope="module")
def test_all_text_is_readable(show, theme):
    browser = show(theme=theme)
    script = """
      const found = {};
      const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      for (const d of document.querySelectorAll("details")) d.open = true;
      while (walker.nextNode()) {
        const element = walker.currentNode.parentElement, box = element.getBoundingClientRect();
        const skipped = element.closest("script, style, noscript, .glyph, .hoverlayer");
        if (!walker.currentNode.data.trim() || !box.width || skipped) continue;
        const style = getComputedStyle(element);
        const behind = [];
        for (let e = element; e; e = e.parentElement) behind.push(getComputedStyle(e).backgroundColor);
        const ink = element.closest("svg") ? style.fill : style.color;
        const key = JSON.stringify([ink, behind.filter((c, i, all) => i == 0 || c != all[i - 1])]);
        if (!(key in found)) found[key] = walker.currentNode.data.trim().slice(0, 40);
      }
      for (const d of document.querySelectorAll("details")) d.open = false;
      return Object.entries(found).map(([key, text]) => [...JSON.parse(key), text]);
    """
    seen = browser.execute_script(script)
    assert len(seen) > 8
    for ink, behind, text in seen:
        ground = [255.0, 255.0, 255.0]
        for layer in reversed(behind):
            *over, alpha = rgb(browser, layer)
            if alpha:
                # The canvas stores colours premultiplied and rounded; read the opacity back from it.
                ground = [o * alpha / 255 + g * (1 - alpha / 255) for o, g in zip(over, ground, strict=True)]
        assert contrast(rgb(browser, ink), ground) >= 4.5, (theme, text, ink, ground)


@pytest.mark.parametrize("theme", ["light", "dark"], scope="module")
def test_all_marks_are_visible(show, theme):
    browser = show(theme=theme)
    variable = "return getComputedStyle(document.documentElement).getPropertyValue('--' + arguments[0]).trim()"
    surface = rgb(browser, browser.execute_script(variable, "surface"))
    colours = {name: rgb(browser, browser.execute_script(variable, name)) for name in COLOURS}
    assert {name for name, colour in colours.items() if contrast(colour, surface) < 3} == set()
    assert len({tuple(c) for c in colours.values()}) == len(COLOURS)
    # The plots took the theme's colours.
    fill = "return getComputedStyle(document.querySelectorAll('#pareto-seconds .trace .point')[6]).fill"
    assert rgb(browser, browser.execute_script(fill)) == colours["c1"]


def test_the_theme_changes_while_the_page_is_open(show):
    browser = show(theme="light", touched=True)
    fill = "return getComputedStyle(document.querySelector('#pareto-seconds .trace .point')).fill"
    before = browser.execute_script(fill)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    script = """
      const done = arguments[arguments.length - 1];
      const fill = () => getComputedStyle(document.querySelector("#pareto-seconds .trace .point")).fill;
      const wait = (left) => fill() !== arguments[0] || !left ? done(fill()) : setTimeout(() => wait(left - 1), 50);
      wait(60);
    """
    assert browser.execute_async_script(script, before) != before


# Space


@pytest.mark.parametrize("width", [WIDE, 820, NARROW], scope="module")
def test_the_page_does_not_scroll_sideways(show, width):
    browser = show(width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    script = """
      return [...document.querySelectorAll("main *, header *")].filter(e => !e.closest(".scroll, pre, nav, svg, .svg-container")
        && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80));
    """
    assert browser.execute_script(script) == []


def test_the_tables_fit_a_wide_screen(show):
    browser = show()
    # A variant's symbol and its short name stay on one line.
    height = "return [...document.querySelectorAll('#cost tbody th')].map(th => { const text = document.createRange(); "
    height += "text.selectNodeContents(th); return text.getBoundingClientRect().height })"
    assert max(browser.execute_script(height)) < 30
    script = "return [...document.querySelectorAll('#verdict .scroll, #cost .scroll')].map(e => [e.scrollWidth, e.clientWidth])"
    assert all(needed <= there for needed, there in browser.execute_script(script))


@pytest.mark.parametrize("width", [NARROW], scope="module")
def test_the_verdicts_are_in_sight_on_a_telephone(show, comparison, width):
    browser = show(width=width)
    script = "return [...document.querySelectorAll('#verdict .badge')].map(b => [b.textContent, b.getBoundingClientRect().right])"
    badges = browser.execute_script(script)
    words = [comparison.verdicts[name].word if name in comparison.verdicts else "baseline" for name in comparison.names]
    assert [text.strip("▲▼ ") for text, _ in badges] == words
    assert all(right < width for _, right in badges)


@pytest.mark.parametrize("width", [WIDE, NARROW], scope="module")
def test_labels_do_not_overlap(show, width):
    browser = show(width=width)
    script = """
      const boxes = (plot, selector) => [...plot.querySelectorAll(selector)].map(e => {
        const b = e.getBoundingClientRect(); return [e.textContent, b.left, b.top, b.right, b.bottom] });
      const labels = ".xtick text, .xtitle, .legendtext, .ytick text, .ytitle";
      return [...document.querySelectorAll(".plot")].map(plot => [plot.id, boxes(plot, labels),
        (({left, top, right, bottom}) => [left, top, right, bottom])(plot.getBoundingClientRect())]);
    """
    for plot, boxes, (left, top, right, bottom) in browser.execute_script(script):
        assert len(boxes) > 4, plot
        for text, x0, y0, x1, y1 in boxes:
            assert left - 1 <= x0 and x1 <= right + 1 and top - 1 <= y0 and y1 <= bottom + 1, (plot, text, "clipped")  # noqa: PT018
        for (one, a0, b0, a1, b1), (other, c0, d0, c1, d1) in itertools.combinations(boxes, 2):
            apart = a1 <= c0 + 1 or c1 <= a0 + 1 or b1 <= d0 + 2 or d1 <= b0 + 2
            assert apart, (plot, one, other)


def test_many_long_names(show, synthetic, tmp_path):
    names = [f"{'variant' if i % 2 else 'a_name_that_is_far_too_long_for_any_table_' * 2}{i}" for i in range(14)]
    path = Comparison(*synthetic.small({name: [1.0, 1.0 + i / 50, 1.1] for i, name in enumerate(names)})).report(tmp_path)
    for width in (WIDE, NARROW):
        browser = show(path, width=width)
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
        heights = "return [...document.querySelectorAll('.plot')].map(p => p._fullLayout.yaxis._length)"
        assert min(browser.execute_script(heights)) > 200  # No legend eats the plot.
        table = "return document.querySelector('#verdict table').scrollWidth"
        assert width == NARROW or browser.execute_script(table) <= 1192
        badges = "return [...document.querySelectorAll('#verdict .badge')].map(b => b.getBoundingClientRect().right)"
        assert max(browser.execute_script(badges)) < width


# Names that mean harm


def test_a_hostile_name_is_text(show, hostile, tmp_path):
    name, *study = hostile
    browser = show(Comparison(*study).report(tmp_path))
    assert severe(browser) == []
    assert browser.execute_script("return document.querySelectorAll('img, main script').length") == 0
    assert browser.execute_script("return document.querySelector('h1').textContent") == study[0]["name"]
    legends = browser.execute_script("return [...document.querySelectorAll('#tuning .legend button')].map(b => b.innerText)")
    assert any(text.endswith(name) for text in legends)
    browser.execute_script("Plotly.Fx.hover('tune-trials', [{curveNumber: 2, pointNumber: 0}])")
    assert name in browser.execute_script("return document.querySelector('#tune-trials .hoverlayer').textContent")
    assert name in browser.execute_script("return document.querySelector('#verdict table').textContent")


# Odd studies


def test_one_seed_without_tuning(show, synthetic, tmp_path):
    path = Comparison(*synthetic.small({"base": [1.0], "a": [0.9], "b": [None]})).report(tmp_path)
    browser = show(path)
    assert severe(browser) == []
    assert "not told apart" in browser.execute_script("return document.querySelector('#verdict table').innerText")
    assert points(browser, "pareto-flops") == [1, 1, 1, 1]
    assert browser.execute_script("return document.querySelector('nav').textContent.includes('Tuning')") is False


def test_a_study_that_has_not_begun(show, synthetic, tmp_path):
    study, _ = synthetic.build()
    browser = show(Comparison(study, []).report(tmp_path))
    assert severe(browser) == []
    assert "4 seeds not run" in browser.execute_script("return document.querySelector('#verdict').innerText")
