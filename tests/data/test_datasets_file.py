"""Datasets as users name them, their splits and their categories."""

import logging
from pathlib import Path

import numpy as np
import pytest
from reader_trees import NAMES, coco_plain, made_up, save_image, voc_listed, write_json, write_text, yolo_plain

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset, parse_data_arguments
from metr.data.formats.base import Reader
from metr.data.formats.registry import READERS
from metr.data.guard import log_issues
from metr.data.records import canonical_split, hold_out, plan_splits
from metr.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    coco_plain(tmp_path / "cells", made_up())
    return tmp_path / "cells"


def opened(root: Path, **options: object) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root, **options), root.parent / "cache")


# Arguments ------------------------------------------------------------------------------------------------------------


def test_paths_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a=b").mkdir()
    monkeypatch.chdir(tmp_path / "a=b")
    arguments = ["data/cells/", "fish=../sea/x=y", "./odd=name", ".", str(tmp_path / "a=b" / ".." / "last")]
    specs = parse_data_arguments(arguments)
    assert [spec.name for spec in specs] == ["cells", "fish", "odd=name", "a=b", "last"]
    assert [str(spec.path) for spec in specs[:3]] == ["data/cells", "../sea/x=y", "odd=name"]
    assert specs[0] == DatasetConfig(name="cells", path=Path("data/cells"))


def test_an_existing_path_with_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run=1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_data_arguments(["run=1"])[0].name == "run=1"


