"""The report's page in a real browser: nothing asked of a network, nothing run, nothing hidden."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trsp.bench.report import write_report
from trsp.bench.serve_record import write_serve_record

CHROMIUM = shutil.which("chromium")
# Without the flags against background networking the browser looks for hosts of its own.
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="no chromium or no playwright (apt install chromium, pip install playwright)",
)
pytestmark = [pytest.mark.browser, needs_browser]

# Elements that take part in the page and have no area, outside closed details.
HIDDEN = """
selector => [...document.querySelectorAll(selector)]
  .filter(element => !element.closest("details:not([open])"))
  .filter(element => {
    const box = element.getBoundingClientRect();
    return !(box.width > 40 && box.height > 20 && element.checkVisibility());
  }).length
"""
# Text that sticks out of its card, figure or cell without a way to scroll to it.
WIDER = """
() => [...document.querySelectorAll("body *")]
  .filter(element => !element.closest(".scroll, svg, details:not([open])"))
  .filter(element => element.getBoundingClientRect().right > innerWidth + 1).length
"""

PAINTED = "() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))"


@dataclass
class Seen:
    """A page in the browser and what it did that a document should not do."""

    page: Any
    objections: list[str] = field(default_factory=list)

    def watch(self, own: str) -> None:
        def request(seen: Any) -> None:
            if seen.url != own:
                self.objections.append(f"request {seen.url}")

        def dialog(seen: Any) -> None:
            self.objections.append(f"dialog {seen.message}")
            seen.dismiss()

        self.page.on("request", request)
        self.page.on("dialog", dialog)
        self.page.on("requestfailed", lambda seen: self.objections.append(f"failed {seen.url}"))
        self.page.on("pageerror", lambda seen: self.objections.append(f"error {seen}"))
        self.page.on("console", lambda seen: self.objections.append(f"console {seen.text}"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Seen]]:
    """Open a file in a fresh context; `bypass_csp` leaves the escaping alone to hold."""
    contexts = []

    def open_file(path: Path, *, width: int = 1280, bypass_csp: bool = False) -> Seen:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, bypass_csp=bypass_csp
        )
        contexts.append(context)
        seen = Seen(context.new_page())
        seen.watch(path.as_uri())
        seen.page.goto(path.as_uri(), wait_until="load")
        # What the page did while it loaded has been reported when this answer comes.
        seen.page.evaluate(PAINTED)
        return seen

    yield open_file
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory, report_records: ModuleType) -> Path:
    """Four records on one page."""
    folder = tmp_path_factory.mktemp("report")
    for place, backend in enumerate(("serve", "latency", "throughput", "transformers")):
        record = report_records.build(backend, label="CPU, not a serving claim")
        write_serve_record(folder / "in" / f"{place}.json", record)
    write_report([folder / "in"], out=folder / "report.html", png=None)
    return folder / "report.html"


@pytest.fixture(scope="module")
def hostile_file(tmp_path_factory: pytest.TempPathFactory, report_records: ModuleType) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "record.json").write_text(json.dumps(report_records.build_hostile()))
    write_report([folder], out=folder / "report.html", png=None)
    return folder / "report.html"


def test_the_whole_page_is_seen(show: Callable[..., Seen], report_file: Path) -> None:
    seen = show(report_file)
    count = seen.page.locator
    assert count("svg").count() == 5 + 3 * 3
    assert count("article.card").count() == 4 * 3
    assert count("section").count() == 8
    # Server, latency, throughput, transformers; the last two have a table of negative results.
    assert count("table").count() == count("caption").count() == 13 + 10 + 11 + 11
    assert seen.page.evaluate(HIDDEN, "svg, table, article, h1, h2, h3") == 0
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 1280
    assert seen.page.evaluate(WIDER) == 0
    assert seen.objections == []


def test_details_open(show: Callable[..., Seen], report_file: Path) -> None:
    page = show(report_file).page
    details = page.locator("details")
    assert details.count() == 4 * 6
    first = details.filter(has_text="Every speed-up, block by block").first
    table = first.locator("table")
    assert not table.is_visible()
    first.locator("summary").click()
    assert table.is_visible()
    assert table.locator("tbody tr").count() > 300
    page.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
    assert page.evaluate(HIDDEN, "table, pre") == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 1280


def test_a_telephone_shows_it_too(show: Callable[..., Seen], report_file: Path) -> None:
    seen = show(report_file, width=390)
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 390
    assert seen.page.evaluate(HIDDEN, "svg, table, article") == 0


@pytest.mark.parametrize("bypass_csp", [False, True])
def test_hostile_strings_do_nothing(
    bypass_csp: bool, show: Callable[..., Seen], hostile_file: Path, report_records: ModuleType
) -> None:
    seen = show(hostile_file, bypass_csp=bypass_csp)
    page = seen.page
    page.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
    text = page.locator("body").inner_text()
    for attack in report_records.HOSTILE:
        assert attack in text
        assert attack in page.evaluate(
            "[...document.querySelectorAll('td')].map(cell => cell.textContent).join('\\n')"
        )
    assert page.locator("script, img, iframe, b, a[href^='javascript']").count() == 0
    assert page.locator("svg text").filter(has_text="<script>").count() > 5
    assert page.evaluate(HIDDEN, "svg, table, article") == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 1280
    assert page.evaluate("document.compatMode") == "CSS1Compat"
    assert seen.objections == []


def test_a_script_would_be_noticed(
    show: Callable[..., Seen], report_file: Path, tmp_path: Path
) -> None:
    planted = tmp_path / "planted.html"
    attack = "<img src='http://127.0.0.1:9/x'><script>alert(1)</script>"
    planted.write_text(report_file.read_text("utf-8").replace("</main>", f"{attack}</main>"))
    assert any("Content Security Policy" in line for line in show(planted).objections)
    objections = show(planted, bypass_csp=True).objections
    assert "dialog 1" in objections
    assert "request http://127.0.0.1:9/x" in objections
