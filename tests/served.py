"""A server in a thread of this process, and a client that needs no package."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from metr.inference.config import InferenceConfig
from metr.model import METR
from metr.serving.app import create_app
from metr.serving.config import ServeConfig

from tiny import TinyRun

__all__ = ["Served", "served", "serving"]


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server, and the answers of its detector alone."""

    url: str
    model: METR

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        """Status and body of a request."""
        return self._asked(urllib.request.Request(f"{self.url}{path}", headers=headers))

    def post(self, body: bytes, kind: str, **headers: str) -> tuple[int, Any]:
        """Status and body of a request to detect."""
        headers = {"content-type": kind} | headers
        return self._asked(urllib.request.Request(f"{self.url}/detect", body, headers))

    def json(self, **values: Any) -> tuple[int, Any]:
        """Asks in JSON."""
        return self.post(json.dumps(values).encode(), "application/json")

    def form(self, image: bytes | None, /, **fields: str) -> tuple[int, Any]:
        """Asks with a form."""
        edge = b"--edge\r\ncontent-disposition: form-data; name="
        parts = [edge + f'"{key}"\r\n\r\n{value}\r\n'.encode() for key, value in fields.items()]
        if image is not None:
            head = b'"image"; filename="a.png"\r\ncontent-type: application/octet-stream\r\n\r\n'
            parts.append(edge + head + image + b"\r\n")
        return self.post(b"".join(parts) + b"--edge--\r\n", "multipart/form-data; boundary=edge")

    @staticmethod
    def _asked(request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, _read(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _read(error.read())


def _read(body: bytes) -> Any:
    return json.loads(body) if body.startswith(b"{") else body.decode()


@contextmanager
def serving(run: str | Path, batch_size: int = 8, **limits: Any) -> Iterator[Served]:
    """A server of a detector with these limits."""
    config = ServeConfig(port=0, **limits)
    app = create_app(METR.from_pretrained(run, device="cpu"), InferenceConfig(batch_size=batch_size), config)
    settings = uvicorn.Config(app, port=0, log_level="critical", lifespan="on")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(url=f"http://127.0.0.1:{port}", model=METR.from_pretrained(run, device="cpu"))
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(tiny_run: TinyRun) -> Iterator[Served]:
    """A server of the tiny detector with the default limits."""
    with serving(tiny_run.folder) as one:
        yield one
