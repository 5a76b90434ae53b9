"""The page of the server, in a real browser: an image is dropped or chosen, names are typed, boxes appear."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from browser import Browser, chromium
from drawn_cells import drawn, scattered
from served import Served, serving

ROOT = Path(__file__).resolve().parents[2]
# `METR_SCREENSHOTS=docs pytest tests/serving/test_serving_page.py` writes the screenshots of the documentation anew
SCREENSHOTS = os.environ.get("METR_SCREENSHOTS")

pytestmark = pytest.mark.slow

# a file is dropped as a person would: the page gets the same events
DROP = """
const [field, target] = arguments, data = new DataTransfer();
data.items.add(field.files[0]);
field.value = "";
for (const kind of ["dragover", "drop"])
  target.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
"""
# pixels of the canvas that differ from the image alone
DRAWN = """
const canvas = document.getElementById("canvas"), brush = canvas.getContext("2d");
const pixels = () => brush.getImageData(0, 0, canvas.width, canvas.height).data;
const now = pixels();
brush.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
const plain = pixels();
draw();
let count = 0;
for (let at = 0; at < now.length; at += 4) count += now[at] !== plain[at] || now[at + 1] !== plain[at + 1];
return count;
"""
STATE = "document.getElementById('state').textContent"


@pytest.fixture(scope="module")
def shipped() -> Iterator[Served]:
    """A server of the shipped detector."""
    with serving(ROOT / "checkpoints" / "metr-nano") as one:
        yield one


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser"), 1100, 760) as window:
        yield window


@pytest.fixture(scope="module")
def smear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smear") / "smear.png"
    drawn(scattered(640, 480, 16), 640, 480).save(path)
    return path


def kept(browser: Browser, name: str) -> Image.Image:
    """The window as an image; written for the documentation if that is asked for."""
    image = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    if SCREENSHOTS:
        image.save(ROOT / SCREENSHOTS / name, quality=80, optimize=True)
    return image


def test_an_image_is_chosen_names_are_typed_and_boxes_appear(shipped: Served, browser: Browser, smear: Path) -> None:
    browser.open(shipped.url)
    browser.wait("document.getElementById('names').placeholder")
    browser.type("#names", "RBC, WBC")
    browser.type("#file", str(smear))
    browser.wait(f"{STATE}.endsWith('found.')", 60)
    expected = shipped.model.detect(smear, ["RBC", "WBC"])
    listed = browser.run("return [...document.querySelectorAll('#list li')].map(one => one.innerText.split(/\\s+/))")
    assert [name for name, _ in listed] == [expected.names[label] for label in expected.labels.tolist()]
    assert [float(score) for _, score in listed] == pytest.approx(expected.scores.tolist(), abs=0.0051)
    assert len(listed) >= 12
    assert {name for name, _ in listed} == {"RBC", "WBC"}
    whole = browser.run(DRAWN)
    assert whole > 5000
    kept(browser, "serve.jpg")
    browser.run("document.querySelector('#list li').focus()")
    assert 0 < browser.run(DRAWN.replace("draw();", "")) < whole / 4
    # that the test reads the canvas is no fault of the page
    assert [line for line in browser.complaints() if "getImageData" not in line] == []


def test_an_image_is_dropped_and_names_are_typed_later(shipped: Served, browser: Browser, smear: Path) -> None:
    browser.open(shipped.url)
    # the chooser itself would ask: a drop brings the file without it
    browser.run("document.getElementById('file').onchange = null")
    browser.type("#file", str(smear))
    browser.run(DROP, browser.element("#file"), browser.element("#drop"))
    browser.wait(f"{STATE}.endsWith('found.')", 60)
    browser.type("#names", "white-king, zebra")
    browser.click("#find")
    browser.wait(f"{STATE}.startsWith('Nothing found.')", 60)
    assert browser.run(f"return {STATE}") == "Nothing found."
    browser.run("document.getElementById('names').value = ''")
    browser.type("#names", "<img src=x onerror=fail()>")
    browser.click("#find")
    browser.wait(f"{STATE}.includes('Not trained')", 60)
    assert "<img src=x onerror=fail()>" in browser.run(f"return {STATE}")
    assert browser.run("return document.images.length") == 0
    assert browser.complaints() == []


def test_mistakes_are_told_in_the_page(shipped: Served, browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no image")
    browser.open(shipped.url)
    browser.type("#file", str(tmp_path / "notes.png"))
    browser.wait("document.getElementById('state').className === 'bad'", 60)
    assert "not an image in a known format" in browser.run(f"return {STATE}")


def test_it_fits_a_telephone(shipped: Served, browser: Browser, smear: Path) -> None:
    browser.resize(400, 800)
    try:
        browser.open(shipped.url)
        browser.type("#file", str(smear))
        browser.wait(f"{STATE}.includes('found')", 60)
        assert browser.run("return document.documentElement.scrollWidth") <= 400
    finally:
        browser.resize(1100, 760)
