"""The web application: `POST /detect` for programs, `/` for people, `/docs` and `/openapi.json` for programmers."""

import asyncio
import base64
import binascii
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from importlib.resources import files
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse
from jinja2 import Environment
from pydantic import BaseModel, Field
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Message

import metr
from metr.config import Config
from metr.errors import ConfigError, MetrError
from metr.inference.config import InferenceConfig
from metr.serving.config import ServeConfig
from metr.serving.service import Answer, Service, TooLargeError

if TYPE_CHECKING:
    from metr.model import METR

__all__ = ["create_app"]

_logger = logging.getLogger(__name__)
# times the limit of what is received and thrown away, so that a client hears the answer and not of a broken pipe
_DRAINED = 4
# nothing of the page comes from elsewhere, and no other site may show it in a frame
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src blob: data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


class Detection(BaseModel):
    """One object."""

    name: str
    score: float = Field(description="0 to 1")
    box: tuple[float, float, float, float] = Field(
        description="x1, y1, x2, y2 in pixels of the image as viewers show it"
    )


class Found(BaseModel):
    """What was found in an image, best first."""

    width: int
    height: int
    detections: list[Detection]
    untrained: list[str] = Field(description="names that were not trained, with the nearest trained names")


class Names(BaseModel):
    """The names of the detector."""

    default: list[str] = Field(description="what it looks for unless names are given")
    trained: list[str] = Field(description="everything it was trained on")


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str


class Wanted(Config):
    """The body of a request in JSON."""

    image: str
    """The image file in base64; a data URL is taken too."""
    names: list[str] | dict[str, list[str]] | None = None
    """What to look for, or for each name the phrases that describe it; `all` alone: every trained name. By default the
    detector's default names."""
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """The least score; by default that of each name."""


_FORM = {
    "type": "object",
    "required": ["image"],
    "properties": {
        "image": {"type": "string", "format": "binary", "description": "The image file."},
        "names": {"type": "string", "description": 'Names between commas: "a, b"; or a JSON list or object; "all".'},
        "threshold": {"type": "number", "minimum": 0, "maximum": 1, "description": "The least score."},
    },
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": Wanted.model_json_schema()},
            "multipart/form-data": {"schema": _FORM},
        },
    }
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The image or another part of the request cannot be used."},
    403: {"model": Problem, "description": "A browser asks for a page of another site."},
    413: {"model": Problem, "description": "The image is too large."},
    415: {"model": Problem, "description": "Neither JSON nor a form."},
    503: {"model": Problem, "description": "Too many requests are in progress; try again in a moment."},
    504: {"model": Problem, "description": "It took too long."},
}


def create_app(model: "METR", inference: InferenceConfig | None = None, config: ServeConfig | None = None) -> FastAPI:
    """The web application of a detector, for any ASGI server; `metr serve` runs it in uvicorn.

    Args:
        model: The detector. From now on it keeps nothing of names that were not trained (`METR.keeps`).
        inference: Batch size and settings of detection.
        config: The limits. If its `host` is an address of this machine alone, so are the names by which it answers.
    """
    config = config or ServeConfig()
    service = Service(model, inference, config)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service:
            yield

    # the usual pages about the interface load their scripts from other hosts
    app = FastAPI(
        title="METR",
        version=metr.__version__,
        description="Finds objects in images by name.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    if own := _own_hosts(config.host):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=own)
    app.add_exception_handler(MetrError, _refused)
    app.add_exception_handler(Exception, _failed)
    _add_routes(app, service, config)
    return app


def _add_routes(app: FastAPI, service: Service, config: ServeConfig) -> None:
    page = files("metr.serving").joinpath("page.html").read_text(encoding="utf-8")
    gate = _Gate(config.max_requests)

    @app.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"})

    @app.get("/docs", include_in_schema=False)
    async def show_interface() -> HTMLResponse:
        return HTMLResponse(_interface(app.openapi()), headers={"Content-Security-Policy": _POLICY})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Says that the server runs, also while it is busy."""
        return {"status": "ok"}

    @app.get("/names")
    async def names() -> Names:
        """The names that the detector looks for by default, and all that it was trained on."""
        return Names(default=list(service.model.default_names), trained=list(service.model.names))

    @app.post("/detect", openapi_extra=_BODY, responses=_PROBLEMS)
    async def detect(request: Request) -> Found:
        """Finds objects in an image; any names may be asked for. No address is fetched: the image is sent."""
        if _is_of_another_site(request, config.host):
            raise HTTPException(403, "asked by a page of another site")
        if gate.full:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(config.timeout):
                    await _drained(request, config.max_body)
            raise HTTPException(503, "too many requests are in progress", {"Retry-After": "1"})
        try:
            with gate.entered():
                async with asyncio.timeout(config.timeout):
                    wanted = await _read(request, config.max_body)
                    return _found(await service.answer(*wanted))
        except TimeoutError:
            raise HTTPException(504, f"no answer within {config.timeout:g} seconds") from None
        except ClientDisconnect:  # nobody reads this answer
            raise HTTPException(400, "the request was broken off") from None


def _interface(described: dict[str, Any]) -> str:
    """The page about the interface, from its description in OpenAPI."""
    text = files("metr.serving").joinpath("interface.html.jinja").read_text(encoding="utf-8")
    return Environment(autoescape=True).from_string(text).render(described=described)


class _Gate:
    """Counts the requests in progress."""

    def __init__(self, most: int) -> None:
        self._most, self._inside = most, 0

    @property
    def full(self) -> bool:
        return self._inside >= self._most

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1


async def _read(request: Request, most: int) -> tuple[bytes, list[str] | dict[str, list[str]] | None, float | None]:
    """The image, names and threshold of a request.

    Raises:
        TooLargeError: it has more than `most` bytes.
        ConfigError: a part is missing or of the wrong kind.
        HTTPException: it is neither JSON nor a form.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in {"application/json", "multipart/form-data"}:
        await _drained(request, most)
        raise HTTPException(415, f"expected application/json or multipart/form-data, found {kind or 'nothing'!r}")
    body = await _body(request, most)
    if kind == "application/json":
        return _of_json(body)
    try:
        form = await Request(request.scope, _sent(body)).form(max_files=1, max_fields=2, max_part_size=most)
    except (HTTPException, MultiPartException) as error:
        raise ConfigError(f"a form that cannot be read: {getattr(error, 'detail', error)}", where="request") from None
    del body
    try:
        return await _of_form(form)
    finally:
        await form.close()


def _of_json(body: bytes) -> tuple[bytes, list[str] | dict[str, list[str]] | None, float | None]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"JSON that cannot be read: {error}", where="request") from None
    if not isinstance(values, dict):
        raise ConfigError(f"expected an object, found a {type(values).__name__}", where="request")
    wanted = Wanted.checked(values, where="request")
    text = wanted.image.partition(",")[2] if wanted.image.startswith("data:") else wanted.image
    try:
        return base64.b64decode(text, validate=True), wanted.names, wanted.threshold
    except (binascii.Error, ValueError) as error:
        hint = "send the bytes of the image file; no address is fetched"
        raise ConfigError(f"expected an image in base64: {error}", where="image", hint=hint) from None


