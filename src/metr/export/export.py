"""Exports a detector: the model, what a program must know about it, and the one file that runs both."""

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch.export import ExportedProgram

from metr import deploy
from metr.data.config import MEAN_COLOUR
from metr.data.images import read_header
from metr.errors import ConfigError, DataError, counted
from metr.export.graph import ExportedDetector, Interface, interface_of
from metr.export.programs import exported_program, write_onnx, write_torch
from metr.export.request import ExportConfig, check_request
from metr.inference.image_paths import expanded_paths
from metr.inference.predictor import Predictor
from metr.inference.selection import presence_thresholds
from metr.model import METR, Names
from metr.run_directory import explained_disk_errors, replaced_file, replaced_folder

__all__ = ["export", "write_names"]

_FILES = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2"}
_NAMES = "names.npz"


def export(
    model: METR,
    out: str | Path,
    names: Names | None = None,
    *,
    config: ExportConfig | None = None,
    console: Console | None = None,
) -> None:
    """Writes a folder that `metr.deploy` runs: the model, `export.json` and a copy of `deploy.py`.

    A model with open names has its first names beside it, in `names.npz`.

    Args:
        model: The detector.
        out: The folder, or with the format `names` the `.npz` file. It replaces an earlier export.
        names: What to look for; by default what `model.detect` looks for.
        config: The format and its options.
        console: Where it is said what was written.

    Raises:
        DataError: no image for `int8` can be read.
        ConfigError: an option is wrong, or there are more names than the model is to take.
        DependencyError: a package that the format needs is missing.
        ModelError: the network cannot be exported.
        CheckpointError: `out` holds something else, or the disk refuses.
    """
    config, out, console = config or ExportConfig(), Path(out), console or Console(quiet=True)
    check_request(config, out)
    images = expanded_paths(list(config.int8), out) if config.int8 else []
    if images and not any(map(_is_image, images)):
        raise DataError("no image here can be read", where="--int8", hint="images of the dataset, such as its folder")
    if config.format == "names":
        write_names(model, out, names)
        _say(console, f"{out}: {counted(len(model.default_names if names is None else names), 'name')}")
        return
    predictor = model.predictor(names)
    _check_number(predictor, config)
    _say(console, "the network is traced and written, which takes a minute or two")
    interface = interface_of(predictor, config.pixels, config.open_names)
    graph = ExportedDetector(predictor, interface)
    program = exported_program(graph)
    file = _FILES[config.format]
    with replaced_folder(out, deploy.DESCRIPTION) as fresh:
        _write(program, interface, fresh / file, config)
        if config.int8:
            from metr.export.quantization import quantize

            quantize(fresh / file, images, predictor, interface)
        description = _description(model, predictor, interface, config)
        (fresh / deploy.DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        if config.open_names is not None:
            write_names(model, fresh / _NAMES, names)
        shutil.copyfile(deploy.__file__, fresh / "deploy.py")
    size = sum(path.stat().st_size for path in out.glob("model.*")) / 1e6
    what = "names open" if config.open_names else counted(len(predictor.names), "name")
    _say(console, f"{out}: {file}, {what}, {size:.1f} MB")
    if config.format != "torch":
        _say(console, f"Next:\n  python {shlex.quote(str(out / 'deploy.py'))} IMAGE")


def write_names(model: METR, path: Path, names: Names | None = None) -> None:
    """Writes names as a model with open names takes them: one `.npz` of all that is kept with each name.

    Args:
        model: The detector that was exported.
        path: The file.
        names: By default what `model.detect` looks for.

    Raises:
        ConfigError: a name is empty or given twice.
        ModelError: a name is new and the text encoder cannot be loaded.
        CheckpointError: the disk refuses.
    """
    predictor = model.predictor(names)
    wanted, text, config = predictor.names, predictor.text, predictor.config
    meant = model.meant(wanted)
    trained = [meant.get(name, name) for name in wanted]
    presence = presence_thresholds(trained, model.vocabulary, model.checkpoint.model, config.selection)
    known, calibration = model.thresholds(names=wanted).names, config.postprocess.calibration
    with explained_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as fresh, fresh.open("wb") as file:
        np.savez(
            file,
            names=np.array(wanted),
            embeddings=text.cpu().numpy().astype(np.float32),
            presence=np.array(presence, dtype=np.float32),
            thresholds=np.array([known.get(name, np.nan) for name in wanted], dtype=np.float32),
            calibration=np.array([calibration.get(name, (1.0, 0.0)) for name in wanted], dtype=np.float32),
            detector=np.array(_text_identity(model)),
        )


def _write(program: ExportedProgram, interface: Interface, path: Path, config: ExportConfig) -> None:
    if config.format == "torch":
        write_torch(program, path)
        return
    write_onnx(program, interface, path.with_suffix(".onnx"))
    if config.format == "openvino":
        from metr.export.quantization import to_openvino

        to_openvino(path.with_suffix(".onnx"), path)


def _is_image(path: Path) -> bool:
    try:
        read_header(path)
    except DataError:
        return False
    return True


def _check_number(predictor: Predictor, config: ExportConfig) -> None:
    if config.open_names is not None and len(predictor.names) > config.open_names:
        what = f"the detector looks for {len(predictor.names)} names, and the model is to take {config.open_names}"
        raise ConfigError(what, where="--most-names", hint=f"--most-names {len(predictor.names)}")


def _description(model: METR, predictor: Predictor, interface: Interface, config: ExportConfig) -> Mapping[str, Any]:
    """What a program must know about the model (`export.json`)."""
    shown, post = model.thresholds(names=predictor.names), predictor.config.postprocess
    is_fixed = config.open_names is None
    return {
        "format": "metr export",
        "format_version": deploy.VERSION,
        "model": _FILES[config.format],
        "precision": "int8" if config.int8 else "fp32",
        "inputs": list(interface.inputs),
        "names": list(predictor.names) if is_fixed else None,
        "thresholds": {name: shown.names[name] for name in predictor.names if name in shown.names} if is_fixed else {},
        "calibration": {name: post.calibration[name] for name in predictor.names if name in post.calibration}
        if is_fixed
        else {},
        "threshold": shown.default,
        "same_place": shown.same_place,
        "postprocess": {
            "score_threshold": post.score_threshold,
            "nms_iou": post.nms_iou,
            "nms_across_names": post.nms_across_names,
            "max_detections": post.max_detections,
        },
        "pixels": interface.pixels,
        "resize": model.resize.model_dump(mode="json"),
        "multiple": interface.multiple,
        "fill": list(MEAN_COLOUR),
        "open_names": config.open_names,
        "kept_names": model.checkpoint.model.categories.kept,
        "detector": _text_identity(model),
    }


def _text_identity(model: METR) -> str:
    """Of the text encoder: names of another one mean nothing to the detector."""
    described = model.checkpoint.text_encoder
    return str(described.get("identity") or json.dumps(dict(described), sort_keys=True))


def _say(console: Console, message: str) -> None:
    console.print(message, markup=False, highlight=False, soft_wrap=True)
