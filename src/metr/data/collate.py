"""Examples into batches.

Workers send a batch as one block of bytes and a few flat arrays: little to copy, and few shared memory files however
many images it holds. The training process turns it into a `Batch`, on the device, where floats are made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from metr.data.config import MEAN_COLOUR
from metr.data.dataset import Example, Missing
from metr.data.records import DataIssue
from metr.structures import Batch, Targets


@dataclass(frozen=True, kw_only=True)
class PackedTargets:
    """The targets of a batch, one after another; `counts` and `ignore_counts` say how many each image has."""

    boxes: Float[np.ndarray, "m 4"]
    labels: Int[np.ndarray, "m"]
    counts: tuple[int, ...]
    annotated: Bool[np.ndarray, "b v"]
    assumed_negative: Bool[np.ndarray, "b v"]
    ignore_boxes: Float[np.ndarray, "i 4"]
    ignore_labels: Int[np.ndarray, "i"]
    ignore_counts: tuple[int, ...]

    @classmethod
    def of(cls, targets: Sequence[Targets]) -> "PackedTargets":
        """The targets of several images, packed."""
        return cls(
            boxes=torch.cat([target.boxes for target in targets]).numpy(),
            labels=torch.cat([target.labels for target in targets]).numpy(),
            counts=tuple(len(target.labels) for target in targets),
            annotated=torch.stack([target.annotated for target in targets]).numpy(),
            assumed_negative=torch.stack([target.assumed_negatives for target in targets]).numpy(),
            ignore_boxes=torch.cat([target.ignore_boxes for target in targets]).numpy(),
            ignore_labels=torch.cat([target.ignore_labels for target in targets]).numpy(),
            ignore_counts=tuple(len(target.ignore_labels) for target in targets),
        )

    def unpack(self, device: torch.device) -> tuple[Targets, ...]:
        """The targets of each image, on `device`: six transfers, however many images."""
        flat = (self.boxes, self.labels, self.annotated, self.assumed_negative, self.ignore_boxes, self.ignore_labels)
        moved = [torch.from_numpy(array).to(device) for array in flat]
        boxes, labels, annotated, assumed_negative, ignore_boxes, ignore_labels = moved
        objects = [slice(*ends) for ends in pairwise(accumulate(self.counts, initial=0))]
        ignored = [slice(*ends) for ends in pairwise(accumulate(self.ignore_counts, initial=0))]
        return tuple(
            Targets(
                boxes=boxes[here],
                labels=labels[here],
                annotated=annotated[image],
                ignore_boxes=ignore_boxes[there],
                ignore_labels=ignore_labels[there],
                assumed_negative=assumed_negative[image],
            )
            for image, (here, there) in enumerate(zip(objects, ignored, strict=True))
        )


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """A batch on its way from a worker. `positions` count within each image's dataset."""

    pixels: UInt8[Tensor, "b 3 h w"]
    targets: PackedTargets
    sizes: tuple[tuple[int, int], ...]
    image_ids: tuple[int | str, ...]
    original_sizes: tuple[tuple[int, int], ...]
    datasets: tuple[str, ...]
    positions: tuple[int, ...]

    def unpack(self, device: torch.device) -> Batch:
        """The batch on `device`, its images in 0..1 and channels-last in memory."""
        images = self.pixels.to(device, non_blocking=True).to(torch.float32).div_(255)
        return Batch(
            images=images,
            padding_mask=padding_mask(self.sizes, images.shape[-2], images.shape[-1]).to(device, non_blocking=True),
            targets=self.targets.unpack(device),
            image_ids=self.image_ids,
            original_sizes=self.original_sizes,
            sizes=self.sizes,
            datasets=self.datasets,
        )


@dataclass(frozen=True, kw_only=True)
class Collated:
    """What became of the images of one step: the batch of those that could be read, and the others."""

    batch: PackedBatch | None
    missing: tuple[Missing, ...]
    issues: tuple[DataIssue, ...]

    def pin_memory(self) -> "Collated":
        """The same with its pixels in page-locked memory, which the data loader asks for."""
        if self.batch is None:
            return self
        return replace(self, batch=replace(self.batch, pixels=self.batch.pixels.pin_memory()))


def collate(examples: Sequence[Example | Missing], multiple: int = 32) -> Collated:
    """One batch of `examples`, its sides padded to multiples of `multiple` pixels."""
    there = [example for example in examples if isinstance(example, Example)]
    return Collated(
        batch=_pack(there, multiple) if there else None,
        missing=tuple(example for example in examples if isinstance(example, Missing)),
        issues=tuple(issue for example in examples for issue in example.issues),
    )


def padded_shape(height: int, width: int, multiple: int = 32) -> tuple[int, int]:
    """The next multiples of `multiple` pixels."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def stack_images(images: Sequence[UInt8[Tensor, "3 _ _"]], multiple: int = 32) -> UInt8[Tensor, "b 3 h w"]:
    """Images in one block, padded at the right and bottom with a mean colour; channels-last in memory."""
    shapes = [padded_shape(image.shape[1], image.shape[2], multiple) for image in images]
    height, width = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    block = torch.empty((len(images), height, width, 3), dtype=torch.uint8)
    colour = torch.tensor(MEAN_COLOUR, dtype=torch.uint8)
    for row, image in zip(block, images, strict=True):
        row[image.shape[1] :] = colour
        row[:, image.shape[2] :] = colour
        row[: image.shape[1], : image.shape[2]] = image.permute(1, 2, 0)
    return block.permute(0, 3, 1, 2)


def padding_mask(sizes: Sequence[tuple[int, int]], height: int, width: int) -> Bool[Tensor, "b h w"]:
    """True where a `height` x `width` canvas lies outside the image of each of `sizes` (height, width)."""
    limits = torch.tensor(sizes).reshape(-1, 2)
    below = torch.arange(height) >= limits[:, :1]
    right = torch.arange(width) >= limits[:, 1:]
    return below.unsqueeze(2) | right.unsqueeze(1)


def _pack(examples: Sequence[Example], multiple: int) -> PackedBatch:
    return PackedBatch(
        pixels=stack_images([example.image for example in examples], multiple),
        targets=PackedTargets.of([example.targets for example in examples]),
        sizes=tuple((example.image.shape[1], example.image.shape[2]) for example in examples),
        image_ids=tuple(example.image_id for example in examples),
        original_sizes=tuple(example.original_size for example in examples),
        datasets=tuple(example.dataset for example in examples),
        positions=tuple(example.position for example in examples),
    )
