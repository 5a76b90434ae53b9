"""Shards of made-up datasets, stores that fail, and a web server that sends ranges."""

import io
import json
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from reader_trees import ExpectedImage, Truth, made_up

Files = Sequence[tuple[str, bytes]]


def jpeg(width: int = 40, height: int = 30, seed: int = 0, kind: str = "JPEG") -> bytes:
    """A noisy image."""
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def tar(files: Files, mode: str = "w") -> bytes:
    """A tar of these files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def sample(item: ExpectedImage, seed: int = 0) -> Files:
    """The files of an image of a truth."""
    key = item.name.partition(".")[0]
    boxes = [
        {"bbox": [left, top, right - left, bottom - top], "category": name}
        for (left, top, right, bottom), name in zip(item.boxes, item.labels, strict=True)
    ]
    told = json.dumps({"objects": boxes}).encode()
    return [(f"{key}.jpg", jpeg(item.width, item.height, seed)), (f"{key}.json", told)]


def shards(truth: Truth, a_shard: int = 2) -> dict[str, bytes]:
    """The shards of a truth by their names, `train-000000.tar` and so on."""
    found = {}
    for split, images in truth.items():
        for number, start in enumerate(range(0, len(images), a_shard)):
            files = [file for item in images[start : start + a_shard] for file in sample(item)]
            found[f"{split}-{number:06d}.tar"] = tar(files)
    return found


def simple(numbers: Sequence[int], size: int = 32) -> bytes:
    """A tar of one-box images with these numbers."""
    files: list[tuple[str, bytes]] = []
    for number in numbers:
        told = {"annotations": [{"bbox": [4, 4, 10 + number % 7, 12], "category": f"name {number % 3}"}]}
        files += [(f"{number:04d}.jpg", jpeg(size, size, number)), (f"{number:04d}.json", json.dumps(told).encode())]
    return tar(files)


def put(address: str, files: Mapping[str, bytes]) -> str:
    """Writes files below an address."""
    for name, content in files.items():
        with fsspec.open(f"{address}/{name}", "wb") as file:
            file.write(content)
    return address


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Writes files into a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def truth(seed: int = 0) -> Truth:
    """The made-up truth of all formats."""
    return made_up(seed)


class CountingFileSystem(MemoryFileSystem):
    """A store in memory that counts requests, and fails every `fails_every`-th; 0: never. `kept` fail always."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    reads: ClassVar[list[tuple[str, int, int]]] = []
    fails_every: ClassVar[int] = 0
    down: ClassVar[set[str]] = set()
    hangs: ClassVar[set[str]] = set()
    whole: ClassVar[bool] = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").strip("/")

    @classmethod
    def reset(cls) -> None:
        """Empties the store."""
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.reads.clear()
        cls.down.clear()
        cls.hangs.clear()
        cls.fails_every, cls.whole = 0, False

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        name = path.rpartition("/")[2]
        self.reads.append((name, start or 0, end or 0))
        if name in self.hangs:
            threading.Event().wait(5)
        if name in self.down or (self.fails_every and len(self.reads) % self.fails_every == 0):
            raise ConnectionResetError("reset by peer")
        return super().cat_file(path, None if self.whole else start, None if self.whole else end, **kwargs)


fsspec.register_implementation("flaky", CountingFileSystem, clobber=True)


@contextmanager
def served(folder: Path, *, ranges: bool = True) -> Iterator[tuple[str, list[str]]]:
    """A web server of a folder: its address, and the requests that it answered."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
            file = folder / self.path.lstrip("/").partition("?")[0]
            if not file.is_file():
                self.send_error(404)
                return
            data, wanted = file.read_bytes(), self.headers.get("Range")
            mark = str(file.stat().st_mtime_ns)
            if ranges and wanted is not None:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                part = data[int(first) : int(last) + 1 if last else None]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
                data = part
            else:
                self.send_response(200)
            if ranges:
                self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", mark)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
