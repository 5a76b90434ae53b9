"""Debian's Chromium without a screen, driven through chromium-driver in the words of WebDriver: no package needed."""

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

# by which WebDriver tells an element from other values
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """A window of Chromium."""

    def __init__(self, driver: str) -> None:
        self._driver, self._session = driver, ""

    def ask(self, method: str, path: str, values: object = None) -> Any:
        """The answer to a command of the session."""
        data = None if method == "GET" else json.dumps(values or {}).encode()
        request = urllib.request.Request(f"{self._driver}{self._session}{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def begin(self, folder: Path, width: int, height: int) -> None:
        options = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options += [f"--window-size={width},{height}", f"--user-data-dir={folder}", "--force-color-profile=srgb"]
        wanted = {"goog:chromeOptions": {"binary": shutil.which("chromium"), "args": options}}
        wanted["goog:loggingPrefs"] = {"browser": "ALL"}
        session = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{session['sessionId']}"
        self.resize(width, height)

    def resize(self, width: int, height: int) -> None:
        """Gives the page this many pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        self.ask("POST", "/goog/cdp/execute", command)

    def open(self, url: str) -> None:
        self.ask("POST", "/url", {"url": url})

    def type(self, selector: str, text: str) -> None:
        """Types into a field; for a field of files, the path of one."""
        self.ask("POST", f"/element/{self._found(selector)}/value", {"text": text})

    def click(self, selector: str) -> None:
        self.ask("POST", f"/element/{self._found(selector)}/click")

    def run(self, script: str, *arguments: object) -> Any:
        """What the body of a function returns; an element is passed as its selector's `self.element`."""
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def element(self, selector: str) -> dict[str, str]:
        """An element as an argument of `run`."""
        return {_ELEMENT: self._found(selector)}

    def wait(self, condition: str, seconds: float = 30) -> Any:
        """The value of an expression as soon as it is true."""
        until = time.monotonic() + seconds
        while not (value := self.run(f"return {condition}")):
            assert time.monotonic() < until, f"not within {seconds} s: {condition}"
            time.sleep(0.05)
        return value

    def complaints(self) -> list[str]:
        """What the browser has logged since the last call: errors of scripts, what the page may not load."""
        return [line["message"] for line in self.ask("POST", "/se/log", {"type": "browser"})]

    def screenshot(self) -> bytes:
        """The window as a PNG."""
        return base64.b64decode(self.ask("GET", "/screenshot"))

    def _found(self, selector: str) -> str:
        found = self.ask("POST", "/element", {"using": "css selector", "value": selector})
        return str(found[_ELEMENT])


@contextmanager
def chromium(folder: Path, width: int = 1400, height: int = 900) -> Iterator[Browser]:
    """A window, closed at the end; the test is skipped where there is no Chromium."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("needs a browser (Debian: apt-get install chromium chromium-driver)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = (folder / "chromedriver.log").open("w")
    command = ["chromedriver", f"--port={port}"]
    with log, subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HOME": str(folder)}) as driver:
        browser = Browser(f"http://127.0.0.1:{port}")
        try:
            _wait_until_ready(browser)
            browser.begin(folder / "profile", width, height)
            yield browser
            browser.ask("DELETE", "")
        finally:
            driver.terminate()


def _wait_until_ready(browser: Browser) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            if browser.ask("GET", "/status")["ready"]:
                return
        except (URLError, ConnectionError):
            assert time.monotonic() < until, "chromedriver does not answer"
        time.sleep(0.05)
