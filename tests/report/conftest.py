"""Fixtures of the pages."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from metr.data.joint import open_joint
from metr.data.records import Annotations
from metr.demo import write_demo_datasets

from tiny import metr, tiny_run

__all__ = ["metr", "tiny_run"]


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's three datasets, with 25 val images each."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo_datasets(folder, seed=0, train=1, val=25)
    return folder


@pytest.fixture(scope="session")
def demo_sets(demo_data: Path) -> Mapping[str, Annotations]:
    """Their val splits."""
    return open_joint([str(demo_data / name) for name in ("pond", "desk", "meadow")]).evaluation()
