"""The study of completed labels: what is hidden, how added boxes are judged, and the whole of it in miniature."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from metr.data.datasets_file import DatasetConfig, open_dataset


@pytest.fixture
def study(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("complete")


def profile_of(study: ModuleType, name: str) -> Any:
    one = study.Study(name="complete", profile=name, data=Path(), out=Path())
    return study.Profile.checked(one.read_profile())


def test_every_hidden_name_is_annotated_in_the_other_part(study: ModuleType, seven: Path, tmp_path: Path) -> None:
    source = open_dataset(DatasetConfig(name="bccd", path=seven / "bccd"), tmp_path / "cache")
    first, second = study.cut(source, profile_of(study, "tiny"))
    assert set(first.hidden).isdisjoint(second.hidden)
    assert min(len(first.hidden), len(second.hidden)) >= 1
    assert sorted((*first.images, *second.images)) == list(range(len(source.split("train"))))
    one = study.Study(name="complete", profile="tiny", data=seven, out=tmp_path / "out")
    written = study.write_part(one, source, first)
    part = open_dataset(DatasetConfig(name=first.name, path=tmp_path / "out/parts" / first.name), tmp_path / "cache")
    assert written == f"{first.name}={tmp_path / 'out/parts' / first.name}"
    assert part.categories == tuple(name for name in source.categories if name not in first.hidden)
    assert len(part.split("train")) == len(first.images)
    kept = sum(
        source.categories[row] not in first.hidden
        for image in first.images
        for row in source.split("train")[image].labels.tolist()
    )
    assert part.split("train").counts().boxes.sum() == kept


def test_added_boxes_are_judged_by_what_was_hidden(study: ModuleType, seven: Path, tmp_path: Path) -> None:
    source = open_dataset(DatasetConfig(name="bccd", path=seven / "bccd"), tmp_path / "cache")
    part, _ = study.cut(source, profile_of(study, "tiny"))
    name, train = part.hidden[0], source.split("train")
    row = source.categories.index(name)
    hits = [
        {"dataset": part.name, "image": f"images/train/{train[n].path.name}", "name": name, "box": box, "score": 0.9}
        for n in part.images
        for box, label in zip(train[n].boxes.tolist(), train[n].labels.tolist(), strict=True)
        if label == row
    ]
    again = {**hits[0], "score": 0.8}
    foreign = {**hits[0], "name": "a name of another dataset"}
    elsewhere = {**hits[0], "dataset": "another"}
    found = study.quality(source, part, [*hits, again, foreign, elsewhere])
    objects = len(hits)
    assert found["names"][name] == {"objects": objects, "added": objects + 1, "right": objects}
    assert found["foreign"] == 1
    rates = study.rates([found])
    assert rates["precision"] == pytest.approx(100 * objects / (objects + 2))


@pytest.mark.slow
def test_in_miniature(
    study: ModuleType, command_of: Callable[[ModuleType], Callable[..., int]], tmp_path: Path
) -> None:
    run = command_of(study)
    steps = ("--profile", "tiny", "--set", "train.loop.steps=2", "--set", "train.loop.evaluate_every=0")
    assert run(*steps) == 0
    told = json.loads((tmp_path / "results/complete-tiny.json").read_text(), parse_constant=pytest.fail)
    assert list(told["datasets"]) == ["chess_pieces", "playing_cards", "bccd"]
    assert set(told["all"]["AP"]) == {"negative", "ignore", "completed"}
    assert told["all"]["objects"] > 0
    assert "| all |" in (tmp_path / "results/complete-tiny.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("report.json")}
    assert len(before) == 7
    assert run(*steps) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("name", ["trial", "tiny"])
def test_profiles(study: ModuleType, name: str) -> None:
    profile = profile_of(study, name)
    assert profile.hidden == 0.3
    assert (profile.precision, profile.pretrain["train"]["loop"]["evaluate_every"]) == (0.9, 0)
