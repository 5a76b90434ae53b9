"""Fixtures of the outer layers, and a study's command in miniature."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from tiny import TinyRun, as_overrides, metr, tiny_run

__all__ = ["metr", "tiny_run"]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
DATASETS = ("aquarium", "bccd", "chess_pieces", "coco_mini", "doc_tables", "endangered_animals", "playing_cards")


@pytest.fixture(scope="session", autouse=True)
def _path_of_benchmarks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


@pytest.fixture
def study_of() -> Callable[[str], ModuleType]:
    """A study, or what it imports, by its name."""
    return import_module


@pytest.fixture(scope="session")
def seven(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven datasets, which are the tiny ones under the names of the real ones."""
    folder = tmp_path_factory.mktemp("seven")
    for number, name in enumerate(DATASETS):
        (folder / name).symlink_to(tiny_run.datasets[number % 3], target_is_directory=True)
    return folder


@pytest.fixture
def command_of(seven: Path, tiny_run: TinyRun, tmp_path: Path) -> Callable[[ModuleType], Callable[..., int]]:
    """A study's command on the seven datasets and the tiny recipe, with `runs` and `results` in `tmp_path`."""
    places = {"data": seven, "out": tmp_path / "runs", "results": tmp_path / "results"}
    arguments = [part for name, path in places.items() for part in (f"--{name}", str(path))]
    arguments += [part for override in as_overrides(tiny_run) for part in ("--set", override)]
    return lambda study: lambda *more: study.main([*arguments, *more])
