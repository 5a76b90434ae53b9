"""Pascal VOC: layouts, sizes, difficult objects, and everything that may be wrong in a file."""

from pathlib import Path

import numpy as np
import pytest
from reader_trees import ExpectedImage, save_image, voc_xml, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.errors import DataError

IMAGE = ExpectedImage("a.jpg", 40, 30, ((2, 3, 12, 23),), ("cat",))


def opened(root: Path) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root), root.parent / "cache")


def beside(tmp_path: Path, xml: str, image: str = "a.jpg") -> DatasetSource:
    """A dataset of one valid annotation file and one with the given content."""
    root = tmp_path / "data"
    for name in (image, "sound.jpg"):
        save_image(root / "val" / name)
    write_text(root / "val" / "a.xml", xml)
    sound = ExpectedImage("sound.jpg", 40, 30, ((1, 1, 5, 5),), ("dog",))
    write_text(root / "val" / "sound.xml", voc_xml(sound))
    return opened(root)


def item(name: str = "<name>cat</name>", corners: tuple[object, ...] = (2, 3, 12, 23), extra: str = "") -> str:
    xmin, ymin, xmax, ymax = corners
    box = f"<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>"
    return f"<object>{name}{extra}{box}</object>"


def document(*parts: str, size: str = "<size><width>40</width><height>30</height></size>") -> str:
    return f"<annotation>{size}{''.join(parts)}</annotation>"


@pytest.mark.parametrize(
    "size",
    [
        "",
        "<size><width>0</width><height>0</height></size>",
        "<size/>",
        "<size><width>nan</width><height>x</height></size>",
        "<size><width>-40</width><height>30</height></size>",
    ],
)
def test_sizes_that_say_nothing_are_probed(tmp_path: Path, size: str) -> None:
    record = beside(tmp_path, document(item(), size=size)).split("val")[0]
    assert (record.width, record.height) == (40, 30)


def test_difficult_objects_are_ignored(tmp_path: Path) -> None:
    source = beside(tmp_path, document(item(extra="<difficult>1</difficult>"), item(extra="<difficult>0</difficult>")))
    assert source.split("val")[0].ignore.tolist() == [True, False]


def test_the_original_files_count_from_one(tmp_path: Path) -> None:
    source = "<source><database>The VOC2007 Database</database></source>"
    record = beside(tmp_path, document(source, item(corners=(1, 1, 40, 30)))).split("val")[0]
    np.testing.assert_array_equal(record.boxes, [[0, 0, 40, 30]])


def test_an_image_without_objects(tmp_path: Path) -> None:
    source = beside(tmp_path, document())
    assert source.split("val")[0].boxes.shape == (0, 4)
    assert source.split("val").counts().empty == 1


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (item(corners=(12, 3, 12, 23)), "degenerate box"),
        (item(corners=(50, 3, 60, 23)), "box outside"),
        (item(corners=("x", 3, 60, 23)), "unreadable box"),
        (item(corners=("nan", 3, 60, 23)), "unreadable box"),
        (item(corners=(1, 3, "inf", 23)), "unreadable box"),
        ("<object><name>cat</name></object>", "unreadable box"),
        (item(name=""), "unknown category"),
        (item(name="<name> </name>"), "unknown category"),
    ],
)
def test_wrong_objects_are_dropped_and_counted(tmp_path: Path, wrong: str, kind: str) -> None:
    source = beside(tmp_path, document(item(), wrong, item(corners=(1, 1, 3, 3))))
    assert source.issue_counts == {kind: 1}
    assert source.issues[0].where == "val/a.xml, object 2"
    np.testing.assert_array_equal(source.split("val")[0].boxes, [[2, 3, 12, 23], [1, 1, 3, 3]])


def test_boxes_are_clipped(tmp_path: Path) -> None:
    source = beside(tmp_path, document(item(corners=(-5, 3, 45, 23))))
    np.testing.assert_array_equal(source.split("val")[0].boxes, [[0, 3, 40, 23]])
    assert source.issue_counts == {"box clipped": 1}


@pytest.mark.parametrize(
    ("xml", "image", "issues"),
    [
        ("<annotation><object>", "a.jpg", {"unreadable annotation": 1, "unannotated image": 1}),
        ("", "a.jpg", {"unreadable annotation": 1, "unannotated image": 1}),
        ("<other/>", "a.jpg", {"unreadable annotation": 1, "unannotated image": 1}),
        (document(item()), "b.jpg", {"missing image": 1, "unannotated image": 1}),
        (document("<filename>../../a.jpg</filename>"), "b.jpg", {"path outside": 1, "unannotated image": 1}),
        (document("<filename>/etc/a.jpg</filename>"), "b.jpg", {"path outside": 1, "unannotated image": 1}),
    ],
)
def test_wrong_files_are_skipped_and_counted(tmp_path: Path, xml: str, image: str, issues: dict[str, int]) -> None:
    save_image(tmp_path / "a.jpg")
    source = beside(tmp_path, xml, image)
    assert source.issue_counts == issues
    assert [record.path.name for record in source.split("val")] == ["sound.jpg"]


