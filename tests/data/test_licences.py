"""The licences that the files of datasets declare, word for word."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from reader_trees import made_up, yolo_plain

from metr.data.datasets_file import DatasetSource, open_dataset, parse_data_arguments
from metr.data.joint import open_joint
from metr.data.licences import Licence, licences_of, origin_of


def opened(path: Path) -> DatasetSource:
    return open_dataset(parse_data_arguments([str(path)])[0])


def declared(path: Path) -> tuple[Licence, ...]:
    source = opened(path)
    return licences_of(source, source.split("train"))


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """A dataset that declares nothing."""
    yolo_plain(tmp_path / "some", made_up())
    return tmp_path / "some"


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Three training images of two licences and one of none, a validation image."""
    folder = tmp_path / "coco"
    for split, licences in {"train": (4, 1, 4, None), "val": (1,)}.items():
        images = [
            {"id": number, "file_name": f"{split}{number}.png", "width": 8, "height": 8}
            | ({"license": one} if one else {})
            for number, one in enumerate(licences)
        ]
        values = {
            "info": {"description": "Things", "url": "https://things.example", "year": 2020},
            "licenses": [
                {"id": 1, "name": "Attribution-NonCommercial License", "url": "https://example.org/by-nc"},
                {"id": 4, "name": "Attribution License", "url": "https://example.org/by"},
                {"id": 9, "name": "Never used"},
            ],
            "images": images,
            "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}],
            "categories": [{"id": 1, "name": "thing"}],
        }
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(values))
        (folder / split).mkdir()
        for image in images:
            assert cv2.imwrite(str(folder / split / image["file_name"]), np.zeros((8, 8, 3), np.uint8))
    return folder


def test_a_folder_that_declares_nothing(yolo: Path) -> None:
    assert declared(yolo) == ()
    assert origin_of(opened(yolo)) is None


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("README.md", "---\nlicense: cc-by-4.0\n---\n# Fish\nLicense: another\n", ["cc-by-4.0"]),
        ("README.md", "---\nlicense:\n- mit\n- odbl\n---\n", ["mit", "odbl"]),
        ("README.md", f"---\nlicence: {'long ' * 99}\n---\n", [f"{('long ' * 60)[:297].rstrip()}..."]),
        ("dataset.yaml", "license: AGPL-3.0\npath: x\n", ["AGPL-3.0"]),
        ("dataset_info.json", '{"license": "CC0", "features": {}}', ["CC0"]),
        ("README.dataset.txt", "Letters > v1\nProvided by someone\nLicense: CC BY 4.0\n", ["CC BY 4.0"]),
        ("README.md", "# Cells\n\n- **Licence:** MIT (see LICENSE)\nLicense: later\n", ["MIT (see LICENSE)"]),
        ("README.md", "# Cells\nThe license: ask us. Licensed under MIT.\nlicense\n: none\n", []),
    ],
)
def test_metadata_that_declares_a_licence(yolo: Path, name: str, text: str, expected: list[str]) -> None:
    (yolo / name).write_text(text)
    assert declared(yolo) == tuple(Licence(text=one, stated_in=name) for one in expected)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "# Fish\n\nThe license: as in the paper. Licensed under CC BY 4.0\n"),
        ("README.md", "---\n: [\n---\n"),
        ("README.md", "---\nlicense:\n---\n"),
        ("README.md", ""),
        ("LICENSE", "The MIT License (MIT)\n"),
        ("dataset_info.json", "[1"),
    ],
)
def test_files_that_declare_nothing(yolo: Path, name: str, text: str) -> None:
    """Free text is not a declaration."""
    (yolo / name).write_text(text)
    assert declared(yolo) == ()


def test_the_description_of_a_yolo_dataset(yolo: Path) -> None:
    description = yolo / "data.yaml"
    description.write_text(description.read_text() + "\nroboflow:\n  license: CC BY 4.0\n  version: 2\n")
    assert declared(yolo) == (Licence(text="CC BY 4.0", stated_in="data.yaml"),)


def test_contradicting_declarations_are_both_given(yolo: Path) -> None:
    (yolo / "data.yaml").write_text((yolo / "data.yaml").read_text() + "\nlicense: MIT\n")
    (yolo / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    assert [one.text for one in declared(yolo)] == ["cc-by-4.0", "MIT"]


def test_coco_files_say_it_of_each_image(coco: Path) -> None:
    where = "annotations/instances_train.json"
    assert declared(coco) == (
        Licence(text="Attribution License", url="https://example.org/by", stated_in=where, images=2),
        Licence(text="Attribution-NonCommercial License", url="https://example.org/by-nc", stated_in=where, images=1),
    )
    assert origin_of(opened(coco)) == "Things, https://things.example"


@pytest.mark.parametrize("licenses", [None, [], "mine", [{"name": "no id"}], [{"id": 4}]])
def test_odd_lists_of_licences(coco: Path, licenses: object) -> None:
    path = coco / "annotations/instances_train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"licenses": licenses, "info": []}))
    found = declared(coco)
    assert [(one.text, one.images) for one in found] == ([("4", 2)] if licenses == [{"id": 4}] else [])
    assert origin_of(opened(coco)) == "Things, https://things.example"  # as the other split says


def test_real_datasets(shared: Path) -> None:
    """Their READMEs have a line for it, with what it was taken from; data.yaml and COCO files declare it once more."""
    names = ("cones_cubes", "rubik", "chess_pieces", "turkish_road", "bccd")
    joint = open_joint([str(shared / "data" / name) for name in names])
    found = {one.name: [found.text for found in licences_of(one, joint.train_split(one))] for one in joint.sources}
    assert {name: {text.partition(" (")[0] for text in texts} for name, texts in found.items()} == {
        "cones_cubes": {"CC BY 4.0"},
        "rubik": {"MIT"},
        "chess_pieces": {"Public Domain"},
        "turkish_road": {"CC BY 4.0"},
        "bccd": {"MIT"},
    }
    assert found["bccd"] == ["MIT (LICENSE in the source repository)"]
