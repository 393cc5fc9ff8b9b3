"""The report page in a real browser, without a network. A test looks at all that one open page can show."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from report_samples import write_rewards, write_run, write_samples, write_suspects, write_sweep, write_verdict

from offline_kto.kto_core.losses.preference_losses import kto_losses
from offline_kto.train.report.report import write_report

pytestmark = pytest.mark.browser

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PAGES = ("run", "sweep", "several")
NARROW, WIDE = 360, 1600


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on the PATH to open the page with")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    run, sweep = write_run(root / "runs" / "first"), write_sweep(root / "sweeps" / "search", trials=32)
    write_verdict(run)
    write_samples(run, {"Who is it?": "It is me. " * 40, "What?": "A very-" + "long" * 80})
    rows = [
        {"kind": "duplicate", "place": f"feedback.jsonl:{i}", "label": "desirable", "reward": "0.5"} for i in range(3)
    ]
    write_suspects(run, [{**row, "prompt": "p " * 200, "completion": "c" * 300} for row in rows])
    other = write_run(root / "runs" / "second", seed=1, gain=1.5)
    short = write_sweep(root / "sweeps" / "short", trials=8)
    return {
        "run": write_report([run]),
        "sweep": write_report([sweep]),
        "several": write_report([run, other, short], root / "several.html"),
    }


@pytest.fixture
def visit(chromium):
    """Open a file; after the test, the page must have said, asked for and broken nothing."""
    contexts, problems = [], []

    def visit(path, *, width=1200, scheme="light"):
        context = chromium.new_context(offline=True, viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: _allowed(request.url, path) or problems.append(f"request: {request.url}"))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert problems == []


def _allowed(url, path):
    return url.startswith("data:") or url.split("#")[0] == path.as_uri()


def open_all(page):
    for kind in ("part", "fold"):
        closed = page.locator(f"details.{kind}:not([open]) > summary")
        while closed.count():
            closed.first.click()
    page.wait_for_timeout(100)  # for the observer of widths


UNDRAWN = """() => [...document.querySelectorAll('.plot')].filter((div) => div.checkVisibility()
    && !(div.clientHeight > 50 && div.querySelector(':scope > svg :is(path, .bar, .dot, circle)'))).map((div) => div.ariaLabel)"""

# Pairs of texts of one plot that overlap, and texts beyond its edge.
COLLISIONS = """() => [...document.querySelectorAll('.plot > svg')].filter((svg) => svg.checkVisibility()).flatMap((svg) => {
  const edge = svg.getBoundingClientRect(), found = [];
  const texts = [...svg.querySelectorAll('text:not(.on-top)')].map((text) => [text.firstChild.data, text.getBoundingClientRect()]);
  texts.forEach(([text, box], i) => {
    if (box.left < edge.left - 1 || box.right > edge.right + 1 || box.bottom > edge.bottom + 1) found.push(`${text} sticks out`);
    for (const [other, its] of texts.slice(i + 1)) {
      const [x, y] = [['left', 'right'], ['top', 'bottom']].map(([a, b]) => Math.min(box[b], its[b]) - Math.max(box[a], its[a]));
      if (x > 0.5 && y > 2) found.push(`${text} on ${other}`);
    }
  });
  return found;
})"""


def assert_panes_are_drawn(page):
    """Also those behind a switch; each switch shows one pane at a time."""
    assert page.evaluate(UNDRAWN) == []
    for box in page.locator(".switch").all():
        for label in box.locator("label").all():
            label.click()
            page.wait_for_timeout(50)
            assert page.evaluate(UNDRAWN) == [], label.inner_text()
            assert box.locator(".pane:visible").count() == 1, label.inner_text()


def assert_no_sideways_scroll(page):
    """Check the page as it was opened, and after the window has changed to the other width."""
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": NARROW + WIDE - width, "height": 900})
    page.wait_for_function("() => document.documentElement.scrollWidth <= innerWidth", timeout=5000)


GROUPS = [
    {"by": by, "group": group, "rows": 29, "accuracy": 0.9123, "accuracy_low": 0.81, "accuracy_high": 0.98}
    | {"accuracy_before": 0.5, "margin": 0.4567, "margin_low": -0.123, "margin_high": 1.234, "margin_before": -0.001234}
    | {"loss": 0.4321, "loss_before": 0.5}
    for by, group in (
        ("prompt length", "1,234 to 12,345 tokens"),
        ("class", "desirable"),
        ("class", "undesirable"),
        ("source file", "a/long/path/to/a/folder/of/feedback-of-november.jsonl"),
    )
]

# Cells of tables of groups that are beyond the window's edge or that their table cuts off.
CUT_OFF = """() => [...document.querySelectorAll("[aria-label=Groups] :is(td, tbody th)")].filter((cell) =>
  cell.getBoundingClientRect().right > innerWidth - 10 || cell.scrollWidth > cell.clientWidth + 1).map((cell) => cell.textContent)"""


@pytest.mark.parametrize("width", [NARROW, 768, 900, 1280])
def test_all_columns_of_groups_can_be_seen(width, tmp_path, visit):
    folder = write_run(tmp_path / "run")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps({**evaluation, "groups": GROUPS}))
    page = visit(write_report([folder]), width=width)
    assert page.locator("[aria-label=Groups] td").count() == 16
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    tops = page.locator(".by-group").evaluate_all("(all) => all.map((one) => one.getBoundingClientRect().top)")
    assert len(set(tops)) == 3
    shown = page.locator("[aria-label=Groups] td").evaluate_all(
        "(all) => all.map((td) => getComputedStyle(td, '::before').content)"
    )
    assert shown[:4] == (['"rows"', '"accuracy"', '"margin"', '"loss"'] if width < 860 else ["none"] * 4)


@pytest.mark.slow
def test_long_names_of_parameters_fit_a_narrow_screen(tmp_path, visit):
    folder = write_sweep(tmp_path / "sweep", trials=8)
    names = {"beta": "objective.helpful", "loss": "objective.harmlessness-and-honesty"}
    text = (folder / "sweep.json").read_text()
    for name, long in names.items():
        text = text.replace(f'"{name}":', f'"{long}":')
    (folder / "sweep.json").write_text(text)
    page = visit(write_report([folder]), width=NARROW)
    assert page.locator("meter").count() == 4
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW
    assert page.evaluate(COLLISIONS) == []


CONTRASTS = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const rgba = channels(getComputedStyle(e).backgroundColor);
      if (rgba.length === 3 || rgba[3] === 1) return rgba;
    }
    return [255, 255, 255];
  };
  const found = {};
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || ['SCRIPT', 'STYLE', 'OPTION'].includes(element.tagName) || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const colour = channels(element.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(colour), light(behind(element.closest('svg') ? element.closest('.plot') : element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const key = `${element.tagName} ${element.getAttribute('class') || ''}`;
    found[key] = Math.min(found[key] ?? 99, ratio);
  }
  return found;
}"""


