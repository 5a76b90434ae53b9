"""Ray for one command: started quietly, and gone without a trace when the command ends, however it does."""

import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from traceback import clear_frames
from types import ModuleType
from typing import Any

import psutil

from metr.errors import DependencyError, MetrError

__all__ = ["RayResources", "imported_ray", "ray_session"]

# Numbers of parts are all that goes through ray's store: images and detections stay with the processes.
_STORE_BYTES = 200 << 20
_PREFIX = "metr-ray-"
# sockets lie below it, whose paths may have 107 characters: temporary folders of some systems alone take 50
_SHORT = Path("/tmp")
_SECONDS_TO_END = 10
# Read by ray when it is imported, or by the processes that it starts.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_LOG_TO_DRIVER": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # what ray still does when it has ended would start it again
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # what is said of workers that died: METR says it in its own words
}


@dataclass(frozen=True, kw_only=True)
class RayResources:
    """What ray may use, on one machine or on a cluster."""

    cpus: int
    gpus: int


def imported_ray() -> ModuleType:
    """Ray with Ray Data.

    Raises:
        DependencyError: it is not installed.
    """
    _require_token()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        hint = "pip install 'metr[ray]'"
        raise DependencyError(f"the package {error.name or 'ray'} is not installed", where="ray", hint=hint) from None
    module: ModuleType = ray
    return module


@contextmanager
def ray_session(ray: ModuleType, cpus: int | None = None) -> Iterator[RayResources]:
    """Starts ray on this machine, or joins the cluster that RAY_ADDRESS names, until the block ends.

    If the program has started ray already, that is used and left as it is.

    Args:
        ray: See `imported_ray`.
        cpus: Processor cores of this machine that it may use; by default all.

    Raises:
        MetrError: ray does not start.
    """
    if ray.is_initialized():
        yield _resources(ray)
        return
    with _started(ray, cpus):
        yield _resources(ray)


@contextmanager
def _started(ray: ModuleType, cpus: int | None) -> Iterator[None]:
    address = os.environ.get("RAY_ADDRESS")
    before, handlers = set(_children()), _handlers()
    folder = None if address else _session_folder()
    own: list[psutil.Process] = []
    try:
        options: dict[str, Any] = {"address": address}
        if folder is not None:
            options = {
                "address": "local",
                "num_cpus": cpus,
                "object_store_memory": _STORE_BYTES,
                "include_dashboard": False,
                "_temp_dir": str(folder),
            }
        try:
            _quieten(ray)
            with _without_native_messages():
                ray.init(log_to_driver=False, configure_logging=False, **options)
        except (OSError, RuntimeError, ValueError) as error:
            hint = "METR_DEBUG=1 shows more; without RAY_ADDRESS ray is started on this machine"
            raise MetrError(f"ray does not start: {error}", where=address or "ray", hint=hint) from error
        finally:
            _restore(handlers)
        yield
    except BaseException as error:
        _forget(error)
        raise
    finally:
        for child in set(_children()) - before:
            own.append(child)
            with suppress(psutil.Error):
                own += child.children(recursive=True)
        ray.shutdown()
        _restore(handlers)
        _end(own)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _forget(error: BaseException) -> None:
    """Lets go of what an error's frames hold: ray's iterators end with it, and where ray is gone that fails."""
    cause: BaseException | None = error
    while cause is not None:
        clear_frames(cause.__traceback__)
        cause = cause.__context__


def _quieten(ray: ModuleType) -> None:
    """Keeps ray's own progress and notes off the screen; they are in the folder of its session."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def _without_native_messages() -> Iterator[None]:
    """Keeps what ray's C++ writes to the standard error while it starts off the screen; Python's errors are raised."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def _resources(ray: ModuleType) -> RayResources:
    found = ray.cluster_resources()
    return RayResources(cpus=max(1, int(found.get("CPU", 1))), gpus=int(found.get("GPU", 0)))


def _require_token() -> None:
    """Lets no one else talk to ray's processes: who does could run code, and their ports are open to other machines.

    Ray reads this once, when it is imported. A cluster, and a program that has imported ray, have their own rules.
    """
    if not {"RAY_ADDRESS", "RAY_AUTH_MODE"} & os.environ.keys() and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)


def _session_folder() -> Path:
    """A new folder for ray's session, after those of commands that were killed have been removed.

    Processes that still write there are ended: some of ray's look for a minute for what was killed with the command.
    """
    home = _SHORT if os.access(_SHORT, os.W_OK) else Path(tempfile.gettempdir())
    for left in home.glob(f"{_PREFIX}*-*"):
        number = left.name.removeprefix(_PREFIX).partition("-")[0]
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            _end_writers(left)
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=home))


def _end_writers(folder: Path) -> None:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(Path(file.path).is_relative_to(folder) for file in process.open_files()):
                process.kill()


def _children() -> list[psutil.Process]:
    return list(psutil.Process().children())


def _end(processes: list[psutil.Process]) -> None:
    """Waits until ray's processes have ended, and ends those that do not: some outlive `ray.shutdown` by seconds."""
    _, alive = psutil.wait_procs(processes, timeout=_SECONDS_TO_END)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=_SECONDS_TO_END)


def _handlers() -> dict[int, Any]:
    """What this process does about signals; ray installs its own."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None:
            signal.signal(number, handler)
