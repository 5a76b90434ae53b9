"""What is counted and measured of a dataset, and its image files."""

import shutil
from pathlib import Path

import pytest
from inspection_datasets import SPELLING, dataset_facts, name_facts, save_noise, write_csv
from PIL import Image

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.inspection.duplicates import equal_images, equal_names, overlaps, places_of
from metr.inspection.facts import facts_of, spread, strays_of, without_boxes
from metr.inspection.label_report import inspect_datasets


def opened(root: Path, **options: object) -> DatasetSource:
    return open_dataset(DatasetConfig(name=root.name, path=root, **options), root.parent / "cache")


def test_counts_and_sizes(tmp_path: Path) -> None:
    save_noise(tmp_path / "pets/images/big.png", 1, (200, 200))
    lines = ["big.png,0,0,20,20,cat", "big.png,0,0,50,50,cat", "big.png,0,0,100,100,dog", "big.png,0,0,100,50,dog"]
    root = write_csv(tmp_path / "pets", {"train": [*lines, "a.png,0,0,10,30,cat"], "val": ["b.png,,,,,"]})
    facts = facts_of(opened(root), most=10)
    assert facts.images == {"train": 2, "val": 1}
    assert (facts.boxes, facts.empty, facts.ignored, facts.looked_at) == (5, 1, 0, 3)
    cat, dog = facts.names["cat"], facts.names["dog"]
    assert cat.boxes == {"train": 3, "val": 0}
    assert cat.side == pytest.approx(0.25)  # 0.1, 0.25 and 0.5
    assert dog.side == pytest.approx((0.5 + 5000**0.5 / 200) / 2)
    assert facts.sizes is not None
    assert facts.sizes.side == pytest.approx(5000**0.5 / 200)
    # 400 and 300 | 2,500 and 5,000 | 10,000 square pixels
    assert (facts.sizes.small, facts.sizes.medium, facts.sizes.large) == pytest.approx((0.4, 0.4, 0.2))
    assert sorted(map(tuple, facts.shown.tolist())) == [(0, 0), (0, 1), (1, 0)]


def test_a_dataset_without_boxes(tmp_path: Path) -> None:
    source = opened(write_csv(tmp_path / "pets", {"train": ["a.png,0,0,5,5,cat"], "val": ["b.png,,,,,"]}))
    empty = DatasetSource(**{**vars(source), "splits": {"val": source.split("val")}})
    facts = facts_of(empty, most=10)
    assert (facts.sizes, facts.boxes, facts.names["cat"].side) == (None, 0, None)


def test_what_is_annotated_here_and_there(tmp_path: Path) -> None:
    lines = ["a.png,0,0,5,5,cat", "b.png,0,0,5,5,dog"]
    root = write_csv(tmp_path / "pets", {"train": lines, "val": ["c.png,,,,,"]})
    facts = facts_of(opened(root, exhaustive=("cat",)), most=10)
    assert (facts.names["cat"].annotated, facts.names["dog"].annotated) == (1, 0)


def test_few_images_are_spread_evenly(tmp_path: Path) -> None:
    train = [f"{number:02d}.png,0,0,5,5,cat" for number in range(8)]
    source = opened(write_csv(tmp_path / "pets", {"train": train, "val": ["90.png,,,,,", "91.png,,,,,"]}))
    picked = [(split, record.path.stem) for split, record in spread(source, 4)]
    assert picked == [("train", "00"), ("train", "03"), ("train", "06"), ("val", "91")]
    assert len(list(spread(source, 10))) == 10


def test_categories_without_a_box() -> None:
    (issue,) = without_boxes(dataset_facts("pets", ["cat", name_facts("unicorn", 0), name_facts("dog", 1)]))
    assert (issue.kind, issue.where) == ("category without a box", "categories")
    assert issue.detail.startswith("'unicorn': label it, take it out of the annotation files, or use `renames`")


def test_strays() -> None:
    def told(bare: int, other: int) -> int:
        return len(strays_of(dataset_facts("chess", [name_facts("bishop", bare), name_facts("white-bishop", other)])))

    assert told(1, 200) == 1
    assert told(0, 200) == 0
    assert told(5, 20) == 0