def test_a_listing(tmp_path: Path) -> None:
    listing = write_text(
        tmp_path / "lists" / "all.yaml",
        """
datasets:
  - path: ../cells
    weight: 2
    prompts: {RBC: red blood cell}
    renames: {rbc: RBC}
    exhaustive: [RBC]
    splits: {train: trainval, val: [val2014, val2017]}
  - {path: /far/fish, name: sea, format: voc}
  - ../cards
  - named=../other
""",
    )
    specs = parse_data_arguments([str(listing), str(tmp_path / "last")])
    assert [spec.name for spec in specs] == ["cells", "sea", "cards", "named", "last"]
    assert [spec.path for spec in specs[:4]] == [
        tmp_path / "lists" / ".." / "cells",
        Path("/far/fish"),
        tmp_path / "lists" / ".." / "cards",
        tmp_path / "lists" / ".." / "other",
    ]
    assert (specs[0].weight, specs[0].prompts, specs[0].renames) == (2, {"RBC": "red blood cell"}, {"rbc": "RBC"})
    assert specs[0].exhaustive == ("RBC",)
    assert specs[0].splits == {"train": "trainval", "val": ("val2014", "val2017")}
    assert specs[1].format == "voc"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: []", "datasets"),
        ("datasets:", "datasets"),
        ("sets: [a]", "unknown key 'sets'"),
        ("datasets: [{name: a}]", "without a path"),
        ("datasets: [{path: [3]}]", "without a path"),
        ("datasets: [{path: a, wieght: 2}]", "did you mean 'weight'"),
        ("datasets: [{path: a, weight: 0}]", "weight"),
        ("datasets: [{path: a, format: coca}]", "format"),
        ("datasets: [{path: a, splits: {../x: train}}]", "splits"),
        ("datasets: [{path: a, name: ''}]", "name"),
        ("- a", "expected keys and values"),
        ("datasets: [", "not readable as YAML"),
        ("datasets: " + "[" * 3000, "nested too deeply"),
        ('datasets: ["a\\0b"]', "zero byte"),
        ('datasets: [{path: "a\\0b", name: a}]', "zero byte"),
        ("datasets: [{path: a, weight: .inf}]", "weight"),
        ("datasets: [{path: a, weight: .nan}]", "weight"),
    ],
)
def test_faulty_listings(tmp_path: Path, text: str, message: str) -> None:
    listing = write_text(tmp_path / "all.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        parse_data_arguments([str(listing)])
    assert str(caught.value.where).removesuffix(", line 1") == str(listing)


@pytest.mark.parametrize(
    ("entry", "line", "told"),
    [
        ("    renames:", 6, "dataset 'cells': 'renames' has no value"),
        ("    weight: 2\n    prompts:\n    splits: {}", 7, "dataset 'cells': 'prompts' has no value"),
        ("    weight: 2\n    rename: {a: b}", 7, "dataset 'cells': unknown key 'rename'"),
        ("    weight: -2", 6, "dataset 'cells': 'weight'"),
        ("    renames: [a, b]", 6, "dataset 'cells': 'renames'"),
        ("    splits:\n      {holdout: a}", 7, "dataset 'cells': 'splits.holdout"),
    ],
)
def test_faults_name_dataset_and_line(tmp_path: Path, entry: str, line: int, told: str) -> None:
    text = f"# mine\ndatasets:\n  - ../fish\n  - name: cells\n    path: ../cells\n{entry}\n  - ../cards\n"
    listing = tmp_path / "all.yaml"
    listing.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        parse_data_arguments([str(listing)])
    assert f"{listing}, line {line}: {told}" in str(caught.value)


def test_null_is_a_value(tmp_path: Path) -> None:
    listing = write_text(tmp_path / "all.yaml", "datasets: [{path: a, exhaustive: null, format: null}]")
    (spec,) = parse_data_arguments([str(listing)])
    assert (spec.exhaustive, spec.format) == (None, None)


def test_a_missing_listing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        parse_data_arguments([str(tmp_path / "all.yaml")])


def test_a_yolo_description_is_a_dataset(tmp_path: Path) -> None:
    yolo_plain(tmp_path / "cells", made_up())
    (spec,) = parse_data_arguments([str(tmp_path / "cells" / "data.yaml")])
    assert spec.name == "cells"
    assert len(open_dataset(spec, tmp_path / "cache").split("train")) == 5


def test_names_are_unique() -> None:
    with pytest.raises(DataError, match="2 datasets are called 'cells': a/cells and b/cells") as caught:
        parse_data_arguments(["a/cells", "fish", "b/cells"])
    assert "other_name=a/cells" in str(caught.value)
    assert len(parse_data_arguments(["a/cells", "more=b/cells"])) == 2


def test_a_dataset_that_is_named_twice_gets_no_second_name() -> None:
    with pytest.raises(DataError, match="2 datasets are called 'cells'") as caught:
        parse_data_arguments(["a/cells", "fish", "a/cells"])
    assert "try: name it once" in str(caught.value)
    assert "other_name" not in str(caught.value)


def test_nothing_is_named() -> None:
    with pytest.raises(DataError, match="no dataset is named"):
        parse_data_arguments([])


# Splits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train", "train"),
        ("Train", "train"),
        ("train2017", "train"),
        ("instances_train2014", "train"),
        ("train_labels", "train"),
        ("trainval", "train"),
        ("valid", "val"),
        ("val2017", "val"),
        ("my-validation.boxes", "val"),
        ("test-dev2017", "test"),
        ("testing", "test"),
        ("all", None),
        ("contest", None),
        ("restraint", None),
        ("2017", None),
        ("", None),
    ],
)
def test_canonical_names(name: str, expected: str | None) -> None:
    assert canonical_split(name) == expected


def test_the_newest_year_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plan = plan_splits(["val2017", "train2014", "train2017", "unlabeled2017"], None, "coco")
    assert plan.parts == {"train": ("train2017",), "val": ("val2017",), "unlabeled2017": ("unlabeled2017",)}
    assert "'train2017' is taken as the train split, not 'train2014'" in caplog.text
    assert plan_splits(["train", "train_old"], None, "").parts == {"train": ("train",)}


@pytest.mark.parametrize(
    "own",
    [["default"], ["train"], ["batch 1", "batch 2"], ["train", "extra"], ["train", "test"], ["train", "test2017"]],
)
def test_seeded_where_there_is_nothing_to_choose_the_best_checkpoint_on(own: list[str]) -> None:
    assert plan_splits(own, None, "").seeded


