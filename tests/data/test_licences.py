"""What datasets' folders say of their licences, as they say it."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from metr.data.datasets_file import DatasetSource, open_dataset, parse_data_arguments
from metr.data.joint import open_joint
from metr.data.licences import Licence, licences_of, origin_of, recognised_licence

from tiny import TinyRun


def opened(path: Path) -> DatasetSource:
    return open_dataset(parse_data_arguments([str(path)])[0])


def told(path: Path) -> tuple[Licence, ...]:
    source = opened(path)
    return licences_of(source, source.split("train"))


@pytest.fixture
def yolo(tiny_run: TinyRun, tmp_path: Path) -> Path:
    """A dataset that says nothing."""
    source = next(path for path in tiny_run.datasets if (path / "data.yaml").is_file())
    return Path(shutil.copytree(source, tmp_path / "some"))


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


def test_a_folder_that_says_nothing(yolo: Path) -> None:
    assert told(yolo) == ()
    assert origin_of(opened(yolo)) is None


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("LICENSE", "\nThe MIT License (MIT)\n\nCopyright (c) 2018", "MIT"),
        ("LICENCE.txt", "   Apache License\n   Version 2.0, January 2004\n", "Apache-2.0"),
        ("COPYING", "Ours alone.\nAsk before use.\n", "Ours alone."),
        ("README.md", "# Fish\n\n- Licence: CC BY 4.0 (see below)\n- licensed since 2010\n", "CC BY 4.0 (see below)"),
        ("readme.txt", "Provided by some\nLicense: Public Domain\n", "Public Domain"),
        ("README.md", "# Fish\n\n## License\n\nFree for research.\n\nMore.\n", "Free for research."),
        ("README.md", "---\nlicense: cc-by-4.0\n---\n# Fish\nLicense: another\n", "cc-by-4.0"),
        ("README.md", "---\nlicense:\n- mit\n---\n", "mit"),
        ("README.md", "**License:** [ODbL](https://example.org)\n", "[ODbL](https://example.org)"),
    ],
)
def test_files_that_say_so(yolo: Path, name: str, text: str, expected: str) -> None:
    (yolo / name).write_text(text)
    assert told(yolo) == (Licence(text=expected, stated_in=name),)


@pytest.mark.parametrize("text", ["# Fish\n", "We license nothing here.\n", "", "---\n: [\n---\n", "License:\n"])
def test_readmes_that_say_nothing(yolo: Path, text: str) -> None:
    (yolo / "README.md").write_text(text)
    assert told(yolo) == ()


def test_the_description_of_a_yolo_dataset(yolo: Path) -> None:
    description = yolo / "data.yaml"
    description.write_text(description.read_text() + "\nroboflow:\n  license: CC BY 4.0\n  version: 2\n")
    assert told(yolo) == (Licence(text="CC BY 4.0", stated_in="data.yaml"),)


def test_contradictions_are_both_told(yolo: Path) -> None:
    (yolo / "LICENSE").write_text("MIT License\n")
    (yolo / "README.md").write_text("License: CC BY 4.0\n" * 2)
    assert [one.text for one in told(yolo)] == ["MIT", "CC BY 4.0"]


def test_coco_files_say_it_of_each_image(coco: Path) -> None:
    where = "annotations/instances_train.json"
    assert told(coco) == (
        Licence(text="Attribution License", url="https://example.org/by", stated_in=where, images=2),
        Licence(text="Attribution-NonCommercial License", url="https://example.org/by-nc", stated_in=where, images=1),
    )
    assert origin_of(opened(coco)) == "Things, https://things.example"


@pytest.mark.parametrize("licenses", [None, [], "mine", [{"name": "no id"}], [{"id": 4}]])
def test_odd_lists_of_licences(coco: Path, licenses: object) -> None:
    path = coco / "annotations/instances_train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"licenses": licenses, "info": []}))
    found = told(coco)
    assert [(one.text, one.images) for one in found] == ([("4", 2)] if licenses == [{"id": 4}] else [])
    assert origin_of(opened(coco)) == "Things, https://things.example"  # as the other split says


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International", "CC-BY-NC-SA-4.0"),
        ("Creative Commons Attribution 4.0 International Public License", "CC-BY-4.0"),
        ("Attribution-NoDerivatives 4.0 International", "CC-BY-ND-4.0"),
        ("GNU AFFERO GENERAL PUBLIC LICENSE\n Version 3, 19 November 2007", "AGPL-3.0"),
        ("CC0 1.0 Universal", "CC0-1.0"),
        ("All rights reserved.", None),
    ],
)
def test_common_licences_by_their_text(text: str, expected: str | None) -> None:
    assert recognised_licence(text) == expected


def test_real_datasets(shared: Path) -> None:
    names = ("bccd", "playing_cards", "aquarium", "chess_pieces")
    joint = open_joint([str(shared / "data" / name) for name in names])
    first = {one.name: licences_of(one, joint.train_split(one))[0].text for one in joint.sources}
    assert first == {
        "bccd": "MIT",
        "playing_cards": "Apache-2.0",
        "aquarium": "CC BY 4.0",
        "chess_pieces": "Public Domain",
    }