def assert_text_can_be_read(page):
    found = page.evaluate(CONTRASTS)
    assert len(found) > 25
    assert {key: ratio for key, ratio in found.items() if ratio < 4.5} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_light_page_on_a_wide_screen(name, pages, visit):
    """All is drawn, nothing scrolls sideways, and the text can be read: in light, in dark and in light again."""
    page = visit(pages[name], width=WIDE)
    open_all(page)
    assert page.evaluate(UNDRAWN) == []
    grounds = []
    for scheme in ("light", "dark", "light"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(300)
        assert_text_can_be_read(page)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] == grounds[2] != grounds[1]
    assert page.evaluate(COLLISIONS) == []
    assert_no_sideways_scroll(page)
    assert_panes_are_drawn(page)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_dark_page_on_a_narrow_screen(name, pages, visit):
    """All is drawn and nothing scrolls sideways; paper gets light colours and every part."""
    page = visit(pages[name], width=NARROW, scheme="dark")
    assert page.evaluate(UNDRAWN) == []
    assert (page.locator("details.part:not([open])").count() > 0) == (name == "several")
    ground = "getComputedStyle(document.documentElement).getPropertyValue('--page')"
    dark = page.evaluate(ground)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(ground) != dark
    assert page.locator("details.part:not([open])").count() == 0
    assert page.evaluate(UNDRAWN) == []
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(ground) == dark
    assert page.evaluate(COLLISIONS) == []
    assert_text_can_be_read(page)
    assert page.evaluate(UNDRAWN) == []
    assert_no_sideways_scroll(page)
    assert_panes_are_drawn(page)


