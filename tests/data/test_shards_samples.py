"""What the JSON of a sample may look like, and how shards are written and read again."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_trees import NAMES
from shard_trees import jpeg, tar, write
from test_shards_reading import cache, opened  # noqa: F401  (a fixture)
from test_writers import assert_same, counts, made, odd

from metr.data.datasets_file import DatasetSource
from metr.data.export import write_coco
from metr.data.export_shards import write_webdataset
from metr.data.images import read_image
from metr.data.records import ImageRecord
from metr.errors import DataError
from metr.inspection.duplicates import Place, equal_images, places_of

BOX = [4.0, 5.0, 10.0, 6.0]
WANTED = np.array([[4, 5, 14, 11]], dtype=np.float32)
SAID: dict[str, Any] = {
    "objects": {"objects": [{"bbox": BOX, "category": "cat"}]},
    "annotations": {"annotations": [{"bbox": BOX, "category": "cat", "area": 20, "segmentation": [[1, 2, 3, 4]]}]},
    "a list": [{"bbox": BOX, "label": "cat"}],
    "side by side": {"objects": {"bbox": [BOX], "categories": ["cat"]}},
    "at the top": {"boxes": [BOX], "labels": ["cat"], "caption": "a cat"},
    "numbered in the sample": {
        "annotations": [{"bbox": BOX, "category_id": 17}],
        "categories": [{"id": 17, "name": "cat"}],
    },
    "category_name": {"instances": [{"bbox": BOX, "category_name": "cat", "category_id": 3}]},
    "a category as an object": {"objects": [{"bbox": BOX, "category": {"id": 3, "name": "cat"}}]},
    "the image apart": {"image": {"width": 40, "height": 30}, "annotations": [{"bbox": BOX, "category": "cat"}]},
}


@pytest.mark.parametrize("way", SAID)
def test_ways_to_say_objects(way: str, tmp_path: Path) -> None:
    files = [("a.jpg", jpeg()), ("a.json", json.dumps(SAID[way]).encode())]
    write(tmp_path / "data", {"train-0.tar": tar(files)})
    source = opened(tmp_path / "data", splits={"train": "train"})
    (record,) = source.split("train")
    assert source.categories == ("cat",)
    np.testing.assert_array_equal(record.boxes, WANTED)
    assert (record.width, record.height) == (40, 30)


def test_numbers_are_named_beside_the_shards(tmp_path: Path) -> None:
    files = [("a.jpg", jpeg()), ("a.json", json.dumps({"objects": [{"bbox": BOX, "category": 1}]}).encode())]
    write(tmp_path / "data", {"train-0.tar": tar(files), "classes.txt": b"zebra\ncat\n"})
    source = opened(tmp_path / "data", splits={"train": "train"})
    assert source.categories == ("zebra", "cat")
    assert source.split("train")[0].labels.tolist() == [1]
    assert opened(tmp_path / "data", splits={"train": "train"}).categories == ("zebra", "cat")  # from the index


def test_files_of_a_sample(tmp_path: Path) -> None:
    """Keys end at the first dot; masks are no images; samples without an image or boxes are issues."""
    told = json.dumps({"objects": [{"bbox": BOX, "category": "cat"}]}).encode()
    files = [
        *(("in/a.mask.png", jpeg(kind="PNG")), ("in/a.JPG", jpeg()), ("in/a.json", told), ("in/a.txt", b"a cat")),
        *(("in/b.png", jpeg(kind="PNG")), ("in/b.json", b'{"objects": []}')),
        *(("c.jpg", jpeg()),),
        *(("d.json", told),),
        *(("e.jpg", jpeg()), ("e.json", b"{not json")),
        *(("f.jpg", b"not an image"), ("f.json", told)),
        *(("g.jpg", jpeg()), ("g.json", json.dumps({"objects": [{"bbox": [1, 2], "category": "cat"}]}).encode())),
        (".hidden.jpg", jpeg()),
    ]
    write(tmp_path / "data", {"train-0.tar": tar(files)})
    source = opened(tmp_path / "data", splits={"train": "train"})
    names = [record.path.relative_to(source.root).as_posix() for record in source.split("train")]
    assert names == ["train-0.tar/in/a.jpg", "train-0.tar/in/b.png", "train-0.tar/g.jpg"]
    assert [len(record.boxes) for record in source.split("train")] == [1, 0, 0]
    assert source.split("train")[2].annotated == ()
    assert {(issue.kind, issue.where) for issue in source.issues} == {
        ("unannotated image", "train-0.tar, c.jpg"),
        ("missing image", "train-0.tar, d"),
        ("unreadable annotation", "train-0.tar, e.jpg"),
        ("unreadable image", "train-0.tar, f.jpg"),
        ("unreadable box", "train-0.tar, g.jpg, box 1"),
    }


def test_boxes_of_another_kind(tmp_path: Path) -> None:
    """All boxes show that they are corners; the key `boxes` may say it."""
    files = []
    for number in range(8):
        told = {"objects": [{"bbox": [20 + number, 15, 39, 29], "category": "cat"}]}
        files += [(f"{number}.jpg", jpeg()), (f"{number}.json", json.dumps(told).encode())]
    write(tmp_path / "data", {"train-0.tar": tar(files)})
    for options in ({}, {"boxes": "xyxy"}):
        source = opened(tmp_path / "data", splits={"train": "train"}, **options)
        np.testing.assert_array_equal(source.split("train")[3].boxes, [[23, 15, 39, 29]])
    assert any(issue.kind == "boxes are not xywh" for issue in opened(tmp_path / "data").issues)


def read_again(source: DatasetSource, folder: Path, **options: Any) -> DatasetSource:
    report = write_webdataset(source, folder, **options)
    assert report.left_out == {}
    found = opened(folder, splits={split: split for split in source.splits})
    assert counts(found) == (report.images, report.boxes) == counts(source)
    assert found.categories == source.categories
    return found


def pairs(one: DatasetSource, other: DatasetSource) -> Iterator[tuple[ImageRecord, ImageRecord]]:
    for split in one.splits:
        yield from zip(one.split(split), other.split(split), strict=True)


def test_round_trip(tmp_path: Path) -> None:
    """Boxes, crowds, areas, ids, the order of the images and of the categories: all to the last bit."""
    source = odd(tmp_path / "data")
    for before, after in pairs(source, read_again(source, tmp_path / "out", images_a_shard=2)):
        assert_same(before, after)
        np.testing.assert_array_equal(before.boxes, after.boxes)
        np.testing.assert_array_equal(before.areas, after.areas)
        assert before.image_id == after.image_id
        np.testing.assert_array_equal(read_image(before.path), read_image(after.path, after.source))
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[:3] == [
        "classes.txt",
        "test-000000.tar",
        "train-000000.tar",
    ]


def test_round_trip_of_what_is_annotated(tmp_path: Path) -> None:
    source = made(tmp_path / "data", exhaustive=NAMES[:2])
    again = read_again(source, tmp_path / "out")
    assert {record.annotated for record in again.split("train")} == {(0, 1)}
    for before, after in pairs(source, again):
        assert before.annotated == after.annotated


def test_an_archive_of_another_format_is_none(tmp_path: Path) -> None:
    """A tar with COCO's JSON in it is a folder that was packed, and several archives are told as such."""
    made(tmp_path / "data")
    for name in ("one.tar", "two.tar"):
        shutil.make_archive(str(tmp_path / "packed" / name[:3]), "tar", tmp_path / "data")
    assert opened(tmp_path / "packed" / "one.tar").format == "coco"
    with pytest.raises(DataError, match="found 2 archives"):
        opened(tmp_path / "packed")


