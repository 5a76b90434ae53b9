"""The real datasets of ../shared/data, with all their warts: every image and box is accounted for."""

from pathlib import Path
from typing import NamedTuple

import pytest

from metr.data.datasets_file import DatasetConfig, open_dataset

DATA = Path(__file__).parents[3] / "shared" / "data"


class Given(NamedTuple):
    """What a dataset's README says, by own split (a held-out val belongs to train), and what of it is faulty.

    `boxes` counts ignored boxes, too.
    """

    format: str
    images: tuple[int, int, int]
    boxes: tuple[int, int, int]
    names: int
    lost: int = 0


GIVEN = {
    "aquarium": Given("yolo", (135, 41, 23), (993, 248, 200), 7, lost=2),
    "arithmetic": Given("coco", (204, 66, 30), (2205, 610, 237), 54),
    "asl_letters": Given("yolo", (204, 66, 30), (204, 66, 30), 26),
    "bccd": Given("voc", (205, 87, 72), (2804, 1137, 945), 3, lost=2),
    "cacao": Given("coco", (66, 20, 10), (96, 30, 12), 4),
    "cat_face": Given("voc", (129, 0, 57), (394, 0, 171), 2),
    "chess_pieces": Given("coco", (190, 53, 28), (1902, 317, 375), 13),
    "coco_mini": Given("coco", (195, 120, 0), (1857, 1121, 0), 80),
    "cones_cubes": Given("yolo", (175, 56, 23), (410, 138, 47), 2),
    "datamatrix": Given("yolo", (92, 17, 0), (209, 46, 0), 1),
    "doc_tables": Given("csv", (197, 28, 0), (239, 38, 0), 1),
    "endangered_animals": Given("coco", (153, 45, 15), (226, 85, 16), 7),
    "garment_faults": Given("coco", (63, 19, 0), (76, 20, 0), 6),
    "kuih": Given("yolo", (95, 30, 13), (248, 65, 35), 5),
    "license_plates": Given("voc", (227, 73, 0), (272, 92, 0), 1),
    "oil_palm": Given("yolo", (64, 13, 10), (1640, 243, 110), 2),
    "playing_cards": Given("voc", (212, 0, 47), (379, 0, 94), 6),
    "qr_codes": Given("yolo", (108, 34, 14), (154, 114, 20), 1),
    "raccoon": Given("voc", (197, 0, 0), (214, 0, 0), 1),  # only its CSV files know of a split
    "rescue_indoor": Given("voc", (128, 42, 0), (254, 81, 0), 5),
    "rice_leaf": Given("via", (98, 16, 0), (625, 149, 0), 3, lost=2),  # two regions have no name
    "rice_pest": Given("yolo", (95, 25, 15), (146, 30, 28), 7),
    "rsod": Given("voc", (101, 0, 13), (822, 0, 94), 4),
    "rubik": Given("yolo", (162, 11, 6), (162, 11, 6), 1),
    "sewer_pipes": Given("yolo", (96, 35, 0), (76, 28, 0), 1),
    "ships": Given("yolo", (160, 66, 30), (241, 11, 17), 1, lost=93),  # classes 1 to 4 have no names
    "structural_damage": Given("voc", (204, 66, 30), (520, 184, 75), 2),
    "taco_litter": Given("voc", (69, 22, 10), (191, 48, 78), 18),
    "tomato": Given("voc", (164, 52, 23), (774, 336, 159), 1),
    "turkish_road": Given("coco", (141, 45, 19), (236, 71, 34), 12),
    "wagon_defects": Given("coco", (70, 14, 10), (275, 62, 41), 2),
    "weeds": Given("voc", (126, 0, 18), (274, 0, 32), 3),
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here"),
]


def test_every_dataset_is_in_the_table() -> None:
    assert {folder.name for folder in DATA.iterdir() if folder.is_dir()} == GIVEN.keys()


@pytest.mark.parametrize("name", GIVEN)
def test_images_and_boxes_are_those_of_the_readme(name: str, tmp_path: Path) -> None:
    given = GIVEN[name]
    source = open_dataset(DatasetConfig(name=name, path=DATA / name), tmp_path)
    assert source.format == given.format
    assert len(source.categories) == given.names
    images, boxes = ({"train": 0, "val": 0, "test": 0} for _ in range(2))
    for split, found in source.splits.items():
        counts, own = found.counts(), "train" if source.held_out and split == "val" else split
        images[own] += counts.images
        boxes[own] += int(counts.boxes.sum() + counts.ignored.sum())
    assert tuple(images.values()) == given.images
    lost = sum(sum(dropped.boxes.values()) for dropped in source.dropped.values())
    assert (tuple(boxes.values()), lost) == (given.boxes, given.lost)
    assert not any(dropped.images for dropped in source.dropped.values())


@pytest.mark.skipif(not (DATA / "ships").is_dir(), reason="../shared/data/ships is not here")
def test_images_with_ships_without_a_name_are_no_negatives(tmp_path: Path) -> None:
    source = open_dataset(DatasetConfig(name="ships", path=DATA / "ships"), tmp_path)
    empty = [record for split in source.splits.values() for record in split if not len(record.boxes)]
    assert len(empty) == 74
    assert all(record.annotated == () for record in empty)