@pytest.mark.parametrize(
    "own", [["val"], ["test"], ["val", "test"], ["train", "val", "extra"], ["train", "val", "test"]]
)
def test_not_seeded_where_there_is_a_convention(own: list[str]) -> None:
    assert not plan_splits(own, None, "").seeded


def test_held_out_images_are_a_fifth_and_stay() -> None:
    keys = [f"images/{number}.jpg" for number in range(1000)]
    held = hold_out(keys)
    assert held.sum() == 200
    order = np.random.default_rng(0).permutation(1000)
    assert (hold_out([keys[place] for place in order]) == held[order]).all()
    assert (hold_out(keys, seed=1) != held).any()
    grown = hold_out([*keys, "one more.jpg"])
    assert (grown[:1000] != held).sum() <= 2
    twice = hold_out([*keys, *keys])
    assert (twice[: len(keys)] == twice[len(keys) :]).all()
    assert (twice[: len(keys)] == held).all()
    assert [int(hold_out(keys[:count]).sum()) for count in (0, 1, 2, 3, 8)] == [0, 0, 1, 1, 2]


def test_a_seeded_split_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    coco_plain(tmp_path / "cells", made_up(splits={"train": 20}))
    with caplog.at_level(logging.WARNING):
        source = opened(tmp_path / "cells")
    assert "a seeded fifth" in caplog.text
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 16, "val": 4}
    parts = [{record.image_id for record in found} for found in source.splits.values()]
    assert len(parts[0] | parts[1]) == 20
    again = open_dataset(DatasetConfig(name="made", path=tmp_path / "cells"), tmp_path / "other cache")
    assert [record.image_id for record in again.split("val")] == [record.image_id for record in source.split("val")]


def test_a_val_split_comes_from_train_where_there_is_only_test(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    coco_plain(tmp_path / "cells", made_up(splits={"train": 8, "test": 5}))
    with caplog.at_level(logging.WARNING):
        source = opened(tmp_path / "cells")
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 6, "val": 2, "test": 5}
    assert source.held_out
    assert "(2 of 8) is held out as val; test does not choose the best checkpoint" in caplog.text
    name, val = source.evaluation_split()
    ids = {split: {record.path for record in source.split(split)} for split in source.splits}
    assert (name, {record.path for record in val}) == ("val", ids["val"])
    assert not ids["val"] & (ids["train"] | ids["test"])
    again = open_dataset(DatasetConfig(name="made", path=tmp_path / "cells"), tmp_path / "other cache")
    assert {record.path for record in again.split("val")} == ids["val"], "the same images every time"


@pytest.mark.parametrize(
    ("own", "wanted", "images"),
    [
        ({"train": 8}, None, 8),
        ({"train": 8, "val": 2, "test": 5}, None, 15),
        ({"train": 8, "val": 2, "test": 5}, {"train": "train", "val": "train"}, 8),
        ({"train": 8, "val": 2, "test": 5}, {"test": "test"}, 5),
    ],
)
def test_all_images_as_one_split(
    own: dict[str, int], wanted: dict[str, str] | None, images: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    coco_plain(tmp_path / "cells", made_up(splits=own))
    config = DatasetConfig(name="made", path=tmp_path / "cells", splits=wanted)
    with caplog.at_level(logging.WARNING):
        source = open_dataset(config, tmp_path / "cache", together=True)
    assert list(source.splits) == ["all"]
    assert len({record.path for record in source.split("all")}) == len(source.split("all")) == images
    assert (source.held_out, caplog.text) == (False, "")


def test_an_empty_val_split_is_as_good_as_none(tmp_path: Path) -> None:
    coco_plain(tmp_path / "cells", made_up(splits={"train": 10, "valid": 1, "test": 2}))
    for image in (tmp_path / "cells").rglob("*valid*/*"):
        image.unlink()
    source = opened(tmp_path / "cells")
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 8, "val": 2, "test": 2}
    assert source.held_out
    assert "empty split" in source.issue_counts


def test_a_single_training_image_is_not_judged_on_test(tmp_path: Path) -> None:
    coco_plain(tmp_path / "cells", made_up(splits={"train": 1, "test": 5}))
    source = opened(tmp_path / "cells")
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 1, "test": 5}
    with pytest.raises(DataError, match="no 'val' split"):
        source.evaluation_split()


