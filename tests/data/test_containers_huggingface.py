"""Hugging Face's tables: read as what they say, with the bytes of the images as they are."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from reader_trees import NAMES, ExpectedImage, Truth, hidden_beside, made_up, write_json, write_text
from table_trees import encoded, features, repository, row, save, schema, xywh

from metr.data.containers.huggingface import HuggingFaceReader
from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.images import check_image
from metr.data.records import ImageRecord
from metr.errors import DataError

Write = Callable[[Path, Truth], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "unpacked"


def opened(path: Path, **options: Any) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=path, **options))


def converted(root: Path, truth: Truth) -> None:
    """As the hub converts datasets: a folder a split, names in the table itself."""
    metadata = {"huggingface": json.dumps({"info": {"features": features()}})}
    for split, images in truth.items():
        save(root / "default" / split / "0000.parquet", list(map(row, images)), schema(pa.int64(), metadata=metadata))


def words(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        rows = [row(item, "label", words=True) for item in images]
        save(root / f"{split}-00000-of-00001-a09b74b3ef9c3b56.parquet", rows, schema(pa.string(), "label"))


def list_of_structs(root: Path, truth: Truth) -> None:
    thing = pa.struct([("bbox", pa.list_(pa.float32(), 4)), ("category", pa.string()), ("mask", pa.binary())])
    kind = pa.schema([("image", pa.binary()), ("objects", pa.list_(thing))])
    for split, images in truth.items():
        rows = [
            {
                "image": encoded(item, "JPEG"),
                "objects": [
                    {"bbox": xywh(box), "category": name, "mask": b"\0"}
                    for box, name in zip(item.boxes, item.labels, strict=True)
                ],
            }
            for item in images
        ]
        save(root / f"{split}.parquet", rows, kind)


def side_by_side(root: Path, truth: Truth) -> None:
    """Boxes and labels in columns of their own."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kind = pa.schema([("image", image), ("bboxes", pa.list_(pa.list_(pa.float32()))), ("labels", pa.list_(pa.int64()))])
    label = {"feature": {"names": list(NAMES), "_type": "ClassLabel"}, "_type": "Sequence"}
    kind = kind.with_metadata({"huggingface": json.dumps({"info": {"features": {"labels": label}}})})
    for split, images in truth.items():
        rows = [
            {
                "image": {"bytes": encoded(item), "path": None},
                "bboxes": [xywh(box) for box in item.boxes],
                "labels": [NAMES.index(name) for name in item.labels],
            }
            for item in images
        ]
        save(root / f"{split}.parquet", rows, kind)


def save_to_disk(root: Path, truth: Truth) -> None:
    for split, images in truth.items():
        folder = root / split
        save(folder / "data-00000-of-00002.arrow", list(map(row, images[:1])), schema(pa.int64()))
        save(folder / "data-00001-of-00002.arrow", list(map(row, images[1:])), schema(pa.int64()))
        save(folder / "cache-1f0.arrow", list(map(row, images)), schema(pa.int64()))
        files = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]
        write_json(folder / "state.json", {"_data_files": files, "_split": split})
        write_json(folder / "dataset_info.json", {"features": features()})
    write_json(root / "dataset_dict.json", {"splits": list(truth)})


def paths(root: Path, truth: Truth) -> None:
    """Tables with the paths of images beside them."""
    for split, images in truth.items():
        for item in images:
            path = root / "images" / item.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(item))
        rows = [row(item, words=True) | {"image": {"bytes": None, "path": f"images/{item.name}"}} for item in images]
        save(root / f"{split}.parquet", rows, schema(pa.string()))


LAYOUTS = {
    write.__name__: write
    for write in (repository, converted, words, list_of_structs, side_by_side, save_to_disk, paths)
}