def test_entities_do_not_unfold(tmp_path: Path) -> None:
    levels = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    bomb = f'<!DOCTYPE x [<!ENTITY e0 "{"a" * 100}">{levels}]><annotation><filename>&e11;</filename></annotation>'
    assert beside(tmp_path, bomb).issue_counts["unreadable annotation"] == 1


def test_a_stale_file_name_gives_way_to_the_same_stem(tmp_path: Path) -> None:
    source = beside(tmp_path, document("<filename>old name.png</filename>", item()))
    assert source.split("val")[0].path.name == "a.jpg"
    assert source.issue_counts == {}


def test_the_file_name_is_used_where_no_stem_fits(tmp_path: Path) -> None:
    source = beside(tmp_path, document("<filename>B.jpg</filename>", item()), image="b.JPG")
    assert source.split("val")[0].path.name == "b.JPG"


def listed(root: Path, **lists: str) -> None:
    for name, text in lists.items():
        write_text(root / "ImageSets" / "Main" / f"{name}.txt", text)
    for stem in ("a", "b c"):
        save_image(root / "JPEGImages" / f"{stem}.jpg")
        write_text(root / "Annotations" / f"{stem}.xml", voc_xml(IMAGE))


def test_lists_with_spaces_columns_and_missing_files(tmp_path: Path) -> None:
    listed(tmp_path / "data", train="b c\n\na  1\nmissing -1\n", val="a")
    source = opened(tmp_path / "data")
    assert [record.path.stem for record in source.split("train")] == ["b c", "a"]
    assert source.issue_counts == {"missing annotation": 1}
    assert source.issues[0].where == "ImageSets/Main/train.txt:4"


def test_trainval_serves_as_train_where_there_is_no_train(tmp_path: Path) -> None:
    listed(tmp_path / "data", trainval="b c", test="a")
    assert {split: len(found) for split, found in opened(tmp_path / "data").splits.items()} == {"train": 1, "test": 1}


def test_one_default_list_is_split(tmp_path: Path) -> None:
    listed(tmp_path / "data", default="b c\na")
    assert {split: len(found) for split, found in opened(tmp_path / "data").splits.items()} == {"train": 1, "val": 1}


def test_a_split_without_images_is_left_out(tmp_path: Path) -> None:
    listed(tmp_path / "data", train="a", val="b c", test="x\ny")
    source = opened(tmp_path / "data")
    assert list(source.splits) == ["train", "val"]
    assert source.issue_counts == {"empty split": 1, "missing annotation": 2}


def test_no_image_at_all(tmp_path: Path) -> None:
    listed(tmp_path / "data", train="x", val="y")
    with pytest.raises(DataError, match="no image is left") as caught:
        opened(tmp_path / "data")
    assert caught.value.hint is not None


@pytest.mark.parametrize("corners", [(12, 23, 2, 3), (12, 3, 2, 23), (2, 23, 12, 3)])
@pytest.mark.parametrize("first", [0, 1])
def test_swapped_corners_are_sorted_and_counted(tmp_path: Path, corners: tuple[int, ...], first: int) -> None:
    origin = "<source><database>The VOC2007 Database</database></source>" if first else ""
    source = beside(tmp_path, document(origin, item(corners=corners)))
    np.testing.assert_array_equal(source.split("val")[0].boxes, [[2 - first, 3 - first, 12, 23]])
    assert source.issue_counts == {"swapped corners": 1}


CHINESE = document("<folder>视频</folder>", item(name="<name>红细胞</name>"))


