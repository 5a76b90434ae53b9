"""CVAT for images and MIT's LabelMe: every shape, subsets, deleted objects; neither is taken for Pascal VOC."""

from pathlib import Path

import numpy as np
import pytest
from reader_trees import made_up, save_image, voc_beside, write_text
from tool_trees import cvat_xml

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.formats.registry import recognise
from metr.errors import DataError

LABELS = "".join(f"<label><name>{name}</name><attributes></attributes></label>" for name in ("dog", "cat", "unused"))
POINT = '<points label="cat" points="3.0,4.0;5.0,6.0"></points>'
SKELETON = (
    "<label><name>person</name><type>skeleton</type></label><label><name>nose</name><parent>person</parent></label>"
)


def cvat(tmp_path: Path, *images: str, labels: str = LABELS) -> DatasetSource:
    """A dataset of these elements `image`, whose images are all there."""
    root = tmp_path / "data"
    for name in "abc":
        save_image(root / "images" / f"{name}.jpg")
    meta = f"<meta><task><mode>annotation</mode><labels>{labels}</labels></task></meta>"
    text = f"<annotations><version>1.1</version>{meta}{''.join(images)}</annotations>"
    write_text(root / "annotations.xml", f"<?xml version='1.0' encoding='utf-8'?>\n{text}")
    return open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")


def image(shapes: str, name: str = "a.jpg", rest: str = "") -> str:
    return f'<image id="0" name="{name}" width="40" height="30"{rest}>{shapes}</image>'


def box(label: str = "cat", rest: str = "", corners: tuple[float, ...] = (2, 3, 12, 23)) -> str:
    left, top, right, bottom = corners
    place = f'xtl="{left}" ytl="{top}" xbr="{right}" ybr="{bottom}"'
    return f'<box label="{label}" occluded="0" {place}{rest}><attribute name="age">3</attribute></box>'


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (box(), [2, 3, 12, 23]),
        (box(rest=' rotation="180.0"'), [2, 3, 12, 23]),
        (box(rest=' rotation="90.00"', corners=(10, 5, 30, 15)), [15, 0, 25, 20]),
        (
            box(rest=' rotation="45"', corners=(10, 10, 20, 20)),
            [15 - 50**0.5, 15 - 50**0.5, 15 + 50**0.5, 15 + 50**0.5],
        ),
        ('<polygon label="cat" points="2.0,10.0;7.0,3.0;12.0,23.0"></polygon>', [2, 3, 12, 23]),
        ('<polyline label="cat" points="2.0,3.0;12.0,23.0"></polyline>', [2, 3, 12, 23]),
        ('<ellipse label="cat" cx="10" cy="12" rx="5" ry="7"></ellipse>', [5, 5, 15, 19]),
        ('<ellipse label="cat" cx="15" cy="12" rx="5" ry="7" rotation="90"></ellipse>', [8, 7, 22, 17]),
        ('<mask label="cat" rle="3, 5" left="2" top="3" width="10" height="20"></mask>', [2, 3, 12, 23]),
        (
            '<cuboid label="cat" xtl1="2" ytl1="3" xbl1="2" ybl1="20" xtr1="9" ytr1="4" xbr1="9" ybr1="21" '
            'xtl2="5" ytl2="5" xbl2="5" ybl2="23" xtr2="12" ytr2="6" xbr2="12" ybr2="22"></cuboid>',
            [2, 3, 12, 23],
        ),
    ],
)
def test_cvat_shapes_are_read_as_the_boxes_around_them(tmp_path: Path, shape: str, expected: list[float]) -> None:
    source = cvat(tmp_path, image(shape), image("", "b.jpg"))
    assert source.issue_counts == {}
    records = [record for split in source.splits.values() for record in split]
    found = {record.path.name: record.boxes for record in records}
    np.testing.assert_allclose(found["a.jpg"], [expected], atol=1e-4)
    assert len(found["b.jpg"]) == 0


def test_cvat_declares_its_labels_in_order(tmp_path: Path) -> None:
    source = cvat(tmp_path, image(box("cat") + '<tag label="dog"></tag>'), image("", "b.jpg"))
    assert source.categories == ("dog", "cat", "unused")
    assert cvat(tmp_path / "more", image(box("person")), image("", "b.jpg"), labels=SKELETON).categories == ("person",)


def test_cvat_points_make_their_category_unknown(tmp_path: Path) -> None:
    source = cvat(tmp_path, image(POINT + box("dog")), image("", "b.jpg"))
    assert source.issue_counts == {"unsupported shape": 1}
    annotated = {record.path.name: record.annotated for split in source.splits.values() for record in split}
    assert annotated == {"a.jpg": (0, 2), "b.jpg": None}


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (box(label=""), "unknown category"),
        ('<box label="cat" xtl="2" ytl="3"></box>', "unreadable box"),
        (box(rest=' rotation="far"'), "unreadable box"),
        ('<polygon label="cat" points="2.0"></polygon>', "unreadable box"),
        ('<polygon label="cat" points=""></polygon>', "unreadable box"),
        (box(corners=(2, 3, 2, 23)), "degenerate box"),
    ],
)
def test_wrong_cvat_shapes_are_left_out_and_counted(tmp_path: Path, wrong: str, kind: str) -> None:
    source = cvat(tmp_path, image(wrong + box()), image(box("dog"), "b.jpg"))
    assert source.issue_counts == {kind: 1}
    assert source.issues[0].where.startswith("annotations.xml, image 0, ")


