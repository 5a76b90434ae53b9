"""Detection on images of any kind and number."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from metr.data.collate import padded_shape, padding_mask, stack_images
from metr.data.config import ResizeConfig
from metr.data.images import ImageSource, load_image
from metr.data.records import DataIssue
from metr.data.transforms import output_shape, resize_image
from metr.errors import DataError, ModelError
from metr.inference.config import InferenceConfig, Precision
from metr.inference.postprocess import postprocess
from metr.models.category_extraction import ProjectedText
from metr.models.detector import Detector
from metr.structures import Detections, DetectorOutput, NameLimits

# How many batches are read ahead, so that images of one shape can be batched together.
_BATCHES_AHEAD = 4
# of the padding of images, for networks that do not say
_MULTIPLE = 32


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The result for one of many images: its detections, or the issue that made it unreadable.

    `source` is the image's path, or its position (`image 3`) where it came as an array; `size` is (height, width)
    in pixels of the image as it was given.
    """

    source: str
    size: tuple[int, int] | None = None
    detections: Detections | None = None
    issue: DataIssue | None = None


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """An image in the shape in which it enters the network, RGB; `source` and `size` are those of its `Prediction`."""

    source: str
    size: tuple[int, int]
    pixels: UInt8[Tensor, "3 h w"]


class Predictor:
    """A network with the names that it is to find.

    Args:
        network: Called as `network(images, padding_mask, text)`; gives a `DetectorOutput`. Its mode is kept.
        text: The text embedding of each name.
        names: The name of each row of `text`.
        resize: The shape in which images enter the network: that of its training.
        config: Batch size, precision, post-processing.
        device: Where the network is; by default where its first parameter is.
        multiple: Sides are padded to multiples of this many pixels; None: of what the backbone needs.
        limits: Of each name; see `name_limits`. By default the network's own.

    Raises:
        ModelError: there are no names, or not one for each row of `text`.
    """

    def __init__(
        self,
        network: nn.Module,
        text: Float[Tensor, "v t"],
        names: Sequence[str],
        resize: ResizeConfig,
        config: InferenceConfig | None = None,
        device: torch.device | None = None,
        multiple: int | None = None,
        limits: NameLimits | None = None,
    ) -> None:
        if len(names) == 0 or len(names) != len(text):
            raise ModelError(f"expected one name for each of {len(text)} text embeddings, found {len(names)}")
        self.network, self.names, self.resize = network, tuple(names), resize
        self.config = config or InferenceConfig()
        needed: int = getattr(getattr(network, "backbone", None), "multiple", _MULTIPLE)
        self.multiple = needed if multiple is None else multiple
        self.device = device or device_of(network)
        self.text = text.to(self.device)
        self.limits = None if limits is None else limits.to(self.device)
        self._projected: ProjectedText | None = None

    @property
    def batch_size(self) -> int:
        """Maximum number of images per step."""
        return self.config.batch_size

    def detect(self, image: ImageSource) -> Detections:
        """The detections of one image: a path, an RGB array [h w 3] of bytes, or a PIL image.

        Raises:
            DataError: the image is missing or unreadable.
        """
        return self._infer([self.prepare(image)])[0]

    def detect_many(self, images: Iterable[ImageSource]) -> Iterator[Prediction]:
        """The detections of each image, in the order of the images, which are read as they are needed.

        Images share a step only if their padded shapes agree, so each gets the answer that it gets alone. An image
        that cannot be read gives a `Prediction` with its issue; the others are not affected.
        """
        numbered = enumerate(images)
        while chunk := list(islice(numbered, _BATCHES_AHEAD * self.config.batch_size)):
            done: dict[int, Prediction] = {}
            prepared: dict[int, PreparedImage] = {}
            for index, image in chunk:
                try:
                    prepared[index] = self.prepare(image, index)
                except DataError as error:
                    source = _source(index, image)
                    issue = DataIssue(kind="unreadable image", where=source, detail=error.what)
                    done[index] = Prediction(source=source, issue=issue)
            done |= zip(prepared, self.detect_prepared([*prepared.values()]), strict=True)
            yield from (done[index] for index, _ in chunk)

    def prepare(self, image: ImageSource, index: int = 0) -> PreparedImage:
        """An image as it enters the network, whatever the names are; `index` counts images that have no path.

        Raises:
            DataError: the image is missing or unreadable.
        """
        source = _source(index, image)
        array = load_image(image, source)
        size = (int(array.shape[0]), int(array.shape[1]))
        resized = resize_image(array, *output_shape(*size, self.resize), self.resize.filter)
        resized = np.require(resized, requirements="W")  # an array that was given may be of Pillow's, and locked
        return PreparedImage(source=source, size=size, pixels=torch.from_numpy(resized).permute(2, 0, 1))

    def detect_prepared(self, images: Sequence[PreparedImage]) -> list[Prediction]:
        """The detections of images that `prepare` made, in their order; those of one padded shape share a step."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row, one in enumerate(images):
            shape = padded_shape(one.pixels.shape[1], one.pixels.shape[2], self.multiple)
            groups.setdefault(shape, []).append(row)
        found: dict[int, Detections] = {}
        step = self.config.batch_size
        for rows in groups.values():
            for start in range(0, len(rows), step):
                some = rows[start : start + step]
                found |= zip(some, self._infer([images[row] for row in some]), strict=True)
        return [Prediction(source=one.source, size=one.size, detections=found[row]) for row, one in enumerate(images)]

    def batch(self, loaded: Sequence[PreparedImage]) -> tuple[Float[Tensor, "b 3 h w"], Bool[Tensor, "b h w"]]:
        """Images and their padding mask as the network takes them, on its device."""
        pixels = stack_images([one.pixels for one in loaded], self.multiple)
        shapes = [(one.pixels.shape[1], one.pixels.shape[2]) for one in loaded]
        padding = padding_mask(shapes, pixels.shape[-2], pixels.shape[-1]).to(self.device)
        return pixels.to(self.device).to(torch.float32).div_(255), padding

    def _infer(self, loaded: Sequence[PreparedImage]) -> list[Detections]:
        """The detections, on the CPU, of images that share a padded shape."""
        images, padding = self.batch(loaded)
        with inference(self.network, self.device, self.config.precision):
            (output,) = answers(self.network, images, padding, [(self._text_to_ask(), self.limits)])
        # Outside inference mode, so that the detections are ordinary tensors, which callers may change.
        found = postprocess(output, [one.size for one in loaded], self.names, self.config.postprocess)
        return [one.to("cpu") for one in found]

    def _text_to_ask(self) -> Tensor | ProjectedText:
        """The text as the network takes it: projected once, and again whenever the network's weights have changed."""
        text = project(self.network, self.text, self._projected)
        self._projected = text if isinstance(text, ProjectedText) else None
        return text


