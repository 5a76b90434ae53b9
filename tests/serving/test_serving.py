"""The server: its answers are those of the detector, whatever it is asked and by however many at a time."""

import asyncio
import base64
import io
import re
import socket
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from metr.errors import ConfigError, DependencyError
from metr.inference.predictor import PreparedImage
from metr.serving import run as running
from metr.serving.batching import Batcher
from metr.serving.service import Service
from metr.structures import Detections

from served import Served, serving
from tiny import CommandLine, TinyRun


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def assert_equal(answer: dict[str, Any], expected: Detections, size: tuple[int, int] | None = None) -> None:
    """Names and order agree; boxes and scores as far as sums do, whose order batches change."""
    if size is not None:
        assert (answer["height"], answer["width"]) == size
    assert [one["name"] for one in answer["detections"]] == [expected.names[n] for n in expected.labels.tolist()]
    assert [one["score"] for one in answer["detections"]] == pytest.approx(expected.scores.tolist(), abs=1e-5)
    boxes = np.array([one["box"] for one in answer["detections"]]).reshape(-1, 4)
    np.testing.assert_allclose(boxes, expected.boxes.numpy(), atol=1e-2)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"threshold": 0.0},
        {"names": ["fish", "penguin"], "threshold": 0.0},
        {"names": {"swimmer": ["fish", "turtle"], "cup": ["cup"]}, "threshold": 0.05},
    ],
    ids=str,
)
def test_answers_are_those_of_the_detector(served: Served, tiny_run: TinyRun, asked: dict[str, Any]) -> None:
    for path in tiny_run.unseen[:2]:
        with Image.open(path) as image:
            size = (image.height, image.width)
        expected = served.model.detect(path, **asked)
        code, answer = served.json(image=encoded(path), **asked)
        assert code == 200
        assert_equal(answer, expected, size)
        code, answer = served.json(image=f"data:image/jpeg;base64,{encoded(path)}", **asked)
        assert_equal(answer, expected)
        if not isinstance(asked.get("names"), dict):
            fields = {"names": ", ".join(asked.get("names", ())), "threshold": str(asked.get("threshold", ""))}
            code, answer = served.form(path.read_bytes(), **fields)
            assert code == 200
            assert_equal(answer, expected, size)


def test_the_form_takes_names_in_json(served: Served, tiny_run: TinyRun) -> None:
    path, names = tiny_run.unseen[0], {"a, b": ["fish"]}
    code, answer = served.form(path.read_bytes(), names='{"a, b": ["fish"]}', threshold="0")
    assert code == 200
    assert_equal(answer, served.model.detect(path, names, threshold=0.0))


def test_names_that_were_not_trained_are_told_and_nothing_of_them_is_kept(served: Served, tiny_run: TinyRun) -> None:
    for number in range(3):
        code, answer = served.json(image=encoded(tiny_run.unseen[0]), names=["fish", f"toad {number}"])
        assert code == 200
        assert len(answer["untrained"]) == 1
        assert answer["untrained"][0].startswith(f'"toad {number}"')
    assert served.model.keeps
    served.model.embed(["toad"])
    cache = served.model._text_encoder()._cache  # the server's has the same folder
    assert {*cache.get(["toad", "toad 0", "toad 1", "toad 2"])} == {"toad"}


@pytest.mark.slow
def test_of_two_hundred_requests_by_eight_clients_none_is_lost(tiny_run: TinyRun) -> None:
    names = [None, ["fish"], ["leaf", "snail"]]
    with serving(tiny_run.folder) as served:
        expected = {
            (path, row): served.model.detect(path, some, threshold=0.0)
            for path in tiny_run.unseen
            for row, some in enumerate(names)
        }

        def ask(number: int) -> None:
            path, row = tiny_run.unseen[number % len(tiny_run.unseen)], number // 7 % len(names)
            asked = {} if names[row] is None else {"names": names[row]}
            code, answer = served.json(image=encoded(path), threshold=0.0, **asked)
            assert code == 200
            assert_equal(answer, expected[path, row])

        with ThreadPoolExecutor(8) as clients:
            assert len(list(clients.map(ask, range(200)))) == 200