def slide(page, **values):
    page.evaluate(
        """(values) => { const form = document.querySelector('#panel form');
        for (const [name, value] of Object.entries(values)) form[name].value = value;
        form.dispatchEvent(new Event('input')); }""",
        values,
    )
    # Drawn in the next frame; the second one is after it.
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def panel_numbers(page):
    texts = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('#panel output')].map((o) => [o.dataset.of, o.textContent]))"
    )
    return {name: float(text.replace("\u2212", "-").replace(",", "")) for name, text in texts.items()}


def panel_curves(page):
    lines = "[...document.querySelectorAll('[data-panel]')].flatMap((div) => div.figure.marks).filter((m) => m.kind === 'line')"
    return page.evaluate(f"{lines}.map((line) => [line.x, line.y])")


def exact(r, z0, beta, weight, *, desirable):
    """Value, loss and d loss / d r by kto_losses and autograd."""
    logratios = torch.tensor(r, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.full((len(r),), desirable), torch.full((len(r),), weight, dtype=torch.float64)
    losses = kto_losses(logratios, labels, torch.tensor(z0, dtype=torch.float64), beta=beta, weights=weights)
    losses.sum().backward()
    return (weights - losses).detach().numpy(), losses.detach().numpy(), logratios.grad.numpy()


def assert_panel_begins_with(folder, page):
    """The numbers of the run, until a slider moves, and again after the reset."""
    kl = json.loads((folder / "evaluation.json").read_text())["metrics"]["kl"]["value"]
    begin = panel_numbers(page)
    assert (begin["beta"], begin["desirable"], begin["undesirable"]) == (0.1, 1.0, 1.33)
    assert begin["z0"] == pytest.approx(kl, rel=1e-3)
    slide(page, r=9, beta=-1.5)
    assert panel_numbers(page) != begin
    page.locator("#panel .reset").click()
    assert panel_numbers(page) == begin
    page.locator("#panel input[name=r]").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(100)
    assert panel_numbers(page)["r"] > begin["r"]


def assert_panel_computes_the_loss(page, side, r, z0, beta, weight):
    case = f"{side}: r={r} z0={z0} beta={beta} weight={weight}"
    page.locator("#panel .reset").click()
    before = panel_curves(page)
    page.locator("#panel .segments label", has_text=side).filter(has=page.locator(f"input[value={side}]")).click()
    slide(page, r=r, z0=z0, beta=float(np.log10(beta)), **{side: weight})
    shown = panel_numbers(page)
    assert (shown["r"], shown["z0"], shown[side]) == pytest.approx((r, z0, weight), rel=1e-3), case
    assert shown["beta"] == pytest.approx(beta, rel=1e-3), case
    expected = exact([r], z0, beta, weight, desirable=side == "desirable")
    for name, value in zip(("value", "loss", "gradient"), expected, strict=True):
        assert shown[name] == pytest.approx(value[0], rel=6e-4), f"{case}: {name}"
    after = panel_curves(page)
    assert after != before, case
    for (x, y), curve in zip(after, exact(after[0][0], z0, beta, weight, desirable=side == "desirable"), strict=True):
        assert x == after[0][0], case
        np.testing.assert_allclose(y, curve, rtol=1e-9, atol=1e-15, err_msg=case)


def assert_panel_counts_the_saturated(rows, page):
    page.locator("#panel .reset").click()
    for z0, beta in ((0.0, 0.1), (3.0, 0.5), (1.0, 1.9)):
        slide(page, z0=z0, beta=float(np.log10(beta)))
        text = page.locator("#panel .share").inner_text()
        told = [float(share) for share in re.findall(r"([\d.]+) %", text)]
        greatest = abs(exact([z0], z0, beta, 1.0, desirable=True)[2][0])
        few = {y: np.abs(exact(r, z0, beta, 1.0, desirable=y)[2]) < greatest / 10 for y, r in rows.items()}
        shares = [np.concatenate([*few.values()]).mean(), few[True].mean(), few[False].mean()]
        np.testing.assert_allclose(told, 100 * np.array(shares), atol=0.3, err_msg=f"z0={z0} beta={beta}")


@pytest.mark.slow
def test_the_panel_is_the_loss_that_trains(tmp_path, visit):
    folder = write_run(tmp_path / "run")
    rows = write_rewards(folder, rows=20_000)
    page = visit(write_report([folder]))
    page.locator("#panel > summary").click()
    assert_panel_begins_with(folder, page)
    for side in ("undesirable", "desirable"):  # the second is the one at which a page begins
        for r, z0, beta, weight in ((3.0, 0.5, 0.1, 1.0), (-20.0, 4.0, 0.5, 1.7), (11.0, 0.0, 0.02, 0.4)):
            assert_panel_computes_the_loss(page, side, r, z0, beta, weight)
    assert_panel_counts_the_saturated(rows, page)
    page.locator(".copy").first.click()
    page.wait_for_function("() => ['Copied', 'Selected'].includes(document.querySelector('.copy').textContent)")


def column(page, index):
    cells = f"[...document.querySelectorAll('.sortable tbody tr')].map((row) => row.children[{index}].dataset.sort)"
    return page.evaluate(cells)


def assert_column_sorts(page, index):
    """With missing values last."""
    header = page.locator(".sortable thead th").nth(index)
    for direction in ("ascending", "descending"):
        case = f"column {index}, {direction}"
        header.locator("button").focus()
        page.keyboard.press("Enter")
        assert header.get_attribute("aria-sort") == direction, case
        assert page.locator(".sortable th[aria-sort$=ending]").count() == 1, case
        cells = column(page, index)
        present = [cell for cell in cells if cell != ""]
        assert cells == present + [""] * (3 if index == 1 else 0), case
        key = str if index == 4 else float
        assert present == sorted(present, key=key, reverse=direction == "descending"), case


@pytest.mark.slow
def test_a_trial_is_marked_in_table_and_plots_and_the_table_sorts(pages, visit):
    page = visit(pages["sweep"])
    best = page.locator("tr.best")
    assert best.count() == 1
    number = int(best.get_attribute("data-trial"))
    best.locator(".trial").click()
    assert best.locator(".trial").get_attribute("aria-pressed") == "true"
    marked = """[...document.querySelectorAll('.plot [data-trial]')].filter((one) => getComputedStyle(one).opacity === '1')
        .map((one) => Number(one.dataset.trial))"""
    assert set(page.evaluate(marked)) == {number}
    page.set_viewport_size({"width": 900, "height": 900})  # all plots are drawn again
    page.wait_for_timeout(300)
    assert set(page.evaluate(marked)) == {number}
    best.locator(".trial").click()
    assert best.locator(".trial").get_attribute("aria-pressed") == "false"
    for index in range(5):
        assert_column_sorts(page, index)
    dot = page.locator(".plot g[data-trial] .dot").first
    dot.click()
    assert page.locator("tr.is-marked").get_attribute("data-trial") == dot.evaluate(
        "(dot) => dot.parentElement.dataset.trial"
    )


TICKS = [
    ({"range": [0.05, 0.4], "log": True}, ["0.05", "0.1", "0.2"]),
    ({"range": [1e-7, 3e-6], "log": True}, ["1e-7", "2e-7", "5e-7", "1e-6", "2e-6"]),
    ({"range": [0.11, 0.19], "log": True}, ["0.11", "0.19"]),
    ({"range": [1e-7, 1e-3], "log": True}, ["1e-7", "1e-6", "1e-5", "1e-4", "0.001"]),
    ({"range": [0, 3], "format": "whole"}, ["0", "1", "2", "3"]),
    ({"range": [0.4, 0.71], "format": "percent"}, ["40 %", "50 %", "60 %", "70 %"]),
    ({"range": [0.49985, 0.50012]}, ["0.4999", "0.5", "0.5001"]),
    ({"range": [-2e6, 2e6]}, ["\u22122,000,000", "\u22121,000,000", "0", "1,000,000", "2,000,000"]),
]


def test_ticks_of_axes_and_the_pointer(pages, visit):
    page = visit(pages["run"])
    for axis, texts in TICKS:
        found = page.evaluate("(axis) => ticks(axis, 5)", axis)
        assert [text for _, text in found] == texts, axis
    margin = page.locator("[data-figure]").first
    margin.scroll_into_view_if_needed()
    box = margin.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 13, box["y"] + box["height"] / 2)
    tip = margin.locator(".tip").inner_text()
    assert "update 300" in tip
    assert "held out: 0.67 [0.51, 0.83]" in tip
    page.mouse.move(0, 0)
    assert margin.locator(".tip").is_hidden()


