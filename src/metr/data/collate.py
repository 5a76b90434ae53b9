"""Collates examples into batches.

A worker sends a batch as one block of bytes and six arrays of targets, however many images it holds: few shared memory
files. The training process moves them to the device and converts bytes to floats there. Where shared memory is nearly
full, as in a container that has 64 MB of it, a worker sends a batch through its pipe instead: torch would hang.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from metr.data.config import MEAN_COLOUR
from metr.data.dataset import Example, Missing
from metr.data.records import DataIssue
from metr.structures import Batch, Targets

_SHARED_MEMORY = "/dev/shm"  # of Linux
# Bytes that the files of a batch take besides its contents.
_PAGES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """A batch as a worker sends it. `positions` are the images' indices in their datasets."""

    pixels: UInt8[Tensor, "b 3 h w"]
    targets: Targets
    sizes: tuple[tuple[int, int], ...]
    image_ids: tuple[int | str, ...]
    original_sizes: tuple[tuple[int, int], ...]
    datasets: tuple[str, ...]
    positions: tuple[int, ...]

    def unpack(self, device: torch.device) -> Batch:
        """The batch on `device`; its images are in 0..1, channels last in memory."""
        images = self.pixels.to(device, non_blocking=True).to(torch.float32).div_(255)
        return Batch(
            images=images,
            padding_mask=padding_mask(self.sizes, images.shape[-2], images.shape[-1]).to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            image_ids=self.image_ids,
            original_sizes=self.original_sizes,
            sizes=self.sizes,
            datasets=self.datasets,
        )


@dataclass(frozen=True, kw_only=True)
class Collated:
    """The images of one step: a batch of those that could be read, and the others."""

    batch: PackedBatch | None
    missing: tuple[Missing, ...]
    issues: tuple[DataIssue, ...]

    def pin_memory(self) -> "Collated":
        """A copy with its tensors in page-locked memory, from where a device copies them while the host goes on.

        The data loader calls this.
        """
        if self.batch is None:
            return self
        values = {field.name: getattr(self.batch.targets, field.name) for field in fields(Targets)}
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in values.items() if isinstance(value, Tensor)
        }
        targets = replace(self.batch.targets, **pinned)
        return replace(self, batch=replace(self.batch, pixels=self.batch.pixels.pin_memory(), targets=targets))


@dataclass(frozen=True, kw_only=True, eq=False)
class PipedBatch:
    """A `Collated` without any tensor, which is sent through a pipe and takes no shared memory.

    `rest` are the other fields of the batch; `free` is the bytes of shared memory that were left.
    """

    pixels: UInt8[np.ndarray, "b h w 3"]
    targets: dict[str, Any]
    rest: dict[str, Any]
    missing: tuple[Missing, ...]
    issues: tuple[DataIssue, ...]
    free: int

    def whole(self) -> Collated:
        """What was sent."""
        pixels = torch.from_numpy(self.pixels).permute(0, 3, 1, 2)
        arrays = {name: value for name, value in self.targets.items() if isinstance(value, np.ndarray)}
        targets = Targets(**(self.targets | {name: torch.from_numpy(array) for name, array in arrays.items()}))
        batch = PackedBatch(pixels=pixels, targets=targets, **self.rest)
        return Collated(batch=batch, missing=self.missing, issues=self.issues)


def free_shared_memory() -> int | None:
    """The bytes that are free for tensors which processes share; None where that is not limited by a folder."""
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except (OSError, AttributeError):  # Windows and macOS have no such folder
        return None
    return status.f_bavail * status.f_frsize


def sent(collated: Collated, workers: int) -> Collated | PipedBatch:
    """A batch as one of so many workers sends it: through shared memory, if all of them could do so at once."""
    free = free_shared_memory() if collated.batch is not None else None
    if collated.batch is None or free is None:
        return collated
    known = {field.name: getattr(collated.batch.targets, field.name) for field in fields(Targets)}
    tensors = {name: value for name, value in known.items() if isinstance(value, Tensor)}
    pixels = collated.batch.pixels
    size = sum(tensor.nbytes for tensor in (pixels, *tensors.values()))
    if free > 2 * max(workers, 1) * (size + _PAGES):
        return collated
    own = {field.name: getattr(collated.batch, field.name) for field in fields(PackedBatch)}
    return PipedBatch(
        pixels=pixels.permute(0, 2, 3, 1).numpy(),
        targets={name: value.numpy() if name in tensors else value for name, value in known.items()},
        rest={name: value for name, value in own.items() if name not in {"pixels", "targets"}},
        missing=collated.missing,
        issues=collated.issues,
        free=free,
    )


def collate(examples: Sequence[Example | Missing], multiple: int = 32) -> Collated:
    """One batch of the examples, its sides padded to multiples of `multiple` pixels."""
    there = [example for example in examples if isinstance(example, Example)]
    return Collated(
        batch=_pack(there, multiple) if there else None,
        missing=tuple(example for example in examples if isinstance(example, Missing)),
        issues=tuple(issue for example in examples for issue in example.issues),
    )


def padded_shape(height: int, width: int, multiple: int = 32) -> tuple[int, int]:
    """Height and width rounded up to multiples of `multiple` pixels."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def stack_images(images: Sequence[UInt8[Tensor, "3 _ _"]], multiple: int = 32) -> UInt8[Tensor, "b 3 h w"]:
    """The images in one tensor, padded at the right and bottom with a mean colour; channels last in memory."""
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
    """True at padding: where a canvas of `height` x `width` is outside an image of each of `sizes` (height, width)."""
    limits = torch.tensor(sizes).reshape(-1, 2)
    below = torch.arange(height) >= limits[:, :1]
    right = torch.arange(width) >= limits[:, 1:]
    return below.unsqueeze(2) | right.unsqueeze(1)


def _pack(examples: Sequence[Example], multiple: int) -> PackedBatch:
    return PackedBatch(
        pixels=stack_images([example.image for example in examples], multiple),
        targets=Targets.stack([example.targets for example in examples]),
        sizes=tuple((example.image.shape[1], example.image.shape[2]) for example in examples),
        image_ids=tuple(example.image_id for example in examples),
        original_sizes=tuple(example.original_size for example in examples),
        datasets=tuple(example.dataset for example in examples),
        positions=tuple(example.position for example in examples),
    )