def test_a_dataset_may_be_all_training(tmp_path: Path) -> None:
    coco_plain(tmp_path / "cells", made_up(splits={"train": 20}))
    source = opened(tmp_path / "cells", splits={"train": "train"})
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 20}
    with pytest.raises(DataError, match="no 'val' split"):
        source.evaluation_split()


def test_evaluation_split(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        name, annotations = opened(root).evaluation_split()
    assert (name, len(annotations), caplog.text) == ("val", 3, "")
    assert not opened(root).held_out
    chosen = opened(root, splits={"train": "train2017", "test": "test2017"})
    assert chosen.evaluation_split()[0] == "val"
    assert chosen.held_out
    source = opened(root, splits={"test": "test2017"})
    with caplog.at_level(logging.WARNING):
        name, annotations = source.evaluation_split()
    assert (name, len(annotations), annotations.split) == ("test", 2, "test")
    assert "evaluated on its test split" in caplog.text


def test_wanted_splits(root: Path) -> None:
    source = opened(root, splits={"train": ["train2017", "val"], "val": "test2017"})
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 8, "val": 2}
    ids = [record.image_id for record in source.split("train")]
    assert len(set(ids)) == len(ids) == 8
    with pytest.raises(DataError, match="no split 'vall2017'") as caught:
        opened(root, splits={"val": "vall2017"})
    assert "did you mean 'val2017'" in str(caught.value)


def test_a_image_in_two_joined_lists_counts_once(tmp_path: Path) -> None:
    voc_listed(tmp_path / "cells", made_up())
    write_text(tmp_path / "cells" / "ImageSets" / "Main" / "val.txt", "train 00 снимок\nval 00 снимок")
    source = opened(tmp_path / "cells", splits={"train": ["train", "val"]})
    assert len(source.split("train")) == 6


def test_a_split_that_is_not_there(root: Path) -> None:
    with pytest.raises(DataError, match="no 'valid' split") as caught:
        opened(root).split("valid")
    assert "train, val, test" in str(caught.value)


# Categories -----------------------------------------------------------------------------------------------------------


def test_renames_join(root: Path) -> None:
    plain, joined = opened(root), opened(root, renames={"red cell": "cell", "white-cell": "  cell "})
    assert plain.categories == NAMES
    assert joined.categories == ("cell", "пятно")
    for before, after in zip(plain.split("train"), joined.split("train"), strict=True):
        names = {"red cell": "cell", "white-cell": "cell", "пятно": "пятно"}
        expected = [names[plain.categories[label]] for label in before.labels]
        assert [joined.categories[label] for label in after.labels] == expected


def test_an_opened_dataset_is_renamed(root: Path) -> None:
    options = {"renames": {"red cell": "RBC"}, "prompts": {"RBC": "a red cell"}, "exhaustive": ["RBC"]}
    before = opened(root, **options)
    after = before.renamed({"RBC": "rbc", "white-cell": "wbc"})
    again = opened(
        root,
        renames={"red cell": "rbc", "white-cell": "wbc"},
        prompts={"rbc": "a red cell"},
        exhaustive=["rbc"],
    )
    assert (after.categories, after.config) == (again.categories, again.config)
    assert after.split("train").categories == after.categories
    for one, two in zip(after.split("train"), again.split("train"), strict=True):
        assert (one.labels.tolist(), one.annotated) == (two.labels.tolist(), two.annotated)
    assert before.categories[:1] == ("RBC",), "the one before stays as it was"
    assert before.renamed({}) is before


def test_names_may_be_swapped(root: Path) -> None:
    source = opened(root, renames={"red cell": "white-cell", "white-cell": "red cell"})
    assert source.categories == ("white-cell", "red cell", "пятно")