@pytest.mark.slow
def test_hostile_names_are_shown_and_do_nothing(tmp_path, visit):
    hostile = "</script><img src=x onerror=alert(1)><a href='javascript:alert(2)'>$x$ %{y}"
    folder = write_sweep(tmp_path / "<img src=x onerror=alert(3)>", trials=6)
    record = json.loads((folder / "sweep.json").read_text())
    for trial in record["trials"]:
        trial.update(reason=hostile, params={hostile: f"{hostile}{trial['number']}", "beta": 0.1 * trial["number"]})
    record |= {"importance": {hostile: 1.0}, "metric": hostile, "command": hostile}
    (folder / "sweep.json").write_text(json.dumps(record))
    runs = [write_run(tmp_path / f"<img src=x onerror=alert(4)><b>{index}") for index in range(2)]
    for path in (write_report([folder]), write_report(runs, tmp_path / "several.html")):
        page = visit(path)
        page.wait_for_timeout(200)
        open_all(page)
        for dot in page.locator(".plot g[data-trial] .dot").all()[:3]:
            dot.hover()
        assert page.locator("img[onerror], a[href^=javascript], .plot b, .plot a[href]").count() == 0
    assert "<img src=x onerror=alert(4)><b>0" in page.locator(".legend .entry").first.text_content()