def test_a_cvat_file_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    images = [(item, None) for item in made_up()["train"]]
    for item, _ in images:
        save_image(tmp_path / "images" / item.name)
    text = cvat_xml(images)
    write_text(tmp_path / "annotations.xml", text[: len(text) * 3 // 4])
    with pytest.raises(DataError, match=r"annotations\.xml: not readable as CVAT's XML"):
        open_dataset(DatasetConfig(name="made", path=tmp_path), tmp_path / "cache")


def test_cvat_subsets_are_splits(tmp_path: Path) -> None:
    images = [
        image(box(), f"{name}.jpg", f' subset="{subset}"')
        for name, subset in zip("abc", ("Train", "Validation", "default"), strict=True)
    ]
    source = cvat(tmp_path, *images)
    assert {name: [record.path.name for record in split] for name, split in source.splits.items()} == {
        "train": ["a.jpg"],
        "val": ["b.jpg"],
        "default": ["c.jpg"],
    }


def test_one_cvat_file_can_be_named(tmp_path: Path) -> None:
    cvat(tmp_path, image(box()), image("", "b.jpg"))
    assert recognise(tmp_path / "data" / "annotations.xml").format == "cvat"


def labelme(tmp_path: Path, *objects: str) -> DatasetSource:
    root = tmp_path / "data"
    for name in "ab":
        save_image(root / "Images" / "val" / f"{name}.jpg")
        text = "".join(objects) if name == "a" else polygon("dog", "1,1 9,1 9,9")
        size = "<imagesize><nrows>30</nrows><ncols>40</ncols></imagesize>"
        source = "<source><sourceImage>The MIT-CSAIL database</sourceImage></source>"
        content = (
            f"<annotation>\n<filename>{name}.jpg\n</filename><folder>val</folder>{source}{size}{text}</annotation>"
        )
        write_text(root / "Annotations" / "val" / f"{name}.xml", content)
    return open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")


def polygon(name: str = "cat", points: str = "2,10 7,3 12,23", deleted: str = "0") -> str:
    places = "".join("<pt><x>{}</x><y>{}</y></pt>".format(*point.split(",")) for point in points.split())
    return (
        f"<object><name>\n{name}\n</name><deleted>{deleted}</deleted><verified>0</verified><date>1-Jan-2024</date>"
        f"<id>0</id><polygon><username>me</username>{places}</polygon></object>"
    )


def test_labelme_polygons_and_masks(tmp_path: Path) -> None:
    mask = (
        "<object><name>dog</name><deleted>0</deleted><segm><username>me</username><box><xmin>1</xmin><ymin>2</ymin>"
        "<xmax>9</xmax><ymax>8</ymax></box><mask>a_mask_0.png</mask></segm></object>"
    )
    source = labelme(tmp_path, polygon(), mask)
    assert source.format == "labelme_xml"
    assert source.issue_counts == {}
    np.testing.assert_array_equal(source.split("val")[0].boxes, [[2, 3, 12, 23], [1, 2, 9, 8]])
    assert source.categories == ("cat", "dog")


def test_deleted_labelme_objects_are_left_out(tmp_path: Path) -> None:
    source = labelme(tmp_path, polygon(deleted="1"), polygon("dog", deleted="\n0\n"))
    assert source.issue_counts == {}
    assert source.categories == ("dog",)
    assert len(source.split("val")[0].boxes) == 1


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (polygon(""), "unknown category"),
        (polygon(points="2,3 x,4 5,6"), "unreadable box"),
        (polygon(points="2,3 2,9 2,12"), "degenerate box"),
        ("<object><name>cat</name><deleted>0</deleted></object>", "unreadable box"),
        (polygon(points="2,3"), "unsupported shape"),
        (polygon(points="2,3 4,5"), "unsupported shape"),
    ],
)
def test_wrong_labelme_objects_are_left_out_and_counted(tmp_path: Path, wrong: str, kind: str) -> None:
    source = labelme(tmp_path, polygon("dog"), wrong)
    assert source.issue_counts == {kind: 1}
    assert source.issues[0].where == "Annotations/val/a.xml, object 2"


def test_voc_is_still_voc(tmp_path: Path) -> None:
    """Also with a word of LabelMe's in it, and beside a folder of LabelMe's."""
    voc_beside(tmp_path, made_up())
    assert recognise(tmp_path).format == "voc"
    for file in tmp_path.rglob("*.xml"):
        file.write_text(
            file.read_text(encoding="utf-8").replace("<difficult>", "<deleted>0</deleted><difficult>"), "utf-8"
        )
    assert recognise(tmp_path).format == "voc"
