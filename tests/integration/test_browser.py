"""The report in headless Chromium: filters, numbers, keyboard, small screens, dark mode, no script, no requests.

Needs Debian's `chromium`; `.ci/run` installs it.
"""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_run import HOSTILE, make_run

from cai_cli.report.command import write_report

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with hostile rows."""
    return write_report(make_run(tmp_path_factory.mktemp("r") / "run", rows=30, hostile=True))


class Opened:
    """A page that shows the report, its requests, and its console messages, dialogs and errors."""

    def __init__(self, browser: Any, report: Path, **context: Any) -> None:
        self.context = browser.new_context(accept_downloads=True, **context)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.stopped: dict[str, str] = {}
        self.page.on("requestfailed", lambda request: self.stopped.update({request.url: request.failure}))
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: self.messages.append(dialog.message))
        self.address = report.as_uri()
        self.page.goto(self.address)


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Opened]:
    opened = Opened(browser, report, viewport={"width": 1280, "height": 900})
    yield opened
    opened.context.close()


def visible(page: Any, section: str) -> list[Any]:
    return [item for item in page.query_selector_all(f"{section} [data-item]") if item.is_visible()]


def test_no_script_of_a_row_runs_and_the_page_makes_no_request(opened: Opened) -> None:
    page = opened.page
    for button in page.query_selector_all("[data-more], [data-open]"):
        if button.is_visible():
            button.click()
    for details in page.query_selector_all("details:not([open]) > summary"):
        if details.is_visible():
            details.click()
    page.wait_for_timeout(200)
    assert page.evaluate("typeof window.pwned") == "undefined"
    assert opened.requests == [opened.address]
    assert opened.messages == []
    assert page.evaluate("document.scripts.length") == 1
    assert page.evaluate("document.images.length") == 0
    body = page.inner_text("body")
    for text in (HOSTILE[0], HOSTILE[2], HOSTILE[7]):
        assert text in body
    assert "\\u202e" in body


def test_the_policy_stops_what_escaping_might_let_through(opened: Opened) -> None:
    """The second line of defence: even markup that is there cannot run or load."""
    opened.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned = 1\">')")
    opened.page.evaluate("""() => { const s = document.createElement('script'); s.textContent = 'window.pwned = 1';
                            document.body.append(s); }""")
    opened.page.evaluate("fetch('https://example.com/').catch(() => null)")
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("typeof window.pwned") == "undefined"
    assert set(opened.stopped) == set(opened.requests[1:])  # announced, and blocked before they left
    assert set(opened.stopped.values()) <= {"csp"}
    assert any("Content Security Policy" in line for line in opened.messages)


def test_search_and_filters_show_what_matches_and_count_it(opened: Opened) -> None:
    page = opened.page
    count = page.locator("#revisions output")
    assert count.inner_text() == "30 of 30 chains"
    assert len(visible(page, "#revisions")) == 10
    page.click("#revisions [data-more]")
    assert len(visible(page, "#revisions")) == 30
    page.select_option("#revisions-principle", HOSTILE[1])
    chosen = visible(page, "#revisions")
    assert 0 < len(chosen) < 30
    assert count.inner_text() == f"{len(chosen)} of 30 chains"
    for item in chosen:
        assert HOSTILE[1] in item.text_content()
    page.fill("#revisions-search", "nothing has these words")
    assert visible(page, "#revisions") == []
    page.click("#revisions [data-clear]")
    assert len(visible(page, "#revisions")) == 30
    page.fill("#revisions-search", "ONERROR pwned = 3")
    assert 0 < len(visible(page, "#revisions")) < 30
    page.select_option("#labels-kind", "changes with the order")
    flips = visible(page, "#labels")
    assert 0 < len(flips) < 30
    assert all("changes with the order" in item.text_content() for item in flips)


def test_the_numbers_of_a_chart_can_be_read_and_saved_offline(opened: Opened, tmp_path: Path) -> None:
    page = opened.page
    figure = page.locator("#chart-rl-cai-kl")
    figure.locator("summary").click()
    cells = figure.locator("tbody tr").nth(59).locator("td").all_inner_texts()
    assert cells[0] == "60"
    assert 1.5 <= float(cells[1]) <= 1.6
    with page.expect_download() as download:
        figure.locator("a[download]").click()
    download.value.save_as(tmp_path / "kl.csv")
    with (tmp_path / "kl.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "kl"]
    assert len(rows) == 61
    assert float(rows[60][1]) == pytest.approx(float(cells[1]), rel=0.01)
    assert [url for url in opened.requests if not url.startswith("data:")] == [opened.address]


def test_the_keyboard_reaches_everything_in_order(opened: Opened) -> None:
    page = opened.page
    focused = "document.activeElement.textContent.trim().slice(0, 30)"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Skip to the content"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Overview"
    page.focus("#revisions-search")
    order = []
    for _ in range(3):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert order == ["revisions-principle", "BUTTON", "SUMMARY"]
    assert page.evaluate("document.activeElement.parentElement.open")
    page.keyboard.press("Enter")
    assert not page.evaluate("document.activeElement.parentElement.open")
    unnamed = page.evaluate("""[...document.querySelectorAll("input, select, button, a, summary, [tabindex='0']")]
        .filter((e) => !(e.textContent.trim() || e.labels?.length || e.getAttribute("aria-label"))).length""")
    assert unnamed == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_width_overflows_and_text_has_contrast(browser: Any, report: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, report, viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = opened.page
    for button in page.query_selector_all("[data-open]"):
        button.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("body", ".lede", "ins", "del", ".picture text", "nav a", ".warn, .facts"):
        assert contrast(page, selector) >= 4.5, (selector, scheme)
    opened.context.close()


def contrast(page: Any, selector: str) -> float:
    """WCAG contrast of the first element found against what lies behind it."""
    text, behind = page.evaluate(
        """(selector) => {
          const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
          const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data]; };
          const element = document.querySelector(selector);
          const style = getComputedStyle(element);
          let over = element;
          while (rgb(getComputedStyle(over).backgroundColor)[3] === 0) over = over.parentElement;
          return [rgb(element instanceof SVGElement ? style.fill : style.color), rgb(getComputedStyle(over).backgroundColor)];
        }""",
        selector,
    )

    def luminance(colour: list[int]) -> float:
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    lighter, darker = sorted((luminance(text), luminance(behind)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
