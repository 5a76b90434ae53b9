"""Items of a dataset: boxes, labels, what is annotated, and images that cannot be read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_images import NAMES, VOCABULARY, make_annotations, make_dataset

from metr.boxes import cxcywh_to_xyxy
from metr.data.config import ResizeConfig
from metr.data.dataset import ATTEMPTS, DetectionDataset, Example, Missing, MixedDataset
from metr.data.images import read_image
from metr.data.records import InMemoryAnnotations
from metr.data.sample_keys import Draw
from metr.errors import ConfigError


def item(dataset: DetectionDataset, index: int) -> Example:
    example = dataset[index]
    assert isinstance(example, Example)
    return example


def broken(annotations: InMemoryAnnotations, *indices: int) -> InMemoryAnnotations:
    for index in indices:
        annotations.records[index].path.write_bytes(b"no image")
    return annotations


def test_an_item_is_its_record(tmp_path: Path) -> None:
    annotations = make_annotations(tmp_path, "fish", 8)
    dataset = make_dataset(annotations, training=False, resize=ResizeConfig(mode="fit", size=48))
    assert len(dataset) == 8
    for index, record in enumerate(annotations.records):
        example = item(dataset, index)
        # The size that is asked for is the image's own: pixels are untouched.
        np.testing.assert_array_equal(example.image.permute(1, 2, 0).numpy(), read_image(record.path))
        boxes = torch.cat([example.targets.boxes[0], example.targets.ignore_boxes[0]])
        labels = torch.cat([example.targets.labels[0], example.targets.ignore_labels[0]])
        order = np.argsort(record.ignore, kind="stable")
        scale = torch.tensor([64.0, 48.0, 64.0, 48.0])
        torch.testing.assert_close(cxcywh_to_xyxy(boxes) * scale, torch.from_numpy(record.boxes[order]))
        assert [VOCABULARY.names[row] for row in labels] == [NAMES["fish"][i] for i in record.labels[order]]
        assert example.targets.ignore_boxes.shape[1] == record.ignore.sum()
        assert (example.image_id, example.original_size, example.dataset) == (f"fish-{index}", (48, 64), "fish")
        assert example.position == index
        assert example.issues == ()


def test_annotated_says_what_is_known(tmp_path: Path) -> None:
    annotations = make_annotations(tmp_path, "fish", 2)
    assert annotations.records[0].annotated is None
    partly = replace(annotations, records=(annotations.records[0], replace(annotations.records[1], annotated=(2,))))
    ignoring, assuming = (
        make_dataset(partly, training=False),
        make_dataset(partly, training=False, unannotated="negative"),
    )
    known = [[VOCABULARY.names[row] for row in item(ignoring, i).targets.annotated[0].nonzero()] for i in range(2)]
    assert known == [["shark", "puffin", "penguin"], ["penguin"]]
    known = [[VOCABULARY.names[row] for row in item(assuming, i).targets.annotated[0].nonzero()] for i in range(2)]
    assert known == [["shark", "puffin", "penguin"], ["penguin"]]
    unannotated = ~VOCABULARY.annotated("fish")
    assert unannotated.any()
    for i in range(2):
        assert torch.equal(item(assuming, i).targets.assumed_negative[0], unannotated)
        assert not item(ignoring, i).targets.assumed_negative.any()
    none = replace(partly, records=(replace(annotations.records[1], annotated=()),))
    assert not item(make_dataset(none, training=False), 0).targets.annotated.any()


def test_evaluation_never_shows_another_image(tmp_path: Path) -> None:
    dataset = make_dataset(broken(make_annotations(tmp_path), 3), training=False)
    missing = dataset[3]
    assert isinstance(missing, Missing)
    assert missing.position == 3
    assert [(issue.kind, Path(issue.where).name) for issue in missing.issues] == [("unreadable image", "3.png")]
    assert "not an image" in missing.issues[0].detail
    assert item(dataset, 4).image_id == "cells-4"


def test_training_replaces_unreadable_images(tmp_path: Path) -> None:
    dataset = make_dataset(broken(make_annotations(tmp_path), 0, 2, 3))
    draws = [Draw(number=n, dataset=0, index=3, seed=1) for n in range(20)]
    examples = [dataset.draw(draw) for draw in draws]
    for example in examples:
        assert isinstance(example, Example)
        assert example.image_id in {"cells-1", "cells-4", "cells-5"}
        assert example.image_id == f"cells-{example.position}"
        assert Path(example.issues[0].where).name == "3.png"
    assert len({example.image_id for example in examples if isinstance(example, Example)}) > 1
    for example, again in zip(examples, [dataset.draw(draw) for draw in draws], strict=True):
        assert isinstance(example, Example)
        assert isinstance(again, Example)
        assert torch.equal(again.image, example.image)


def test_a_dataset_without_a_readable_image_gives_up(tmp_path: Path) -> None:
    dataset = make_dataset(broken(make_annotations(tmp_path), *range(6)))
    missing = dataset.draw(Draw(number=0, dataset=0, index=3, seed=1))
    assert isinstance(missing, Missing)
    assert len(missing.issues) == ATTEMPTS


def test_a_draw_decides_everything(tmp_path: Path) -> None:
    dataset = make_dataset(make_annotations(tmp_path))
    draw = Draw(number=5, dataset=0, index=3, seed=1, size=48)
    results = [dataset.draw(one) for one in (draw, draw, replace(draw, number=6), replace(draw, seed=2))]
    images = [result.image for result in results if isinstance(result, Example)]
    assert all(image.shape == (3, 48, 48) for image in images)
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[3])


def test_images_of_another_size_than_annotated_keep_their_boxes(tmp_path: Path) -> None:
    annotations = make_annotations(tmp_path)
    record = annotations.records[3]
    half = replace(record, width=32, height=24, boxes=record.boxes / 2)
    dataset = make_dataset(replace(annotations, records=(record, half)), training=False)
    torch.testing.assert_close(item(dataset, 0).targets.boxes, item(dataset, 1).targets.boxes)
    # Detections are compared with the annotations, so they are wanted in the annotations' pixels.
    assert item(dataset, 1).original_size == (24, 32)


def test_mixed_datasets_go_by_number_and_need_different_names(tmp_path: Path) -> None:
    fish, cells = make_annotations(tmp_path, "fish", 3), make_annotations(tmp_path, "cells", 2)
    mixed = MixedDataset([make_dataset(fish), make_dataset(cells)])
    assert mixed.lengths == {"fish": 3, "cells": 2}
    example = mixed[Draw(number=0, dataset=1, index=1, seed=0)]
    assert isinstance(example, Example)
    assert example.image_id == "cells-1"
    with pytest.raises(ConfigError, match="two datasets are called 'fish'"):
        MixedDataset([make_dataset(fish), make_dataset(cells), make_dataset(fish)])
