"""Models of OpenVINO, and their 8-bit versions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from metr.data.collate import stack_images
from metr.errors import DataError, ModelError, quiet_log
from metr.export.graph import Interface, padded_names
from metr.inference.predictor import Predictor

_MOST_IMAGES = 300


def to_openvino(source: Path, path: Path) -> None:
    """Converts an ONNX model, which is removed.

    Raises:
        ModelError: OpenVINO cannot read it.
    """
    import openvino

    try:
        converted = openvino.convert_model(str(source))
    except Exception as error:
        what = f"OpenVINO cannot read this network: {str(error).splitlines()[0]}"
        raise ModelError(what, where="--format openvino", hint="--format onnx") from error
    openvino.save_model(converted, str(path), compress_to_fp16=False)
    source.unlink()


def quantize(path: Path, images: Sequence[Path], predictor: Predictor, interface: Interface) -> None:
    """Gives the convolutions of a model 8-bit weights and features (NNCF's post-training quantisation), in place.

    All else stays as it is: attention, boxes and scores are a small part of the time and lose most.

    Args:
        path: An OpenVINO model.
        images: Images of the kind that it will see; ranges of features are measured on at most 300 of them.
        predictor: How images are prepared, and the names that they are measured with.
        interface: The model's inputs.

    Raises:
        DataError: no image can be read.
    """
    import nncf
    import openvino

    model = openvino.Core().read_model(str(path))
    steps = [images[index] for index in np.linspace(0, len(images) - 1, min(len(images), _MOST_IMAGES)).astype(int)]
    prepared = [batch for image in steps if (batch := _prepared(image, predictor, interface)) is not None]
    if not prepared:
        raise DataError("no image here can be read", where="--int8", hint="images of the dataset, such as its folder")
    with quiet_log("nncf"):
        ignored = nncf.IgnoredScope(types=_UNQUANTIZED, validate=False)
        small = nncf.quantize(
            model, nncf.Dataset(prepared), subset_size=len(prepared), ignored_scope=ignored, fast_bias_correction=True
        )
    whole = path.with_name("quantized.xml")
    openvino.save_model(small, str(whole), compress_to_fp16=False)
    del model, small
    for made in (whole, whole.with_suffix(".bin")):
        made.replace(path.with_suffix(made.suffix))


# kinds of OpenVINO that stay as they are
_UNQUANTIZED = [
    "MatMul",
    "Add",
    "Subtract",
    "Multiply",
    "Divide",
    "Power",
    "MVN",
    "ReduceMean",
    "Interpolate",
    "Gather",
]


def _prepared(image: Path, predictor: Predictor, interface: Interface) -> dict[str, np.ndarray] | None:
    """The inputs for an image; None if it cannot be read."""
    try:
        one = predictor.prepare(image)
    except DataError:
        return None
    pixels, size = stack_images([one.pixels], predictor.multiple), (one.pixels.shape[1], one.pixels.shape[2])
    given = {"images": pixels if interface.pixels == "uint8" else pixels / 255, "sizes": torch.tensor([size])}
    if interface.names is not None:
        least = [0.0] * len(predictor.names)
        given["text"], given["presence"] = padded_names(predictor.text.cpu(), least, interface.names)
    return {name: given[name].numpy() for name in interface.inputs}
