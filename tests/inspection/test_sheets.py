"""Contact sheets: which images are on them, and where they may be written."""

from pathlib import Path

import numpy as np
import pytest
from inspection_datasets import save_noise, write_csv
from PIL import Image

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.errors import ConfigError, DataError
from metr.inference.draw import Colour, palette
from metr.inspection.facts import facts_of
from metr.inspection.sheets import check_folder, draw_sheet, file_stem


def opened(root: Path, **options: object) -> DatasetSource:
    return open_dataset(DatasetConfig(name=root.name, path=root, **options), root.parent / "cache")


def pixels_of(path: Path, colour: Colour) -> int:
    """Pixels of a sheet that are nearly of a colour (JPEG blurs)."""
    with Image.open(path) as image:
        pixels = np.asarray(image).astype(int)
    distance = np.abs(pixels - np.array(colour)).sum(-1)
    return int((distance < 60).sum())


def test_every_category_is_shown_though_most_images_are_of_one(tmp_path: Path) -> None:
    train = [f"{number:03d}.png,5,5,30,25,cat" for number in range(60)]
    train += [f"{57 + number:03d}.png,5,5,30,25,{name}" for number, name in enumerate(["dog", "hen"])]
    root = write_csv(tmp_path / "pets", {"train": train, "val": ["900.png,2,2,20,20,cow"]})
    for path in root.rglob("*.png"):  # colours are drawn boxes alone
        with Image.open(path) as image:
            size = image.size
        Image.new("RGB", size, (128, 128, 128)).save(path)
    source = opened(root)
    sheet = draw_sheet(source, facts_of(source, most=1000), tmp_path / "sheets")
    assert sheet.path == tmp_path / "sheets" / "pets.jpg"
    assert (sheet.images, sheet.missing) == (12, ())
    colours = palette([*source.categories, "none"])
    by_chance = pixels_of(sheet.path, colours["none"])
    found = {name: pixels_of(sheet.path, colours[name]) for name in ("cat", "dog", "hen", "cow")}
    assert min(found.values()) > 50 + by_chance, (found, by_chance)


def test_a_small_image_is_enlarged(tmp_path: Path) -> None:
    source = opened(write_csv(tmp_path / "pets", {"train": ["a.png,5,5,30,25,cat"], "val": ["b.png,,,,,"]}))
    sheet = draw_sheet(source, facts_of(source, most=10), tmp_path)
    assert sheet.images == 2
    with Image.open(sheet.path) as image:
        width, height = image.size
    assert (width, height) > (960, 360)  # two of 480 x 360, made of 40 x 30


def test_categories_that_have_no_room_are_named(tmp_path: Path) -> None:
    train = [f"{number:03d}.png,5,5,30,25,kind {number:03d}" for number in range(50)]
    source = opened(write_csv(tmp_path / "pets", {"train": train, "val": ["900.png,,,,,"]}))
    sheet = draw_sheet(source, facts_of(source, most=1000), tmp_path)
    assert (sheet.images, len(sheet.missing)) == (48, 2)


def test_broken_images_are_passed_over(tmp_path: Path) -> None:
    lines = ["a.png,5,5,30,25,cat", "b.png,5,5,30,25,cat", "c.png,5,5,30,25,cat"]
    root = write_csv(tmp_path / "pets", {"train": lines, "val": ["d.png,,,,,"]})
    source = opened(root)
    facts = facts_of(source, most=10)
    (root / "images/a.png").write_bytes(b"no image")
    assert draw_sheet(source, facts, tmp_path).images == 3
    for name in "bcd":
        (root / f"images/{name}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="no image can be read"):
        draw_sheet(source, facts, tmp_path)


def test_sheets_stay_out_of_datasets(tmp_path: Path) -> None:
    source = opened(write_csv(tmp_path / "pets", {"train": ["a.png,5,5,30,25,cat"], "val": ["b.png,,,,,"]}))
    check_folder(tmp_path / "sheets", [source])
    with pytest.raises(ConfigError, match="inside the dataset pets"):
        check_folder(tmp_path / "pets" / "sheets", [source])
    with pytest.raises(ConfigError, match="found the file"):
        check_folder(save_noise(tmp_path / "file.png", 1), [source])


def test_names_that_are_no_names_of_files() -> None:
    assert [file_stem(name) for name in ("my/pets", "..", "a:b")] == ["my_pets", "dataset", "a_b"]
