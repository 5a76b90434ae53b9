"""What the image processor of a published detector does with images, in METR's terms."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Resampling

from metr.data.config import MOST_PIXELS_A_SIDE, ResizeConfig
from metr.data.transforms import Filter
from metr.errors import CheckpointError
from metr.hub import loading, pretrained
from metr.models.config import BackboneConfig
from metr.serialization import read_json

FILE = "preprocessor_config.json"
# where newer detectors keep the same among other things; it goes first
_COMBINED, _OF_IMAGES = "processor_config.json", "image_processor"
# transformers 5.23.0 builds these with torchvision only; what METR wants to know stands in the file
_NEEDS_TORCHVISION = {"rf_detr": "RfDetrImageProcessor"}
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
# METR's networks take colours from 0 to 1, and subtract and divide themselves
_RESCALED = 1 / 255

Colours = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a detector's images are prepared.

    Attributes:
        mean: What is subtracted from the colours of an image, which are from 0 to 1; None where it is not known.
        std: What they are divided by then.
        resize: How its images are resized; None where it is not known.
        differences: What METR does otherwise.
    """

    mean: Colours | None = None
    std: Colours | None = None
    resize: ResizeConfig | None = None
    differences: tuple[str, ...] = ()

    def coloured(self, backbone: BackboneConfig) -> BackboneConfig:
        """The backbone with the colours that the detector was trained with."""
        if self.mean is None or self.std is None:
            return backbone
        return backbone.model_copy(update={"pixel_mean": self.mean, "pixel_std": self.std})


def read_preprocessing(folder: Path) -> Preprocessing:
    """What the image processor's file says.

    Raises:
        CheckpointError: the file is damaged, or has values that no image can be prepared with.
    """
    found = _found(folder)
    if found is None:
        return Preprocessing(differences=(f"it has no {FILE}: METR's own size and colours are taken",))
    file, given = found
    values = _values(given, file, folder)
    factor = _number(values.get("rescale_factor", _RESCALED), "rescale_factor", file)
    times = factor / _RESCALED if values.get("do_rescale", True) else 1 / _RESCALED
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if values.get("do_normalize", True):
        mean, std = _three(values, "image_mean", file), _three(values, "image_std", file)
    if times <= 0 or min(std) <= 0:
        raise _wrong("rescale_factor" if times <= 0 else "image_std", "numbers above 0", file)
    resize, differences = _resize(values, file)
    red, green, blue = ((m / times, s / times) for m, s in zip(mean, std, strict=True))
    mean, std = zip(red, green, blue, strict=True)
    return Preprocessing(mean=mean, std=std, resize=resize, differences=differences)


def _found(folder: Path) -> tuple[Path, Any] | None:
    """The file that says how images are prepared, and what it says."""
    combined, file = folder / _COMBINED, folder / FILE
    together: Any = read_json(combined) if combined.is_file() else None
    if isinstance(together, dict) and _OF_IMAGES in together:
        return combined, together[_OF_IMAGES]
    return (file, read_json(file)) if file.is_file() else None


def _values(values: Any, file: Path, folder: Path) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise _wrong("the whole", "an object", file)
    kind = values.get("image_processor_type") or _NEEDS_TORCHVISION.get(_model_type(folder), "")
    if str(kind).removesuffix("Fast") in _NEEDS_TORCHVISION.values():
        return {**_IMAGENET, **values}
    with loading(str(folder)):
        told: Mapping[str, Any] = pretrained("AutoImageProcessor", folder).to_dict()
        return told


def _model_type(folder: Path) -> str:
    """The type of the model that the images are prepared for."""
    config: Any = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""


def _resize(values: Mapping[str, Any], file: Path) -> tuple[ResizeConfig | None, tuple[str, ...]]:
    """METR's nearest equivalent of the detector's resizing, and what it does otherwise."""
    size = values.get("size") or {}
    if not isinstance(size, Mapping):
        size = {"height": size, "width": size}
    sides = {key: _side(side, key, file) for key, side in size.items() if side is not None}
    filtering, differences = _filter(values), _otherwise(values)
    if "shortest_edge" in sides:
        longest = sides.get("longest_edge", ResizeConfig().longest)
        found = ResizeConfig(mode="fit", size=sides["shortest_edge"], longest=longest, filter=filtering)
        return found, tuple(differences)
    if {"height", "width"} <= sides.keys():
        height, width = sides["height"], sides["width"]
        if height != width:
            square = max(height, width)
            differences.append(f"its images have {height} x {width} pixels, here {square} x {square}")
        return ResizeConfig(mode="stretch", size=max(height, width), filter=filtering), tuple(differences)
    asked = f"its size ({', '.join(sides)}) has no counterpart" if sides else "it gives no size"
    return None, (*differences, f"{asked}: images are resized as METR does by default")


def _otherwise(values: Mapping[str, Any]) -> list[str]:
    """What METR does otherwise with images, whatever their size."""
    differences = list[str]()
    resample = values.get("resample")
    if resample not in (None, Resampling.BILINEAR, Resampling.BICUBIC):
        name = Resampling(resample).name.lower() if resample in list(Resampling) else "another one"
        differences.append(f"its images are resized with the filter {name}, here with the bilinear one")
    if not values.get("do_resize", True):
        differences.append("its images are not resized, here they are")
    if values.get("do_center_crop"):
        differences.append("its images are cropped, here they are not")
    if values.get("do_pad") and values.get("pad_size"):
        differences.append(f"its images are padded to {values['pad_size']}, here to what the network needs")
    return differences


def _filter(values: Mapping[str, Any]) -> Filter:
    """How its image processor resizes: 3 stands for Pillow's bicubic filter, anything else is near the bilinear one."""
    return "bicubic" if values.get("resample") == Resampling.BICUBIC else "bilinear"


def _side(value: object, key: str, file: Path) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_PIXELS_A_SIDE:
        return value
    raise _wrong(f"size.{key}", f"a whole number of pixels, 1 to {MOST_PIXELS_A_SIDE:,}", file, value)


def _three(values: Mapping[str, Any], key: str, file: Path) -> Colours:
    """Three numbers, of which one may stand for all."""
    found = values.get(key)
    listed = [found] * 3 if isinstance(found, int | float) else found
    if not isinstance(listed, list | tuple) or len(listed) != len(("red", "green", "blue")):
        raise _wrong(key, "three numbers", file, found)
    red, green, blue = (_number(one, key, file) for one in listed)
    return red, green, blue


def _number(value: object, key: str, file: Path) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise _wrong(key, "finite numbers", file, value)


def _wrong(key: str, expected: str, file: Path, found: object = None) -> CheckpointError:
    what = f"{key}: expected {expected}" + (f", found {str(found)[:80]}" if found is not None else "")
    return CheckpointError(what, where=file, hint="copy or download it again, or mend that value")