def test_images_that_are_the_same(tmp_path: Path) -> None:
    train = [f"{name}.png,0,0,5,5,cat" for name in ("a", "b", "c", "12")]
    one = write_csv(tmp_path / "one", {"train": train, "val": ["d.png,,,,,", "e.png,,,,,"]})
    two = write_csv(tmp_path / "two", {"train": ["x.png,0,0,5,5,cat"], "val": ["y.png,,,,,"]})
    shutil.copy(one / "images/a.png", one / "images/d.png")
    shutil.copy(one / "images/b.png", two / "images/y.png")
    # as long as another file, but not the same
    content = bytearray((one / "images/c.png").read_bytes())
    content[-30] ^= 1
    (one / "images/e.png").write_bytes(content)
    places = [place for root in (one, two) for place in places_of(opened(root))]
    groups = [{f"{place.dataset}/{place.shown}" for place in group} for group in equal_images(places)]
    assert sorted(map(sorted, groups)) == [
        ["one/images/a.png", "one/images/d.png"],
        ["one/images/b.png", "two/images/y.png"],
    ]
    (common,) = overlaps(equal_images(places))
    assert (common.first.group, common.second.group, common.images) == (("one", "train"), ("two", "val"), 1)


def test_names_that_repeat(tmp_path: Path) -> None:
    def place(split: str, name: str) -> object:
        root = write_csv(tmp_path / f"{split}-{name}", {split: [f"{name},0,0,5,5,cat"], "other": ["z.png,0,0,5,5,cat"]})
        return next(one for one in places_of(opened(root)) if one.split == split)

    key = "0123456789abcdef0123456789abcdef"
    places = [place("train", "street_jpg.rf.1" + key[1:] + ".png"), place("val", "street_jpg.rf.2" + key[1:] + ".png")]
    assert len(equal_names(places)) == 1
    assert equal_names([place("train", "0012.png"), place("val", "0012.png")]) == []  # numbers are not names
    assert equal_names([place("train", "a.png"), place("train", "a.jpg")]) == []  # of one split


def test_duplicates_and_broken_images_are_issues(tmp_path: Path) -> None:
    train = [f"{name}.png,0,0,5,5,cat" for name in ("a", "b", "c", "other")]
    val = [f"{name}.png,0,0,5,5,cat" for name in ("d", "deep/b", "deep/other")]
    root = write_csv(tmp_path / "pets", {"train": train, "val": val})
    with Image.open(root / "images/b.png") as noise:
        image = noise.resize((8, 6)).resize((160, 120), Image.Resampling.BICUBIC)
    image.save(root / "images/b.png")  # turned and saved anew; two images called `other` differ
    image.transpose(Image.Transpose.ROTATE_90).save(root / "images/deep/b.png")
    shutil.copy(root / "images/a.png", root / "images/d.png")
    source = opened(root)
    (root / "images/c.png").write_bytes(b"")
    found = inspect_datasets([source], SPELLING).issues["pets"]
    assert found.counts == {
        "unreadable image": 1,
        "same image in two splits": 1,
        "same image in two splits, saved anew": 1,
    }
    detail = {issue.kind: (issue.where, issue.detail) for issue in found.first}
    assert detail["same image in two splits"] == ("images/a.png", "is in train; val has it as images/d.png")
    where, why = detail["same image in two splits, saved anew"]
    assert (where, why) == ("images/b.png", "is in train; val has it as images/deep/b.png, saved anew")
    assert (found.opened, found.images) == (7, 7)


def test_large_datasets_are_opened_in_part_unless_all_is_wanted(tmp_path: Path) -> None:
    train = [f"{name}.png,0,0,5,5,cat" for name in "abcd"]
    root = write_csv(tmp_path / "pets", {"train": train, "val": ["e.png,,,,,"]})
    shutil.copy(root / "images/b.png", root / "images/e.png")
    few = SPELLING.model_copy(update={"files": 2})
    part = inspect_datasets([opened(root)], few).issues["pets"]
    assert (part.opened, part.counts) == (2, {"split without a box": 1})
    assert inspect_datasets([opened(root)], few, every_image=True).issues["pets"].counts == {
        "split without a box": 1,
        "same image in two splits": 1,
    }
    # a header tells nothing of what is missing behind it
    whole = (root / "images/d.png").read_bytes()
    (root / "images/d.png").write_bytes(whole[: len(whole) // 2])
    every = SPELLING.model_copy(update={"files": 99})
    assert "unreadable image" not in inspect_datasets([opened(root)], every).issues["pets"].counts
    assert inspect_datasets([opened(root)], every, every_image=True).issues["pets"].counts["unreadable image"] == 1
