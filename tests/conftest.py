"""Shared fixtures. Every jaxtyping annotation of the package is executed while the quick tests run."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
from jaxtyping import install_import_hook

_hook = install_import_hook("metr", "beartype.beartype")

# Triton reads this when it is imported, by torch or by a test: kernels run in its interpreter, on the CPU
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from small import SEED, THREADS  # noqa: E402

# the same examples every time, however slow the machine is
settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.load_profile("same")

# also for fixtures of wider scope, which are made before a test's own
torch.set_num_threads(THREADS)

# where tests run in the background, Ctrl-C is ignored, also by the processes that they start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real datasets and golden numbers beside the checkout; tests that want it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared (real datasets and golden numbers) beside the checkout")
    return SHARED


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indices and embeddings of the tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state and thread count."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _annotations_in_quick_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """Slow tests do not execute annotations: that would take a third of their time, and quick ones have done so."""
    slow = request.node.get_closest_marker("slow") is not None
    jaxtyping.config.update("jaxtyping_disable", slow)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