def test_exhaustive_fills_annotated(root: Path) -> None:
    source = opened(root, renames={"red cell": "cell"}, exhaustive=["пятно", "cell"])
    assert {record.annotated for found in source.splits.values() for record in found} == {(0, 2)}
    assert {record.annotated for record in opened(root, exhaustive=[]).split("train")} == {()}
    assert {record.annotated for record in opened(root).split("train")} == {None}


@pytest.mark.parametrize(
    "options",
    [{"renames": {"red cel": "x"}}, {"prompts": {"red cel": "x"}}, {"exhaustive": ["red cel"]}],
)
def test_unknown_categories_are_refused(root: Path, options: dict[str, object]) -> None:
    with pytest.raises(DataError, match=f"`{next(iter(options))}` names 'red cel'") as caught:
        opened(root, **options)
    assert "did you mean 'red cell'" in str(caught.value)


def test_options_go_by_the_new_names(root: Path) -> None:
    for key, value in (("prompts", {"red cell": "a red blood cell"}), ("exhaustive", ["red cell"])):
        told = f"`{key}` names 'red cell', which `renames` .* has renamed to 'cell'\n  try: write 'cell' in its place"
        with pytest.raises(DataError, match=told):
            opened(root, renames={"red cell": " cell "}, **{key: value})
    source = opened(root, renames={"red cell": "cell"}, prompts={"cell": "a red blood cell"})
    assert source.config.prompts == {"cell": "a red blood cell"}


def test_issues_are_counted_and_the_first_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = save_image(tmp_path / "cells" / "val" / "a.jpg")
    images = [{"id": 1, "file_name": image.name, "width": 40, "height": 30}]
    boxes = [{"image_id": 1, "category_id": 1, "bbox": [number, 1, 0, 5]} for number in range(250)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    write_json(tmp_path / "cells" / "val" / "_annotations.coco.json", content)
    with caplog.at_level(logging.INFO):
        source = opened(tmp_path / "cells")
        log_issues([source])
    assert source.issue_counts == {"degenerate box": 250}
    assert len(source.issues) == 100
    assert "250 x degenerate box" in caplog.text


def test_names_are_the_words_as_they_are_written(tmp_path: Path) -> None:
    listing = tmp_path / "all.yaml"
    text = (
        "datasets:\n  - path: a\n    name: 007\n    weight: 2\n    renames: {no: yes, 12:30: off, 1: null}\n"
        "    prompts: {yes: on}\n    exhaustive: [yes, 1e3]\n    splits: {train: [on, 2020]}\n  - 2024\n"
    )
    listing.write_text(text, encoding="utf-8")
    first, second = parse_data_arguments([str(listing)])
    assert (first.name, first.weight) == ("007", 2.0)
    assert first.renames == {"no": "yes", "12:30": "off", "1": "null"}
    assert first.prompts == {"yes": "on"}
    assert first.exhaustive == ("yes", "1e3")
    assert first.splits == {"train": ("on", "2020")}
    assert second.path == tmp_path / "2024"
    listing.write_text("datasets:\n  - {path: off, name: no}\n", encoding="utf-8")
    assert [(one.name, one.path.name) for one in parse_data_arguments([str(listing)])] == [("no", "off")]


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("datasets:\n  - a\nweights: 3\n", 3, "unknown key 'weights'"),
        ("# mine\n\ndatasets: 5\n", 3, "'datasets'"),
        ("datasets:\n  - a\n  - [b]\n", 3, "'datasets.1"),
        ("datasets:\n  - a\n  - weight: 2\n", 3, "a dataset without a path"),
        ("datasets:\n  - a\n  - ' '\n", 3, "a dataset without a path"),
        ("datasets:\n  - path: a\n    renames: {b: }\n", 3, "'renames.b'"),
    ],
)
def test_every_fault_of_a_datasets_file_names_its_line(tmp_path: Path, text: str, line: int, told: str) -> None:
    listing = tmp_path / "all.yaml"
    listing.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        parse_data_arguments([str(listing)])
    assert f"{listing}, line {line}: " in str(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.format)
def test_every_format_can_be_named(reader: type[Reader]) -> None:
    assert DatasetConfig(name="a", path=Path("a"), format=reader.format).format == reader.format
