"""What is to be exported, checked before torch is imported and the detector is loaded."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from metr import deploy
from metr.errors import ConfigError, DependencyError, did_you_mean
from metr.run_directory import refuse_other_content
from metr.writable import check_file_to_write, check_folder_to_replace

Format = Literal["onnx", "openvino", "torch", "names"]
Pixels = Literal["uint8", "float32"]
"""The type of images: bytes, or numbers in 0..1."""
EXTRAS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "onnx", "onnxscript"),
    "int8": ("openvino", "nncf", "onnx", "onnxscript"),
}
"""The packages that a format needs."""
_MOST_NAMES = 10_000


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is written.

    `open_names` is the largest number of names that a model takes as an input; None: names are fixed in the model.
    `format` and `pixels`, the type of images, are names that `check_request` knows. `int8` are folders of images to
    quantise with (OpenVINO only).
    """

    format: str = "onnx"
    open_names: int | None = None
    pixels: str = "uint8"
    int8: tuple[Path, ...] = ()


def check_request(config: ExportConfig, out: Path) -> None:
    """Checks what is wanted before a detector is loaded.

    Raises:
        ConfigError: an unknown format or type of pixels, or options that do not go together.
        DependencyError: a package that the format needs is missing.
        CheckpointError: `out` holds something else, or cannot be written.
    """
    for value, known, where in (
        (config.format, get_args(Format), "--format"),
        (config.pixels, get_args(Pixels), "--pixels"),
    ):
        if value not in known:
            what = f"expected {', '.join(known[:-1])} or {known[-1]}, found {value!r}"
            raise ConfigError(what, where=where, hint=did_you_mean(str(value), known))
    if config.int8 and config.format != "openvino":
        what = f"8-bit numbers are OpenVINO's, found --format {config.format}"
        raise ConfigError(what, where="--int8", hint="--format openvino")
    if config.open_names is not None and not 0 < config.open_names <= _MOST_NAMES:
        what = f"expected 1 to {_MOST_NAMES:,} names, found {config.open_names:,}"
        raise ConfigError(what, where="--most-names", hint="64 is the default")
    if config.format == "names":
        _check_file(out)
        return
    check_packages("int8" if config.int8 else config.format)
    refuse_other_content(out, deploy.DESCRIPTION)
    check_folder_to_replace(out)


def check_packages(extra: str) -> None:
    """Checks that the packages of a format are installed, before anything is loaded.

    Raises:
        DependencyError: one is missing.
    """
    missing = [name for name in EXTRAS.get(extra, ()) if find_spec(name) is None]
    if missing:
        group = "openvino" if extra == "int8" else extra
        listed = " and ".join([", ".join(missing[:-1]), missing[-1]] if missing[1:] else missing)
        what = f"needs {listed}, which the extra `{group}` brings"
        raise DependencyError(what, where=f"--format {group}", hint=f"pip install 'metr[{group}]'")


def _check_file(out: Path) -> None:
    if out.suffix != ".npz" or out.is_dir():
        raise ConfigError(f"expected a file that ends in .npz, found {out}", where="-o", hint=f"{out}.npz")
    check_file_to_write(out)
