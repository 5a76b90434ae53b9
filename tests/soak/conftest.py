"""Fixtures of the faults: a small disk, a folder that cannot be written, another user."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from small_disk import SmallDisk

from tiny import metr, tiny_run

__all__ = ["metr", "tiny_run"]


def _mount(*arguments: object) -> None:
    if shutil.which("mount") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("needs the rights to mount")
    tried = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"needs the rights to mount: {tried.stderr.strip()}")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts what it is asked for at a new folder of this name; everything is taken off in the end."""
    places: list[Path] = []

    def mount(name: str, *arguments: object) -> Path:
        place = tmp_path / name
        place.mkdir()
        _mount(*arguments, place)
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def small_disk(mounted: Callable[..., Path]) -> SmallDisk:
    """Eight megabytes."""
    return SmallDisk(mounted("disk", "-t", "tmpfs", "-o", "size=8m", "tmpfs"))


@pytest.fixture
def read_only(mounted: Callable[..., Path]) -> Callable[[Path], Path]:
    """The same folder at another place, where nothing can be written, not even by root."""

    def bound(folder: Path) -> Path:
        place = mounted(f"read-only {folder.name}", "--bind", folder)
        _mount("-o", "remount,ro,bind", place)
        return place

    return bound
