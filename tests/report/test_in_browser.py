"""The pages in a real browser, headless: Debian's chromium with its chromedriver, driven by selenium.

Where one of the three is missing, the tests are skipped and say so.
"""

import io
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from metr.data.records import Annotations
from metr.report import write_evaluation_page, write_run_page

from simulated_detector import simulated
from tiny import TinyRun

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip install 'metr[dev]')")

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOT = ROOT / "docs" / "report.jpg"
"""The image of docs/report.md; METR_SCREENSHOT=1 makes it anew."""
WIDTHS = (1400, 400)
pytestmark = pytest.mark.slow
Browser = Any


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs a browser: chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    opened = webdriver.Chrome(options=options, service=service)
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def evaluation(demo_sets: Mapping[str, Annotations], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an evaluation of a simulated detector on the demo's datasets, and a worse one to compare with."""
    alone = simulated(demo_sets, seed=1).report
    path = tmp_path_factory.mktemp("browser") / "evaluation.html"
    return write_evaluation_page(simulated(demo_sets), path, "Evaluation of runs/joint", {"another seed": alone})


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., None]]:
    """Opens a page at a width; at the end nothing may have gone wrong on it."""

    def opened(page: Path, width: int, scheme: str = "light") -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(page.as_uri())
        assert browser.execute_script("return window.innerWidth") == width

    browser.get_log("browser")
    yield opened
    assert browser.get_log("browser") == []


def click(browser: Browser, selector: str, number: int = 0) -> None:
    element = browser.find_elements("css selector", selector)[number]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


def text(browser: Browser, selector: str) -> str:
    return str(browser.find_element("css selector", selector).text)


def fits(browser: Browser) -> bool:
    """Whether nothing sticks out at the side."""
    return bool(browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth"))


def contrast(browser: Browser, selector: str) -> float:
    """Contrast of an element's text with what lies below it (WCAG)."""
    script = """
      const luminance = (colour) => {
        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => Number(part) / 255)
          .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      let below = document.querySelector(arguments[0]);
      const ink = luminance(getComputedStyle(below).color);
      while (getComputedStyle(below).backgroundColor === "rgba(0, 0, 0, 0)") below = below.parentElement;
      const paper = luminance(getComputedStyle(below).backgroundColor);
      return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    """
    return float(browser.execute_script(script, selector))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_worst_images_can_be_clicked_through(
    width: int, browser: Browser, evaluation: Path, visit: Callable[..., None]
) -> None:
    visit(evaluation, width)
    assert fits(browser)
    assert len(browser.find_elements("css selector", ".thumb")) == 20
    click(browser, ".thumb")
    assert browser.execute_script("return document.getElementById('viewer').open")
    seen = []
    for number in range(20):
        title = text(browser, "#viewer-title")
        assert title.startswith(f"{number + 1} of 20: ")
        counts = [int(text(browser, f"#{side}-told")) for side in ("truth", "found")]
        boxes = [len(browser.find_elements("css selector", f"#viewer-{side} b")) for side in ("truth", "found")]
        assert boxes == counts
        assert browser.find_elements("css selector", "#viewer-remarks li")
        assert browser.execute_script("return document.querySelector('#viewer-found img').naturalWidth") > 100
        seen.append(title.partition(": ")[2])
        assert fits(browser)
        click(browser, "#viewer-on")
    assert len(set(seen)) == 20
    assert text(browser, "#viewer-title").startswith("1 of 20: ")
    click(browser, "#viewer-back")
    assert text(browser, "#viewer-title").startswith("20 of 20: ")
    labels = "return getComputedStyle(document.querySelector('#viewer-truth b i')).display"
    assert browser.execute_script(labels) != "none"
    click(browser, "#viewer-labels")
    assert browser.execute_script(labels) == "none"
    click(browser, "#viewer-close")
    assert not browser.execute_script("return document.getElementById('viewer').open")


def test_names_are_sorted_and_found(browser: Browser, evaluation: Path, visit: Callable[..., None]) -> None:
    visit(evaluation, 1400)
    column = """
      const rows = document.querySelectorAll("#name-table tbody tr:not([hidden])");
      return Array.from(rows, (row) => row.cells[2].dataset.value);
    """
    click(browser, "#name-table thead button", 2)
    counts = [int(count) for count in browser.execute_script(column)]
    assert counts == sorted(counts, reverse=True)
    click(browser, "#name-table thead button", 2)
    assert [int(count) for count in browser.execute_script(column)] == sorted(counts)
    browser.find_element("id", "search").send_keys("LEAF")
    assert text(browser, "#rows-told") == "2 shown"
    browser.find_element("css selector", "#dataset option:nth-child(2)").click()
    assert text(browser, "#rows-told") == "1 shown"


def test_a_heat_map_is_read_with_the_pointer(browser: Browser, evaluation: Path, visit: Callable[..., None]) -> None:
    visit(evaluation, 1400)
    script = """
      const svg = document.querySelector("svg[data-map]"), box = svg.getBoundingClientRect();
      const scale = box.width / svg.viewBox.baseVal.width;
      const at = {clientX: box.left + 140 * scale, clientY: box.top + 6 * scale};
      svg.dispatchEvent(new PointerEvent("pointermove", at));
      return document.getElementById(svg.dataset.says).textContent;
    """
    assert browser.execute_script(script).endswith("annotated")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_can_be_read_in_light_and_in_the_dark(
    width: int, scheme: str, browser: Browser, evaluation: Path, visit: Callable[..., None]
) -> None:
    visit(evaluation, width, scheme)
    for selector in ("h1", ".soft", "nav a", ".tile dt", "#name-table th", "#name-table td", ".better, .worse"):
        assert contrast(browser, selector) >= 4.5, selector
    for section in browser.find_elements("css selector", "section"):
        assert section.is_displayed()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_of_a_run(
    width: int, browser: Browser, tiny_run: TinyRun, tmp_path: Path, visit: Callable[..., None]
) -> None:
    visit(write_run_page(tiny_run.folder, tmp_path / "report.html"), width)
    assert fits(browser)
    assert len(browser.find_elements("css selector", "#training svg[role=img]")) >= 4


def test_the_screenshot_of_the_documentation(browser: Browser, evaluation: Path, visit: Callable[..., None]) -> None:
    """docs/report.jpg is of a size to be shown; METR_SCREENSHOT=1 makes it anew from today's page."""
    if os.environ.get("METR_SCREENSHOT"):
        visit(evaluation, 1400)
        click(browser, ".thumb")
        time.sleep(0.5)
        screenshot = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        screenshot.thumbnail((1120, 1120), Image.Resampling.LANCZOS)
        screenshot.save(SCREENSHOT, quality=80, optimize=True)
    assert 20_000 < SCREENSHOT.stat().st_size < 200_000
    with Image.open(SCREENSHOT) as shown:
        assert shown.width >= 1000
