"""Stand-ins on this machine for the stores of Amazon and Google, asked by s3fs and gcsfs; and one that refuses all."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from metr.data.shards import stores

# What a person's shell may say of stores, and tests do not want to know.
FOREIGN = (
    *("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    *("AWS_SESSION_TOKEN", "STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"),
    *("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"),
)
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}
NEEDED = {
    "s3": (("s3fs", "moto.server", "flask_cors"), "s3fs 'moto[s3]' flask flask-cors"),
    "gs": (("gcsfs", "gcp_storage_emulator.server"), "gcsfs gcp-storage-emulator"),
}


def need(scheme: str) -> None:
    """Skips the test where the packages are missing that it wants."""
    modules, packages = NEEDED[scheme]
    for module in modules:
        pytest.importorskip(module, reason=f"needs {packages}: make stores")


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of an S3 of this process, without buckets."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def gcs_server() -> Iterator[str]:
    """The address of a Google Cloud Storage of this process, without buckets."""
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    try:
        yield f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
    finally:
        server.stop()


SERVERS: dict[str, Callable[[], object]] = {"s3": s3_server, "gs": gcs_server}


@contextmanager
def refusing(status: int) -> Iterator[tuple[str, list[str]]]:
    """A store that answers every request with 401 or 403: its address, and the requests."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            google = f'{{"error": {{"code": {status}, "message": "not for you"}}}}'
            amazon = "<Error><Code>AccessDenied</Code><Message>not for you</Message></Error>"
            body = (google if "/b/" in self.path else amazon).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_GET  # noqa: N815

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


def forget_stores() -> None:
    """Lets the next request begin anew, as in a new process."""
    stores._filesystems.clear()
    stores._met.clear()
    fsspec.asyn.reset_lock()


def make_bucket(scheme: str, name: str) -> str:
    """Makes a bucket at the endpoint of the environment."""
    files = fsspec.filesystem(scheme, skip_instance_cache=True)
    files.mkdir(name)
    return f"{scheme}://{name}"