def test_shards_are_not_written_beside_themselves(tmp_path: Path) -> None:
    source = made(tmp_path / "data")
    again = read_again(source, tmp_path / "out")
    with pytest.raises(DataError, match="own folder"):
        write_webdataset(again, tmp_path / "out" / "again")
    with pytest.raises(DataError, match=f"^{tmp_path}/out: no 'holdout' split"):
        again.split("holdout")


def test_duplicates_and_other_exports_of_shards(tmp_path: Path) -> None:
    """Images in shards are compared by their bytes, and exported as files."""
    source = odd(tmp_path / "data")
    again = read_again(source, tmp_path / "out")
    places = places_of(again)
    assert len(equal_images([*places, *places_of(source)])) == 0  # one dataset's name: equal splits
    renamed = [replace(place, dataset="other") for place in places_of(source)]
    assert len(equal_images([*places, *renamed])) == len({image_of(place) for place in renamed})
    report = write_coco(again, tmp_path / "coco")
    assert (report.images, report.copied, report.left_out) == (len(places), len(places), {})
    for before, after in pairs(again, opened(tmp_path / "coco")):
        assert_same(before, after)


def image_of(place: Place) -> bytes:
    return place.path.read_bytes()


def test_equal_data_makes_equal_shards(tmp_path: Path) -> None:
    source = odd(tmp_path / "data")
    first = read_again(source, tmp_path / "first", images_a_shard=3)
    write_webdataset(first, tmp_path / "second", images_a_shard=3)
    for name in ("train-000000.tar", "train-000001.tar", "val-000000.tar"):
        one, other = ((tmp_path / folder / name).read_bytes() for folder in ("first", "second"))
        assert len(one) == len(other)