def told(record: ImageRecord, source: DatasetSource) -> tuple[int, int, list[tuple[tuple[int, ...], str]]]:
    boxes = [tuple(round(float(side)) for side in box) for box in record.boxes]
    labels = [source.categories[label] for label in record.labels]
    return record.width, record.height, sorted(zip(boxes, labels, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("seed", "hidden"), [(0, False), (1, False), (0, True)])
def test_every_layout_gives_back_what_was_written(tmp_path: Path, layout: str, seed: int, hidden: bool) -> None:
    truth = made_up(seed)
    LAYOUTS[layout](tmp_path / "my data", truth)
    if hidden:
        hidden_beside(tmp_path / "my data")
    source = opened(tmp_path / "my data")
    assert source.format == "huggingface"
    assert source.issues == ()
    assert set(source.categories) == set(NAMES)
    for split, images in truth.items():
        expected = [(item.width, item.height, sorted(zip(item.boxes, item.labels, strict=True))) for item in images]
        assert [told(record, source) for record in source.split(split)] == expected
        kind = "JPEG" if layout == "list_of_structs" else "PNG"
        for record, item in zip(source.split(split), images, strict=True):
            assert record.path.read_bytes() == encoded(item, kind)


@pytest.mark.parametrize("layout", ["repository", "save_to_disk"])
def test_messages_point_to_file_and_row(tmp_path: Path, layout: str) -> None:
    truth = made_up()
    root = tmp_path / "data"
    LAYOUTS[layout](root, truth)
    bad = row(truth["train"][0]) | {"objects": {"bbox": [[1.0, 2.0, 3.0]], "category": [0]}}
    name = "data/train-00001-of-00002.parquet" if layout == "repository" else "train/data-00001-of-00002.arrow"
    save(root / name, [row(truth["train"][2]), bad], schema(pa.int64()))
    (issue,) = opened(root).issues
    assert issue.where.startswith(f"{name}: row 2")


def test_one_table_is_a_dataset(tmp_path: Path) -> None:
    truth = made_up()
    words(tmp_path / "data", truth)
    source = opened(next((tmp_path / "data").glob("train*")))
    assert sum(map(len, source.splits.values())) == len(truth["train"])


def test_a_changed_table_is_read_anew(tmp_path: Path, cache: Path) -> None:
    truth = made_up()
    words(tmp_path / "data", truth)
    before = opened(tmp_path / "data").root
    rows = [row(item, "label", words=True) for item in truth["train"][:2]]
    save(next((tmp_path / "data").glob("train*")), rows, schema(pa.string(), "label"))
    source = opened(tmp_path / "data")
    assert len(source.split("train")) == 2
    assert not before.exists()
    assert len(list(cache.glob("*/[!.]*/"))) == 1


def test_missing_files_are_told(tmp_path: Path) -> None:
    repository(tmp_path / "data", made_up())
    (tmp_path / "data/data/train-00001-of-00002.parquet").unlink()
    (issue,) = opened(tmp_path / "data").issues
    assert (issue.kind, issue.where) == ("missing file", "data/train")
    assert issue.detail == "1 of 2 files are here; missing are the numbers 1"


def test_a_missing_file_or_split_of_save_to_disk_is_told(tmp_path: Path) -> None:
    root = tmp_path / "data"
    save_to_disk(root, made_up())
    write_json(root / "dataset_dict.json", {"splits": ["train", "val", "test", "extra"]})
    assert "names the split 'extra'" in opened(root).issues[0].detail
    (root / "train/data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"names 'data-00001-of-00002\.arrow', which is missing"):
        opened(root)


def test_splits_of_any_name_of_save_to_disk_stay_apart(tmp_path: Path) -> None:
    truth = made_up()
    save_to_disk(tmp_path / "data", {"fold one": truth["train"], "fold two": truth["val"]})
    source = opened(tmp_path / "data", splits={"train": "fold one", "val": "fold two"})
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 5, "val": 3}


@pytest.mark.parametrize("layout", ["repository", "save_to_disk"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_a_table_that_is_cut_off(tmp_path: Path, layout: str, share: float, cache: Path) -> None:
    root = tmp_path / "data"
    LAYOUTS[layout](root, made_up())
    path = next(root.rglob("train-00001*" if layout == "repository" else "train/data-00001*"))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match="a table that is damaged or cut off") as caught:
        opened(root)
    assert caught.value.where == path
    assert not list(cache.glob("*/.building*"))


def test_images_that_are_missing_empty_or_outside_become_issues(tmp_path: Path) -> None:
    truth = made_up()
    good = row(truth["train"][0], words=True)
    write_text(tmp_path / "outside.jpg", "x")
    images = [
        {"bytes": None, "path": None},
        {"bytes": None, "path": "nowhere.jpg"},
        {"bytes": None, "path": "../outside.jpg"},
        {"bytes": None, "path": str(tmp_path / "outside.jpg")},
        None,
        {"bytes": b"no image", "path": "x.txt"},
    ]
    save(
        tmp_path / "data" / "train.parquet", [good, *(good | {"image": image} for image in images)], schema(pa.string())
    )
    source = opened(tmp_path / "data")
    assert sum(source.issue_counts.values()) == len(images) - 1
    assert {issue.where for issue in source.issues} >= {"train.parquet: row 2", "train.parquet: row 6"}
    found = [check_image(record) for split in source.splits.values() for record in split]
    assert sorted(issue.kind if issue else "" for issue in found) == ["", "unreadable image"]


def test_unknown_and_undeclared_numbers(tmp_path: Path) -> None:
    truth = made_up()
    objects = {"bbox": [[1.0, 1.0, 5.0, 5.0]] * 3, "category": [-1, 2, 9]}
    rows = [row(truth["train"][0]) | {"objects": objects}, row(truth["train"][2])]
    metadata = {"huggingface": json.dumps({"info": {"features": features()}})}
    save(tmp_path / "data" / "train.parquet", rows, schema(pa.int64(), metadata=metadata))
    source = opened(tmp_path / "data")
    assert set(source.categories) == {*NAMES, "category 9"}
    assert source.issue_counts == {"unknown category": 1, "unnamed category": 1}


def test_one_of_several_datasets_in_a_card_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    truth = made_up()
    words(tmp_path / "data" / "small", {"train": truth["val"]})
    words(tmp_path / "data" / "large", truth)
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/**\n" for name in ("large", "small"))
    write_text(tmp_path / "data" / "README.md", f"---\nconfigs:\n{configs}---\n")
    source = opened(tmp_path / "data")
    assert sum(map(len, source.splits.values())) == 10
    assert "its card describes several datasets; read is 'large'" in caplog.text


def test_tables_without_images_or_boxes_are_no_dataset(tmp_path: Path) -> None:
    save(tmp_path / "data" / "a.parquet", [{"text": "a"}], pa.schema([("text", pa.string())]))
    with pytest.raises(DataError, match="no annotations of a known format"):
        opened(tmp_path / "data")


def test_a_lone_table_that_is_cut_off(tmp_path: Path) -> None:
    converted(tmp_path / "data", made_up())
    for path in (tmp_path / "data").rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for place in (tmp_path / "data", path):
        with pytest.raises(DataError, match="a table that is damaged or cut off"):
            opened(place)


def test_a_row_without_objects_is_told_once(tmp_path: Path) -> None:
    good = row(made_up()["train"][0], words=True)
    save(tmp_path / "data" / "train.parquet", [good, good | {"objects": None}], schema(pa.string()))
    assert opened(tmp_path / "data").issue_counts == {"unannotated image": 1}


def test_a_card_that_contains_itself(tmp_path: Path) -> None:
    words(tmp_path / "data", made_up())
    write_text(tmp_path / "data/README.md", "---\ndataset_info: &a\n  features: [*a]\nconfigs: 3\n---\n")
    assert len(opened(tmp_path / "data").splits) == 3


def test_a_repository_in_an_archive(tmp_path: Path) -> None:
    import shutil

    repository(tmp_path / "data", made_up())
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "data")
    assert len(opened(tmp_path / "packed.zip").split("train")) == 5


def test_the_boxes_of_all_tables_are_of_one_kind(tmp_path: Path) -> None:
    """One table shows that boxes are corners; those of the others are, too."""
    truth = made_up()
    wide = ExpectedImage("a.png", 40, 30, ((20, 15, 38, 28), (22, 3, 39, 20), (30, 10, 36, 29)), (NAMES[0],) * 3)
    small = ExpectedImage("b.png", 40, 30, ((2, 3, 10, 20),), (NAMES[1],))
    for number, item in enumerate((wide, small)):
        objects = {"bbox": [list(map(float, box)) for box in item.boxes], "category": list(item.labels)}
        rows = [row(item, words=True) | {"objects": objects}]
        save(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", rows, schema(pa.string()))
    save(tmp_path / "data" / "val.parquet", [row(truth["val"][1], words=True)], schema(pa.string()))
    source = opened(tmp_path / "data")
    assert [told(record, source)[2] for record in source.split("train")] == [
        sorted(zip(item.boxes, item.labels, strict=True)) for item in (wide, small)
    ]
    assert source.issue_counts == {"boxes are not xywh": 1}
    source = opened(tmp_path / "data", boxes="xywh")
    assert source.split("train")[1].boxes.tolist() == [[2, 3, 12, 23]]


def test_damaged_bytes_of_an_arrow_file_end_in_an_error(tmp_path: Path) -> None:
    """Offsets and names may become anything; reading them unchecked would end the process."""
    save_to_disk(tmp_path / "data", {"train": made_up()["train"][:2]})
    path = tmp_path / "data/train/data-00001-of-00002.arrow"
    whole = path.read_bytes()
    first = whole.index(encoded(made_up()["train"][1])[:8])
    for place in (*range(0, first, 61), *range(first - 200, first, 11)):
        path.write_bytes(whole[:place] + b"\xff\xff" + whole[place + 2 :])
        with contextlib.suppress(DataError):
            found = HuggingFaceReader.recognise(tmp_path / "data")
            assert found is not None
            found.prepared()