def cut_off(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: len(data) // 2]


def cut_short(kind: str) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (8, 8)).save(held, kind)
    return held.getvalue()[:-30]


def test_broken_images_are_refused_with_a_message(served: Served, tiny_run: TinyRun) -> None:
    whole = tiny_run.unseen[0].read_bytes()
    broken = {
        "empty": b"",
        "text": b"no image",
        "html": b"<html><img src=x></html>",
        "cut off": cut_off(tiny_run.unseen[0]),
        "header alone": whole[:20],
        "png cut off": cut_short("PNG"),
        "gif cut off": b"GIF89a",
        "zeros": bytes(1000),
        "jpeg, then noise": whole[:300] + np.random.default_rng(0).bytes(5000),
        "tiff": b"II*\0" + bytes(40),
        "webp": b"RIFF\x24\0\0\0WEBPVP8 " + bytes(20),
    }
    for what, data in broken.items():
        for code, answer in (served.form(data), served.json(image=base64.b64encode(data).decode())):
            assert code == 400, what
            assert answer["detail"].startswith("image: "), what
    assert served.form(whole)[0] == 200


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "image"),
        ({"image": "http://127.0.0.1/a.jpg"}, "no address is fetched"),
        ({"image": 5}, "found 5"),
        ({"image": "", "nams": ["fish"]}, "did you mean 'names'"),
        ({"image": "", "names": []}, "names"),
        ({"image": "", "names": [""]}, ""),
        ({"image": "", "names": [5]}, "names.0"),
        ({"image": "", "names": ["fish", "fish"]}, ""),
        ({"image": "", "names": ["\ud83d"]}, "halves of characters"),
        ({"image": "", "names": ["x" * 201]}, "at most 200 characters"),
        ({"image": "", "names": [f"name {n}" for n in range(1001)]}, "at most 1,000"),
        ({"image": "", "names": {"fish": []}}, ""),
        ({"image": "", "threshold": 2}, "threshold"),
        ({"image": "", "threshold": "high"}, "threshold"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_mistakes_are_refused_with_a_message(
    served: Served, tiny_run: TinyRun, values: dict[str, Any], told: str
) -> None:
    if values.get("image") == "":
        values = values | {"image": encoded(tiny_run.unseen[0])}
    code, answer = served.json(**values)
    assert code == 400
    assert told in answer["detail"]


def test_requests_that_are_no_requests_are_refused(served: Served) -> None:
    deep = b"[" * 100_000
    for body, kind, code in [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (deep, "application/json", 400),
        (b'{"image": NaN}', "application/json", 400),
        (b"x", "multipart/form-data; boundary=edge", 400),
        (b"x", "multipart/form-data", 400),
        (b"x", "image/png", 415),
        (b"", "text/plain", 415),
    ]:
        answered, answer = served.post(body, kind)
        assert answered == code, (body[:20], kind)
        assert answer["detail"]
    assert served.form(None)[0] == 400
    assert served.form(None, image="a text, no file")[0] == 400
    assert served.form(b"x", names="a", more="b")[0] == 400
    assert served.get("/detect")[0] == 405
    assert served.get("/nothing")[0] == 404


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says that it is large."""
    held = io.BytesIO()
    Image.new("RGB", (8, 8)).save(held, "PNG")
    data = bytearray(held.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_images_that_unfold_to_gigabytes_are_refused(served: Served) -> None:
    code, answer = served.form(claiming(60_000, 60_000))
    assert code == 413
    assert "found 60000 x 60000" in answer["detail"]


def test_large_requests_are_refused(tiny_run: TinyRun) -> None:
    with serving(tiny_run.folder, max_megabytes=0.5, max_pixels=10_000) as served:
        for code, answer in (
            served.form(bytes(600_000)),
            served.form(bytes(3_000_000)),
            served.json(image=base64.b64encode(bytes(600_000)).decode()),
            served.form(claiming(101, 100)),
        ):
            assert code == 413
            assert "expected at most" in answer["detail"]
        assert served.form(claiming(100, 100))[0] == 400  # its data are not there
        # without a length, in parts
        with socket.create_connection(served.url.removeprefix("http://").split(":")) as client:  # type: ignore[arg-type]
            head = b"POST /detect HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            client.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
            for _ in range(12):
                client.sendall(b"20000\r\n" + b" " * 0x20000 + b"\r\n")
            client.sendall(b"0\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 413")


def test_a_busy_server_says_so_and_gives_up_in_time(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    free, entered = threading.Event(), threading.Event()
    work = Service._detect

    def slow(self: Service, asked: Any, images: Any) -> Any:
        entered.set()
        assert free.wait(30)
        return work(self, asked, images)

    monkeypatch.setattr(Service, "_detect", slow)
    image = tiny_run.unseen[0].read_bytes()
    with serving(tiny_run.folder, max_requests=2, timeout=1.5) as served, ThreadPoolExecutor(2) as clients:
        first = [clients.submit(served.form, image) for _ in range(2)]
        assert entered.wait(10)
        code, answer = 0, {}
        while not first[0].done() and code != 503:
            code, answer = served.form(image)
        assert code == 503
        assert "too many requests" in answer["detail"]
        assert served.get("/health") == (200, {"status": "ok"})
        for one in first:
            code, answer = one.result()
            assert code == 504
            assert "1.5 seconds" in answer["detail"]
        free.set()
        assert served.form(image)[0] == 200


def test_a_client_that_is_slow_or_gone_holds_nothing_up(tiny_run: TinyRun) -> None:
    head = (
        b"POST /detect HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{"
    )
    with serving(tiny_run.folder, max_requests=2, timeout=1) as served:
        host, port = served.url.removeprefix("http://").split(":")
        for _ in range(4):
            with socket.create_connection((host, int(port))) as client:
                client.sendall(head)  # and gone
        # one of them may find the places of those that are gone still taken; it is not waited for either
        slow = [socket.create_connection((host, int(port)), timeout=60) for _ in range(4)]
        for client in slow:
            client.sendall(head)
        answers = [client.recv(100)[:12] for client in slow]
        assert {*answers} <= {b"HTTP/1.1 503", b"HTTP/1.1 504"}
        for client in slow:
            client.close()
        assert served.form(tiny_run.unseen[0].read_bytes())[0] == 200


def test_the_description_has_both_kinds_of_requests_and_nothing_is_loaded_from_elsewhere(served: Served) -> None:
    code, described = served.get("/openapi.json")
    assert code == 200
    asked = described["paths"]["/detect"]["post"]
    assert set(asked["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert {"200", "400", "413", "415", "503", "504"} <= set(asked["responses"])
    for reference in re.findall(r'"#/([^"]+)"', str(described).replace("'", '"')):
        part = described
        for key in reference.split("/"):
            part = part[key]
    code, page = served.get("/")
    assert code == 200
    assert "://" not in page
    assert served.get("/redoc")[0] == 404
    code, page = served.get("/docs")
    assert code == 200
    assert "://" not in page
    for word in (*described["paths"], "application/json", "multipart/form-data", "threshold", "504", "list of string"):
        assert word in page
    for name, schema in described["components"]["schemas"].items():
        assert f'id="{name}"' in page
        assert all(f"<td>{field}</td>" in page for field in schema.get("properties", {}))
    assert set(served.get("/names")[1]) == {"default", "trained"}


def test_a_server_of_this_machine_answers_to_its_names_alone(served: Served) -> None:
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000"):
        assert served.get("/health", host=host)[0] == 200
    assert served.get("/health", host="elsewhere.example")[0] == 400


def test_pages_of_other_sites_cannot_ask(served: Served) -> None:
    for origin, code in (
        (served.url, 400),
        ("http://[::1]:8000", 400),
        ("http://elsewhere.example", 403),
        ("null", 403),
        ("http://[", 403),
    ):
        assert served.post(b"{}", "application/json", origin=origin)[0] == code


def test_all_is_every_trained_name(served: Served, tiny_run: TinyRun) -> None:
    image = io.BytesIO()
    Image.new("RGB", (40, 30)).save(image, "PNG")
    trained = served.get("/names")[1]["trained"]
    found = [served.form(image.getvalue(), names=names, threshold="0") for names in ("all", ", ".join(trained))]
    assert found[0][0] == 200
    assert found[0] == found[1]
    # a name of one's own, described by phrases
    code, told = served.form(image.getvalue(), names='{"all": ["penguin"]}', threshold="0")
    assert code == 200
    assert {one["name"] for one in told["detections"]} == {"all"}


def test_a_port_that_is_taken_ends_in_one_message(tiny_run: TinyRun, metr: CommandLine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = metr("serve", tiny_run.folder, "--port", port)
    assert ended.code == 1
    assert ended.words.startswith(f"error: --port: port {port} of 127.0.0.1 is taken by another program try:")
    assert metr("serve", tiny_run.folder, "--host", "no such host").words.startswith("error: --host: no such address")
    assert metr("serve", tiny_run.folder, "--timeout", "0").code == 1


def test_without_the_extra_it_says_which_one_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    with pytest.raises(DependencyError, match=r"metr\[serve\]"):
        running.check_dependencies()


def test_an_address_that_cannot_be_used_is_told() -> None:
    with pytest.raises(ConfigError, match="no server can listen at"), running.listening("192.0.2.1", 0):
        pass


def test_items_that_wait_are_worked_on_together() -> None:
    seen: list[tuple[str, list[int]]] = []
    begun, go_on = threading.Event(), threading.Event()

    def work(key: str, items: Any) -> list[int]:
        seen.append((key, list(items)))
        begun.set()
        assert go_on.wait(10)
        if key == "bad":
            raise ValueError("bad")
        return [10 * item for item in items]

    async def story() -> None:
        async with Batcher(work, 3) as batcher:
            first = asyncio.create_task(batcher.submit("a", 0))
            while not begun.is_set():
                await asyncio.sleep(0.01)
            rest = [asyncio.create_task(batcher.submit(key, n)) for n, key in enumerate("bababaaa", 1)]
            bad = asyncio.create_task(batcher.submit("bad", 9))
            await asyncio.sleep(0.05)
            rest[3].cancel()  # the second of "a"
            go_on.set()
            with pytest.raises(ValueError, match="bad"):
                await bad
            assert await first == 0
            done = await asyncio.gather(*rest, return_exceptions=True)
            assert [one for one in done if isinstance(one, int)] == [10, 20, 30, 50, 60, 70, 80]
            assert isinstance(done[3], asyncio.CancelledError)

    asyncio.run(story())
    assert seen == [("a", [0]), ("b", [1, 3, 5]), ("a", [2, 6, 7]), ("a", [8]), ("bad", [9])]


def test_requests_share_steps(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    work = Service._detect

    def counted(self: Service, asked: Any, images: "list[PreparedImage]") -> Any:
        sizes.append(len(images))
        return work(self, asked, images)

    monkeypatch.setattr(Service, "_detect", counted)
    image = tiny_run.unseen[0].read_bytes()
    with serving(tiny_run.folder, batch_size=4) as served, ThreadPoolExecutor(12) as clients:
        assert {code for code, _ in clients.map(lambda _: served.form(image), range(60))} == {200}
    assert sum(sizes) == 60
    assert 1 < max(sizes) <= 4
