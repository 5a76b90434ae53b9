"""Examples to batches and back: nothing is lost, padding is marked, channels stay last."""

import numpy as np
import pytest
import torch
from jaxtyping import UInt8
from torch import Tensor

from metr.data.collate import collate, padded_shape, padding_mask, stack_images
from metr.data.config import MEAN_COLOUR
from metr.data.dataset import Example, Missing
from metr.data.records import DataIssue
from metr.structures import NO_OBJECT, Targets

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)


def image(height: int, width: int) -> UInt8[Tensor, "3 h w"]:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=GENERATOR).permute(2, 0, 1)


def example(height: int, width: int, objects: int, ignored: int, number: int) -> Example:
    return Example(
        image=image(height, width),
        targets=Targets(
            boxes=torch.rand(1, objects, 4),
            labels=torch.randint(0, 9, (1, objects)),
            ignore_boxes=torch.rand(1, ignored, 4),
            ignore_labels=torch.randint(0, 9, (1, ignored)),
            annotated=torch.rand(1, 9) < 0.5,
            assumed_negative=torch.rand(1, 9) < 0.5,
        ),
        image_id=number if number % 2 else f"image {number}",
        original_size=(100 + number, 200),
        dataset="cells",
        position=number,
        issues=(DataIssue(kind="unreadable image", where=str(number)),) if number == 2 else (),
    )


def test_a_batch_holds_its_examples() -> None:
    examples = [example(40, 64, 3, 0, 0), example(64, 33, 0, 2, 1), example(64, 64, 0, 0, 2), example(1, 1, 5, 1, 3)]
    collated = collate(examples)
    assert collated.missing == ()
    assert [issue.where for issue in collated.issues] == ["2"]
    assert collated.batch is not None
    batch = collated.batch.unpack(CPU)
    assert batch.images.shape == (4, 3, 64, 64)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for row, one in enumerate(examples):
        height, width = one.image.shape[1:]
        torch.testing.assert_close(batch.images[row, :, :height, :width], one.image.float() / 255)
        assert not batch.padding_mask[row, :height, :width].any()
        assert batch.padding_mask[row].sum() == 64 * 64 - height * width
        colour = torch.tensor(MEAN_COLOUR) / 255
        outside = batch.images[row].permute(1, 2, 0)[batch.padding_mask[row]]
        torch.testing.assert_close(outside, colour.expand_as(outside))
        tensors = {name: value for name, value in vars(one.targets).items() if name != "noise_seeds"}
        for name, value in tensors.items():
            found = getattr(batch.targets, name)[row]
            assert torch.equal(found[: len(value[0])], value[0]), name
            assert name not in ("labels", "ignore_labels") or (found[len(value[0]) :] == NO_OBJECT).all()
    assert batch.targets.labels.shape == (4, 5)
    assert batch.targets.ignore_boxes.shape == (4, 2, 4)
    assert batch.image_ids == ("image 0", 1, "image 2", 3)
    assert batch.sizes == ((40, 64), (64, 33), (64, 64), (1, 1))
    assert batch.original_sizes == ((100, 200), (101, 200), (102, 200), (103, 200))
    assert collated.batch.positions == (0, 1, 2, 3)


def test_a_batch_without_any_box_works() -> None:
    collated = collate([example(32, 32, 0, 0, 1), example(32, 32, 0, 0, 3)])
    assert collated.batch is not None
    batch = collated.batch.unpack(CPU)
    assert batch.targets.boxes.shape == (2, 0, 4)
    assert batch.targets.labels.dtype == torch.int64
    assert not batch.targets.present.any()
    assert not batch.padding_mask.any()


def test_missing_images_are_passed_on() -> None:
    missing = Missing(dataset="cells", position=7, issues=(DataIssue(kind="unreadable image", where="7"),))
    collated = collate([missing, example(32, 32, 1, 0, 2)])
    assert collated.missing == (missing,)
    assert [issue.where for issue in collated.issues] == ["7", "2"]
    assert collated.batch is not None
    assert collated.batch.positions == (2,)
    alone = collate([missing])
    assert alone.batch is None
    assert alone.missing == (missing,)


@pytest.mark.parametrize(("multiple", "expected"), [(32, (64, 96)), (1, (33, 96)), (128, (128, 128))])
def test_padding_goes_to_the_next_multiple(multiple: int, expected: tuple[int, int]) -> None:
    assert padded_shape(33, 96, multiple) == expected
    assert stack_images([image(33, 20), image(5, 96)], multiple).shape == (2, 3, *expected)


def test_padding_mask_against_loops() -> None:
    sizes = [(3, 5), (4, 1), (4, 6)]
    expected = np.ones((3, 4, 6), bool)
    for row, (height, width) in enumerate(sizes):
        expected[row, :height, :width] = False
    np.testing.assert_array_equal(padding_mask(sizes, 4, 6).numpy(), expected)