@contextmanager
def inference(network: nn.Module, device: torch.device, precision: Precision = "fp32") -> Iterator[None]:
    """No gradients, evaluation mode and the wanted precision; every module gets its own mode back afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    low = torch.bfloat16 if precision == "bf16" else torch.float16
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype=low, enabled=precision != "fp32"):
            yield
    finally:
        for module, training in modes:
            module.training = training


def project(network: nn.Module, text: Tensor, earlier: ProjectedText | None = None) -> Tensor | ProjectedText:
    """Text as the network takes it for many images: projected once if it is a `Detector`; see `Detector.project`."""
    return network.project(text, earlier) if isinstance(network, Detector) else text


def answers(
    network: nn.Module,
    images: Float[Tensor, "b 3 h w"],
    padding_mask: Bool[Tensor, "b h w"],
    asked: Sequence[tuple[Tensor | ProjectedText, NameLimits | None]],
) -> list[DetectorOutput]:
    """The network's answers to several vocabularies with their limits; a `Detector` encodes the images once for all.

    Any other network is called as `network(images, padding_mask, text)`: it knows no limits.
    """
    if not isinstance(network, Detector):
        return [network(images, padding_mask, text) for text, _ in asked]
    memory = network.encode(images, padding_mask)
    return [network.detect(memory, text, limits=limits) for text, limits in asked]


def device_of(network: nn.Module) -> torch.device:
    """Where a network's first parameter is; the CPU for one without parameters."""
    first = next(network.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _source(index: int, image: ImageSource) -> str:
    return str(image) if isinstance(image, str | Path) else f"image {index}"