@pytest.mark.parametrize(
    ("content", "names", "said"),
    [
        (CHINESE.encode("gbk"), ("dog", "红细胞"), 1),
        (b'<?xml version="1.0" encoding="gb2312"?>' + CHINESE.encode("gbk"), ("dog", "红细胞"), 0),
        (b"<?xml version='1.0' encoding='GBK' ?>" + CHINESE.encode("gbk"), ("dog", "红细胞"), 0),
        (b'<?xml version="1.0" encoding="utf-8"?>' + CHINESE.encode("gbk"), ("dog", "红细胞"), 1),
        (b'<?xml version="1.0" encoding="Big5"?>' + "<annotation/>".encode("big5"), ("dog",), 0),
        (CHINESE.encode("utf-16"), ("dog", "红细胞"), 0),
        (CHINESE.encode("utf-8-sig"), ("dog", "红细胞"), 0),
        (document(item(name="<name>café</name>")).encode("cp1252"), ("café", "dog"), 1),
        (document(item(name="<name>été</name>")).encode("cp1252"), ("dog", "été"), 1),
        (document(item()).encode() + b"\n\0\0\0", ("cat", "dog"), 0),
        (document(item()).encode() + b"\x1a", ("cat", "dog"), 0),
        (b"\n " + b'<?xml version="1.0"?>' + document(item()).encode(), ("cat", "dog"), 0),
        (document(item(name="<name>salt & pepper</name>")).encode(), ("dog", "salt & pepper"), 0),
        (
            document(item(name="<name>salt &amp; &#112;epper & more</name>")).encode(),
            ("dog", "salt & pepper & more"),
            0,
        ),
    ],
)
def test_texts_as_tools_leave_them(tmp_path: Path, content: bytes, names: tuple[str, ...], said: int) -> None:
    root = tmp_path / "data"
    for name in ("a", "sound"):
        save_image(root / "val" / f"{name}.jpg")
    (root / "val" / "a.xml").write_bytes(content)
    write_text(root / "val" / "sound.xml", voc_xml(ExpectedImage("sound.jpg", 40, 30, ((1, 1, 5, 5),), ("dog",))))
    source = opened(root)
    assert source.categories == names
    assert len(source.split("val")) == 2
    assert source.issue_counts == ({"not UTF-8": 1} if said else {})


@pytest.mark.parametrize(
    "lines",
    [
        "a.jpg\nb c.JPG\n",
        "JPEGImages/a.jpg\n./JPEGImages/b c.jpg\n",
        "/home/me/VOC2007/JPEGImages/a.jpg\nC:\\voc\\JPEGImages\\b c.jpg\n",
        "a.xml\nb c.xml",
        "A\nB C\n",
        "./JPEGImages/a.jpg ./Annotations/a.xml\nb c",
    ],
)
def test_lists_name_images_in_many_ways(tmp_path: Path, lines: str) -> None:
    listed(tmp_path / "data", train=lines, val="a")
    source = opened(tmp_path / "data")
    assert [record.path.stem for record in source.split("train")] == ["a", "b c"]
    assert source.issue_counts == {}


def test_a_name_with_a_dot_is_no_suffix(tmp_path: Path) -> None:
    listed(tmp_path / "data", train="a.v2", val="a")
    assert opened(tmp_path / "data").issue_counts == {"missing annotation": 1, "empty split": 1}


@pytest.mark.parametrize(
    ("annotations", "sets", "images"),
    [
        ("annotations", "ImageSets/Main", "JPEGImages"),
        ("Annotations", "imagesets/main", "jpegimages"),
        ("Annotations", "ImageSets", "images"),
        ("xml", "ImageSets/Main", "image"),
        ("Annotations", "ImageSets/Main", "JPEGImages-trainval"),
    ],
)
def test_folders_beside_lists_are_called_in_many_ways(tmp_path: Path, annotations: str, sets: str, images: str) -> None:
    root = tmp_path / "data"
    for name in ("a", "b"):
        save_image(root / images / f"{name}.jpg")
        write_text(root / annotations / f"{name}.xml", voc_xml(IMAGE))
    write_text(root / sets / "train.txt", "a\n")
    write_text(root / sets / "val.txt", "b\n")
    source = opened(root)
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 1, "val": 1}
    assert source.issue_counts == {}


def test_images_of_one_annotation_folder_lie_in_two(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split, name in (("trainval", "a"), ("test", "b")):
        save_image(root / f"JPEGImages-{split}" / f"{name}.jpg")
        write_text(root / "Annotations" / f"{name}.xml", voc_xml(IMAGE))
        write_text(root / "ImageSets" / "Main" / f"{split}.txt", f"{name}\n")
    source = opened(root)
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 1, "test": 1}
    assert source.issue_counts == {}


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/train", "images"),
        ("annotations/train", "images/train"),
        ("train_annotations", "train_images"),
        ("train/Annotations", "train/Image"),
        ("labels_xml/train", "imgs/train"),
    ],
)
def test_images_beside_folders_of_annotations(tmp_path: Path, annotations: str, images: str) -> None:
    root = tmp_path / "data"
    for name in ("a", "b"):
        save_image(root / images / f"{name}.jpg")
        write_text(root / annotations / f"{name}.xml", voc_xml(IMAGE))
    source = opened(root)
    assert sum(map(len, source.splits.values())) == 2
    assert source.issue_counts == {}


def test_images_of_two_splits_in_one_folder_are_all_annotated(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split, name in (("train", "a"), ("test", "b")):
        save_image(root / "images" / f"{name}.jpg")
        write_text(root / "annotations" / split / f"{name}.xml", voc_xml(IMAGE))
    save_image(root / "images" / "c.jpg")
    source = opened(root)
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 1, "test": 1}
    assert {issue.where for issue in source.issues} == {"images/c.jpg"}