async def _of_form(form: FormData) -> tuple[bytes, list[str] | dict[str, list[str]] | None, float | None]:
    image = form.get("image")
    if not isinstance(image, UploadFile):
        raise ConfigError("expected a file in the field image", where="request", hint="curl -F image=@street.jpg")
    values: dict[str, Any] = {"image": ""}
    for key, value in form.multi_items():
        if key != "image" and value != "":
            values[key] = _plain(key, str(value))
    wanted = Wanted.checked(values, where="request")
    return await image.read(), wanted.names, wanted.threshold


def _plain(key: str, text: str) -> object:
    """The value of a field: names between commas or as JSON, and numbers."""
    if key == "names" and not text.lstrip().startswith(("[", "{")):
        return [name.strip() for name in text.split(",") if name.strip()] or None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


async def _body(request: Request, most: int) -> bytes:
    """The body of a request, never more than `most` bytes of it in memory.

    Raises:
        TooLargeError: it is larger.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        await _drained(request, most)
        raise TooLargeError(f"expected at most {most:,} bytes, found {int(declared):,}", where="request")
    body = bytearray()
    stream = request.stream()
    async for part in stream:
        body += part
        if len(body) > most:
            body.clear()
            await _thrown_away(stream, most)
            raise TooLargeError(f"expected at most {most:,} bytes, found more", where="request")
    return bytes(body)


async def _drained(request: Request, most: int) -> None:
    """Receives what a client that is not answered still sends, up to a limit."""
    await _thrown_away(request.stream(), most)


async def _thrown_away(stream: AsyncIterator[bytes], most: int) -> None:
    left = _DRAINED * most
    with contextlib.suppress(ClientDisconnect):
        async for part in stream:
            left -= len(part)
            if left < 0:
                return


def _sent(body: bytes) -> Any:
    """A body that has been received, as it is received."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _found(answer: Answer) -> Found:
    found = answer.detections
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    return Found(
        height=answer.size[0],
        width=answer.size[1],
        detections=[Detection(name=found.names[label], score=score, box=tuple(box)) for box, score, label in rows],
        untrained=list(answer.untrained),
    )


async def _refused(_: Request, error: Exception) -> JSONResponse:
    """The answer to a request that cannot be met."""
    code = 413 if isinstance(error, TooLargeError) else 400
    return JSONResponse({"detail": str(error).encode("utf-8", "backslashreplace").decode()}, code)


async def _failed(_: Request, error: Exception) -> JSONResponse:
    """The answer where the server itself has failed; the error is logged by who runs it."""
    return JSONResponse({"detail": f"the server failed ({type(error).__name__}); its log says more"}, 500)


def _own_hosts(host: str) -> list[str]:
    """The names by which a server answers that this machine alone reaches; none for others.

    Else a page of another site, whose name its owner lets point here, could ask the server.
    """
    try:
        own = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        own = False
    return list(dict.fromkeys(["localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host])) if own else []


def _is_of_another_site(request: Request, host: str) -> bool:
    """Whether a browser asks for a page that comes from elsewhere, where only this machine is to ask.

    Such a page could not read the answer, but could keep the server at work.
    """
    origin = request.headers.get("origin")
    if origin is None or not (own := _own_hosts(host)):
        return False
    try:
        return urlsplit(origin).hostname not in {one.strip("[]") for one in own}
    except ValueError:
        return True
