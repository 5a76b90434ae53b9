"""Runs the server (`metr serve`) until it is asked to end."""

import errno
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rich.console import Console

from metr.errors import ConfigError, DependencyError
from metr.inference.config import InferenceConfig
from metr.serving.config import ServeConfig

if TYPE_CHECKING:
    from metr.model import METR

__all__ = ["check_dependencies", "listening", "serve"]

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# seconds between two requests of one connection, after which it is closed
_IDLE = 5
# seconds within which a second signal is the same request: `timeout` sends two
_SAME = 1.0
# connections for each request in progress: browsers hold several
_CONNECTIONS = 8


def check_dependencies() -> None:
    """Raises DependencyError if the extra `serve` is not installed."""
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        what = f"the package {error.name} is not installed, which a server needs"
        raise DependencyError(what, hint="pip install 'metr[serve]'") from None


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at an address that is now taken; it is closed at the end. Port 0 takes a free one.

    Raises:
        ConfigError: there is no such address here, the port is taken, or it may not be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise ConfigError(f"no such address: {host!r}", where="--host", hint="127.0.0.1, or 0.0.0.0 for all") from None
    with socket.socket(family, kind, protocol) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind(address)
            opened.listen()
        except OSError as error:
            raise _unbound(error, host, port) from None
        yield opened


def _unbound(error: OSError, host: str, port: int) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        hint = "end the other program, or take another port: --port 0 finds a free one"
        return ConfigError(f"port {port} of {host} is taken by another program", where="--port", hint=hint)
    if error.errno == errno.EACCES:
        return ConfigError(f"port {port} may not be used", where="--port", hint="a port from 1024 on")
    return ConfigError(f"no server can listen at {host}: {error.strerror}", where="--host", hint="127.0.0.1")


def serve(
    load: "Callable[[], METR]",
    inference: InferenceConfig | None = None,
    config: ServeConfig | None = None,
    *,
    console: Console | None = None,
) -> None:
    """Answers requests until Ctrl-C, SIGTERM or SIGHUP; those in progress are answered before it returns.

    Args:
        load: Makes the detector; called once the address is taken. Connections wait meanwhile.
        inference: Batch size and settings of detection.
        config: Where it listens, and its limits.
        console: Where it is said at which address it is.

    Raises:
        DependencyError: the extra `serve` is not installed.
        ConfigError: the address cannot be used.
    """
    check_dependencies()
    config = config or ServeConfig()
    said = console or Console(quiet=True)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # broken forms are told to who sends them
    with listening(config.host, config.port) as opened:
        import uvicorn

        from metr.serving.app import create_app

        class Server(uvicorn.Server):
            """Ends well at a signal: to be stopped is no failure of a server."""

            @contextmanager
            def capture_signals(self) -> Iterator[None]:
                with _ending(self):
                    yield

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started:
                    _say(said, f"METR answers at {_address(opened)} (Ctrl-C ends it)")

        settings = uvicorn.Config(
            create_app(load(), inference, config),
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            ws="none",
            proxy_headers=False,
            timeout_keep_alive=_IDLE,
            timeout_graceful_shutdown=int(config.timeout) + 1,
            limit_concurrency=_CONNECTIONS * config.max_requests,
        )
        Server(settings).run(sockets=[opened])
    _say(said, "stopped")


@runtime_checkable
class _Server(Protocol):
    """What is asked of uvicorn's server to end."""

    should_exit: bool
    force_exit: bool


@contextmanager
def _ending(server: _Server) -> Iterator[None]:
    """The first signal lets requests in progress end; a later one does not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: list[float] = []

    def end(_number: int, _frame: FrameType | None) -> None:
        first.append(time.monotonic())
        server.should_exit = True
        server.force_exit = first[-1] - first[0] > _SAME

    before = {number: signal.signal(number, end) for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _address(opened: socket.socket) -> str:
    """The URL of the page; of a server for everyone, as this machine reaches it."""
    host, port = opened.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