@pytest.mark.slow
def test_hostile_texts_of_feedback_do_nothing(tmp_path, visit):
    hostile = "</script><img src=x onerror=alert(1)><svg onload=alert(2)>${alert(3)}{{ 7 * 7 }}\x00\u202e\ud800<style>*{color:red}</style>"
    folder = write_run(tmp_path / "run")
    write_samples(folder, {hostile: hostile})
    kinds = ("contradicts label", "duplicate", "contradiction", "changed most")
    write_suspects(
        folder, [dict.fromkeys(("place", "prompt", "completion", "others"), hostile) | {"kind": kind} for kind in kinds]
    )
    page = visit(write_report([folder]))
    open_all(page)
    for row in page.locator(".suspects summary").all():
        row.click()
    assert page.locator("main img, main style, main script, svg[onload]").count() == 0
    assert (
        page.locator(".sample")
        .inner_text()
        .count("</script><img src=x onerror=alert(1)><svg onload=alert(2)>${alert(3)}{{ 7 * 7 }}")
        == 3
    )


def test_the_policy_stops_what_would_get_in(pages, tmp_path, chromium):
    """If markup of a file came into the page after all, no script, style or image of it would do anything."""
    broken = tmp_path / "broken.html"
    inside = "<main><script>alert(1)</script><img src=x onerror=alert(2)><p id=in style='display:none'>text</p>"
    broken.write_text(pages["run"].read_text().replace("<main>", inside))
    context, refused, happened = chromium.new_context(offline=True), [], []
    page = context.new_page()
    page.on("console", lambda message: refused.append(message.text))
    page.on("dialog", lambda dialog: (happened.append(dialog.message), dialog.dismiss()))
    page.goto(broken.as_uri())
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#in").is_visible()
    assert happened == []
    assert len(refused) >= 3, refused
    assert all("Content Security Policy" in text for text in refused), refused
    context.close()


def test_a_page_of_almost_nothing_opens(tmp_path, visit):
    (tmp_path / "run.json").write_text("{}")
    page = visit(write_report([tmp_path]))
    assert "No update was logged yet." in page.inner_text("body")
    assert page.evaluate(UNDRAWN) == []
