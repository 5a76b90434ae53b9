"""A stand-in for the hub: as much of its HTTP as huggingface-hub speaks to make, fill and read repositories.

Those of datasets are called `datasets/` and their name.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

TOKEN = "hf_may_write"
_LFS = (".safetensors", ".bin", ".pkl", ".parquet")


@dataclass
class Repository:
    """Commits by id, branches and tags by name; who may see it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A further commit with these files."""
        content = repr((sorted(files.items()), len(self.commits))).encode()
        self.refs[branch] = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        self.commits[self.refs[branch]] = files
        return self.refs[branch]

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the newest commit."""
        return self.commits[self.refs["main"]]


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    cards: list[str] = field(default_factory=list)
    url: str = ""
    breaks_after: int | None = None
    """Bytes of a large file after which the connection closes; None sends it whole."""

    def got(self) -> list[str]:
        """The files that were downloaded."""
        return [path.rsplit("/", 1)[-1] for how, path in self.asked if how == "GET" and "/resolve/" in path]


class RefusedError(Exception):
    """An answer that is not what was asked for."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Tests are silent."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        body = self._body()
        try:
            for method, pattern, answer in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    return answer(self, body, **found.groupdict())
            self._send(404, b"{}", {"X-Error-Code": "NoSuchRoute"})
        except RefusedError as refusal:
            self._send(refusal.status, b"{}", {"X-Error-Code": refusal.code, "X-Error-Message": refusal.code})

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, values: Any) -> None:
        self._send(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    # who may what

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._may_write()):
            raise RefusedError(404 if self._may_write() else 401, "RepoNotFound")
        if found.gated and not self._may_write():
            raise RefusedError(403, "GatedRepo")
        return found

    def _revision(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        found = self._repository(name)
        commit = found.refs.get(revision, revision)
        if commit not in found.commits:
            raise RefusedError(404, "RevisionNotFound")
        return commit, found.commits[commit]

    # reading

    def info(self, _: bytes, name: str, revision: str = "main") -> None:
        commit, files = self._revision(name, revision)
        self._json({"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]})

    def tree(self, _: bytes, name: str, revision: str) -> None:
        files = self._revision(name, revision)[1]
        self._json(
            [{"type": "file", "path": file, "size": len(data), "oid": _git(data)} for file, data in files.items()]
        )

    def file(self, _: bytes, name: str, revision: str, file: str) -> None:
        commit, files = self._revision(name, revision)
        headers = {"X-Repo-Commit": commit}
        if file not in files:
            raise RefusedError(404, "EntryNotFound")
        data = files[file]
        if self.command == "HEAD" and file.endswith(_LFS):
            large = {"X-Linked-Etag": f'"{_sha(data)}"', "X-Linked-Size": str(len(data))}
            return self._send(302, b"", headers | large | {"Location": f"{_elsewhere(self.hub.url)}/cdn{self.path}"})
        return self._send(200, data, headers | {"ETag": f'"{_git(data)}"'})

    def large_file(self, _: bytes, name: str, revision: str, file: str) -> None:
        assert self.headers.get("Authorization") is None  # another host: tokens are the hub's alone
        data = self.hub.repositories[name].commits[revision][file]
        if self.hub.breaks_after is None:
            return self._send(200, data)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: self.hub.breaks_after])
        self.hub.breaks_after = 0  # nothing more comes
        self.close_connection = True
        return None

    # writing

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        if not self._may_write():
            raise RefusedError(401, "Unauthorized")
        name = f"{asked['organization']}/{asked['name']}"
        answer = json.dumps({"url": f"{self.hub.url}/{name}"}).encode()
        if name in self.hub.repositories:
            return self._send(409, answer)
        self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        self.hub.repositories[name].commit({".gitattributes": b""})
        return self._send(200, answer)

    def create_branch(self, _: bytes, name: str, revision: str) -> None:
        if not self._may_write():
            raise RefusedError(403, "Forbidden")
        refs = self._repository(name).refs
        if revision in refs:
            raise RefusedError(409, "Conflict")
        refs[revision] = refs["main"]
        self._json({})

    def validate(self, body: bytes) -> None:
        self.hub.cards.append(json.loads(body)["content"])
        self._json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        there = self._revision(name, revision)[1]
        answer = []
        for one in json.loads(body)["files"]:
            path = one["path"]
            large = path.endswith(_LFS)
            known = {"oid": (_sha if large else _git)(there[path])} if path in there else {}
            answer.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known})
        self._json({"files": answer})

    def batch(self, body: bytes, name: str) -> None:
        self._repository(name)
        objects = json.loads(body)["objects"]
        for one in objects:
            if one["oid"] not in self.hub.objects:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}", "header": {}}}
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        assert _sha(body) == oid
        self.hub.objects[oid] = body
        self._send(200, b"")

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if not self._may_write():
            raise RefusedError(403, "Forbidden")
        files = dict(self._revision(name, revision)[1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = self.hub.repositories[name].commit(files, revision)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})


_NAME, _REVISION = r"(?P<name>(?:datasets/)?[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_ROUTES = (
    ("GET", f"/api/(?:models/)?{_NAME}", _Answers.info),
    ("GET", f"/api/(?:models/)?{_NAME}/revision/(?P<revision>.+)", _Answers.info),
    ("GET", f"/api/(?:models/)?{_NAME}/tree/{_REVISION}", _Answers.tree),
    ("GET HEAD", f"/{_NAME}/resolve/{_REVISION}/(?P<file>.+)", _Answers.file),
    ("GET", f"/cdn/{_NAME}/resolve/{_REVISION}/(?P<file>.+)", _Answers.large_file),
    ("POST", "/api/repos/create", _Answers.create),
    ("POST", f"/api/models/{_NAME}/branch/{_REVISION}", _Answers.create_branch),
    ("POST", "/api/validate-yaml", _Answers.validate),
    ("POST", f"/api/models/{_NAME}/preupload/{_REVISION}", _Answers.preupload),
    ("POST", f"/{_NAME}\\.git/info/lfs/objects/batch", _Answers.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", _Answers.upload),
    ("POST", f"/api/models/{_NAME}/commit/{_REVISION}", _Answers.commit),
)


def _elsewhere(url: str) -> str:
    """The same server as a host of another name, as large files come from one."""
    return url.replace("127.0.0.1", "localhost")


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def served() -> Iterator[Hub]:
    """A hub without repositories, at its `url`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_OfThisHub", (_Answers,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def point_to(url: str, patch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT, HF_HUB_DISABLE_XET and HF_HUB_DISABLE_IMPLICIT_TOKEN do when the library is imported."""
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    for name, value in {
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
    }.items():
        patch.setattr(constants, name, value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface-hub takes for the real one."""
    with served() as stand_in:
        point_to(stand_in.url, monkeypatch)
        yield stand_in
        close_session()
