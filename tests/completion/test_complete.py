"""`metr complete`: names of other datasets are added where a detector is sure, at thresholds of their home."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import metr
from metr.completion.complete import run_completion
from metr.completion.journal import JOURNAL
from metr.completion.prelabels import FORMATS, PreLabels
from metr.completion.request import CompletionRequest
from metr.completion.thresholds import CompletionConfig, Found, Judged, best_of_places, thresholds
from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset, parse_data_arguments
from metr.data.export import MemorySource
from metr.data.export_tools import WRITERS
from metr.data.records import DataIssue, ImageRecord, InMemoryAnnotations
from metr.errors import ConfigError, DataError
from metr.inference.predictor import Prediction, Predictor
from metr.model import METR
from metr.structures import Detections
from metr.text.vocabulary import Vocabulary
from small_runs import make_description

from small import small_detector

# What there is in every image of both datasets; each annotates a part of it.
OBJECTS = {"cat": (2, 3, 14, 15), "dog": (20, 4, 35, 16), "cow": (3, 18, 16, 29), "cats": (2, 3, 15, 15)}
OBJECTS["fox"] = OBJECTS["cat"]
PARTS = {"farm": ("cat", "cow"), "town": ("dog",)}


class Oracle(Predictor):
    """A detector that finds what there is with a score for each name, and a box where nothing is."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.names, self.scores = (), scores
        self.seen: list[str] = []
        self.stop_after = 10_000

    def detect_many(self, images: Iterable[Path]) -> Iterator[Prediction]:
        for path in images:
            if len(self.seen) >= self.stop_after:
                raise KeyboardInterrupt
            self.seen.append(Path(path).name)
            if not Path(path).read_bytes():
                issue = DataIssue(kind="unreadable image", where=str(path), detail="an empty file")
                yield Prediction(source=str(path), issue=issue)
                continue
            rows = [
                (OBJECTS[name], score, self.names.index(name))
                for name, score in self.scores.items()
                if name in self.names
            ]
            rows += [((25.0, 20.0, 36.0, 28.0), 0.3, label) for label in range(len(self.names))]
            found = Detections(
                boxes=torch.tensor([row[0] for row in rows], dtype=torch.float32),
                scores=torch.tensor([row[1] for row in rows]),
                labels=torch.tensor([row[2] for row in rows]),
                names=tuple(self.names),
            )
            yield Prediction(source=str(path), size=(30, 40), detections=found)


@pytest.fixture
def model() -> METR:
    return METR(small_detector(), replace(make_description(), text_encoder={"source": "random"}))


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    one = Oracle({"cat": 0.8, "dog": 0.7, "cow": 0.6})

    def predictor(self: METR, names: Vocabulary, config: Any = None) -> Oracle:
        one.names = names.names
        return one

    monkeypatch.setattr(METR, "predictor", predictor)
    return one


def dataset(folder: Path, kind: str, names: Sequence[str], count: int = 12) -> Path:
    """A dataset of `count` images a split, which annotates some of what there is."""
    splits = {}
    for split in ("train", "val"):
        records = []
        for number in range(count):
            path = folder / "pictures" / f"{split} {number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (number, 0, 0)).save(path)
            boxes = np.array([OBJECTS[name] for name in names], dtype=np.float32)
            sides = boxes[:, 2:] - boxes[:, :2]
            records.append(
                ImageRecord(
                    image_id=number,
                    path=path,
                    width=40,
                    height=30,
                    boxes=boxes,
                    labels=np.arange(len(names)),
                    areas=sides[:, 0] * sides[:, 1],
                    ignore=np.zeros(len(names), dtype=bool),
                )
            )
        splits[split] = InMemoryAnnotations(name="made", split=split, categories=tuple(names), records=tuple(records))
    pictures = folder / "pictures"
    source = MemorySource(
        name="made",
        root=pictures,
        config=DatasetConfig(name="made", path=pictures),
        categories=tuple(names),
        splits=splits,
    )
    WRITERS[kind](source, folder / "data", "copy")
    return folder / "data"


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    def make(farm: str = "coco", town: str = "yolo", parts: dict[str, tuple[str, ...]] = PARTS) -> tuple[str, ...]:
        kinds = {"farm": farm, "town": town}
        return tuple(f"{name}={dataset(tmp_path / name, kinds[name], names)}" for name, names in parts.items())

    return make


def opened(file: Path) -> dict[str, DatasetSource]:
    return {config.name: open_dataset(config) for config in parse_data_arguments([str(file)])}


def names_of(source: DatasetSource, split: str) -> list[list[str]]:
    return [[source.categories[label] for label in record.labels.tolist()] for record in source.split(split)]


def hashes(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "webdataset"])
def test_each_dataset_gets_the_names_of_the_other(
    model: METR, oracle: Oracle, data: Callable[..., tuple[str, ...]], tmp_path: Path, kind: str
) -> None:
    arguments = data(farm=kind)
    before = hashes(tmp_path)
    with (tmp_path / "said").open("w") as said:
        report = run_completion(
            model, CompletionRequest(data=arguments, out=tmp_path / "out"), console=Console(file=said, width=120)
        )
    assert hashes(tmp_path) | before == hashes(tmp_path)
    sure = {one.name: one for one in report.thresholds}
    assert {name: one.threshold for name, one in sure.items()} == pytest.approx(
        {"cat": 0.8, "cow": 0.6, "dog": 0.7}, abs=1e-4
    )
    assert {one.precision for one in sure.values()} == {1.0}
    assert [(one.name, one.format, dict(one.added)) for one in report.datasets] == [
        ("farm", kind, {"dog": 12}),
        ("town", "yolo", {"cat": 12, "cow": 12}),
    ]
    found = opened(tmp_path / "out" / "data.yaml")
    assert names_of(found["farm"], "train") == [["cat", "cow", "dog"]] * 12
    assert names_of(found["farm"], "val") == [["cat", "cow"]] * 12
    assert names_of(found["town"], "train") == [["dog", "cat", "cow"]] * 12
    for name, own in PARTS.items():
        record = found[name].split("train")[0]
        assert [found[name].categories[row] for row in record.annotated or ()] == list(own)
        expected = sorted(list(OBJECTS[one]) for one in ("cat", "cow", "dog"))
        np.testing.assert_allclose(sorted(record.boxes.tolist()), expected, atol=0.01)
    written = json.loads((tmp_path / "out" / "completed.json").read_text())
    assert len(written["boxes"]) == 36
    (row,) = (one for one in written["boxes"] if one["dataset"] == "farm" and "train 0." in one["image"])
    assert row == {**row, "split": "train", "name": "dog", "box": [20, 4, 35, 16], "score": 0.7}
    names = ["completed.json", "data.yaml", "farm", "summary.json", "town"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    text = (tmp_path / "said").read_text()
    assert re.search(r"dog +0\.700 +1\.000 +12 of 12 +12", text)
    assert f"farm: 12 boxes added, 12 images looked at; as {kind} in" in text


def test_names_that_are_never_sure_are_left_out(
    model: METR, oracle: Oracle, data: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    oracle.scores |= {"cat": 0.2}
    report = run_completion(model, CompletionRequest(data=data(), out=tmp_path / "out"))
    why = {one.name: one.why for one in report.thresholds if one.threshold is None}
    assert why == {"cat": "precision 0.9 is never reached (best: 0.50)"}
    config = CompletionConfig(least_objects=13)
    report = run_completion(model, CompletionRequest(data=data_again(tmp_path), out=tmp_path / "few"), config=config)
    assert {one.why for one in report.thresholds} == {"12 objects in val, 13 are needed"}
    assert [dict(one.added) for one in report.datasets] == [{}, {}]
    assert names_of(opened(tmp_path / "few" / "data.yaml")["farm"], "train") == [["cat", "cow"]] * 12


def data_again(tmp_path: Path) -> tuple[str, ...]:
    return tuple(f"{name}={tmp_path / name / 'data'}" for name in PARTS)


def test_only_some_names_and_thresholds_of_ones_own(
    model: METR, oracle: Oracle, data: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    OBJECTS["bird"] = (30, 20, 38, 28)
    oracle.scores |= {"bird": 0.5}
    report = metr.complete(model, data(), str(tmp_path / "out"), only=("cow",), given={"bird": 0.4})
    assert {one.name: one.threshold for one in report.thresholds} == pytest.approx({"cow": 0.6, "bird": 0.4}, abs=1e-4)
    assert [dict(one.added) for one in report.datasets] == [{"bird": 12}, {"cow": 12, "bird": 12}]


def test_spellings_are_annotated_already(
    model: METR, oracle: Oracle, data: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    """A dataset of cats gets no box of `cat`: that is what it annotates."""
    arguments = data(parts={"farm": ("cat", "cow"), "town": ("cats", "dog")})
    oracle.scores |= {"cats": 0.9}
    report = run_completion(model, CompletionRequest(data=arguments, out=tmp_path / "out"))
    assert [dict(one.added) for one in report.datasets] == [{"dog": 12}, {"cow": 12}]


def test_duplicates_of_one_meaning_are_not_added() -> None:
    from metr.completion.boxes import Wanted, completed_record

    record = image(0.5, True).record
    boxes = np.array([[2, 3, 15, 15], [20, 4, 35, 16], [2, 3, 14, 15]], dtype=np.float64)
    found = Found(size=(30, 40), boxes=boxes, scores=np.array([0.9, 0.9, 0.9]), labels=np.array([0, 0, 1]))
    wanted = Wanted(own=("cat",), names=("kitty", "other"), rows={0: 0.5, 1: 0.5}, same={0: "cat"})
    added, names = completed_record(record, record, found, wanted, 0.5)
    assert (names, added.boxes.tolist()) == (("kitty",), boxes[1:2].tolist())
    by_hand = replace(wanted, given=frozenset({0, 1}))
    added, names = completed_record(record, record, found, by_hand, 0.5)
    assert (names, added.boxes.tolist()) == (("kitty", "other"), boxes[1:].tolist())


def test_it_goes_on_where_it_was_stopped(
    model: METR, oracle: Oracle, data: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    arguments = data()
    request = CompletionRequest(data=arguments, out=tmp_path / "out")
    oracle.stop_after = 30
    with pytest.raises(KeyboardInterrupt):
        run_completion(model, request)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [JOURNAL]
    with (tmp_path / "out" / JOURNAL).open("a") as file:
        file.write('{"image": "farm/cut o')
    with pytest.raises(DataError, match="unfinished completion of other data"):
        run_completion(model, replace(request, only=("cow",)))
    oracle.stop_after = 10_000
    resumed = run_completion(model, request)
    assert len(oracle.seen) == 48
    oracle.seen.clear()
    whole = run_completion(model, replace(request, out=tmp_path / "whole"))
    assert [dict(one.added) for one in resumed.datasets] == [dict(one.added) for one in whole.datasets]
    relative = [
        {Path(path).relative_to(root): digest for path, digest in hashes(root).items()}
        for root in (tmp_path / "out", tmp_path / "whole")
    ]
    assert {key: one for key, one in relative[0].items() if key.name != "summary.json"} == {
        key: one for key, one in relative[1].items() if key.name != "summary.json"
    }
    with pytest.raises(DataError, match="not empty"):
        run_completion(model, request)


def test_a_dataset_that_was_written_is_not_written_twice(
    model: METR, oracle: Oracle, data: Callable[..., tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import metr.completion.complete as module

    request, write, calls = CompletionRequest(data=data(), out=tmp_path / "out"), module.write_completed, []

    def stopping(source: DatasetSource, *rest: Any) -> Any:
        calls.append(source.name)
        if calls == ["farm", "town"]:
            raise KeyboardInterrupt
        return write(source, *rest)

    monkeypatch.setattr(module, "write_completed", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_completion(model, request)
    report = run_completion(model, request)
    assert calls == ["farm", "town", "town"]
    assert [dict(one.added) for one in report.datasets] == [{"dog": 12}, {"cat": 12, "cow": 12}]
    assert names_of(opened(tmp_path / "out" / "data.yaml")["farm"], "train") == [["cat", "cow", "dog"]] * 12
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("kind", FORMATS)
def test_labels_for_new_images(
    model: METR, oracle: Oracle, data: Callable[..., tuple[str, ...]], tmp_path: Path, kind: str
) -> None:
    arguments, new = data(), tmp_path / "new images"
    for name in ("a.png", "more/a.png", "more/b.png"):
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(new / name)
    before = hashes(new)
    request = CompletionRequest(data=arguments, out=tmp_path / "out", new=PreLabels(folder=new, format=kind))
    report = run_completion(model, request)
    assert hashes(new) == before
    assert [(one.name, one.format, one.images, dict(one.added)) for one in report.datasets] == [
        ("new images", kind, 3, {"cat": 3, "dog": 3, "cow": 3})
    ]
    rows = json.loads((tmp_path / "out" / "completed.json").read_text())["boxes"]
    assert sorted({row["image"] for row in rows}) == ["a.png", "more/a.png", "more/b.png"]
    assert {(row["dataset"], row["name"], row["score"]) for row in rows} == {
        ("new images", "cat", 0.8), ("new images", "dog", 0.7), ("new images", "cow", 0.6)
    }  # fmt: skip
    out = tmp_path / "out" / "new images"
    if kind == "label_studio":
        tasks = json.loads((out / "train.json").read_text())
        (prediction,) = tasks[0]["predictions"]
        assert prediction["model_version"].startswith("METR ")
        assert prediction["score"] == pytest.approx(0.7, abs=1e-3)
        assert len(prediction["result"]) == 3
        return
    found = open_dataset(DatasetConfig(name="made", path=out, splits={"train": "train"}), tmp_path / "cache")
    assert found.format == kind
    assert sorted(names_of(found, "train")[0]) == ["cat", "cow", "dog"]
    assert len(found.split("train")) == 3


def test_new_images_that_cannot_be_read_are_no_dataset(
    model: METR, oracle: Oracle, data: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    arguments, new = data(), tmp_path / "new"
    new.mkdir()
    (new / "a.jpg").touch()
    (new / "b.jpg").touch()
    request = CompletionRequest(data=arguments, out=tmp_path / "out", new=PreLabels(folder=new))
    with pytest.raises(DataError, match="none of its images could be read"):
        run_completion(model, request)
    assert not (tmp_path / "out" / "new").exists()


def test_what_people_named_gets_no_second_name(
    model: METR, oracle: Oracle, data: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    """Where farm has a cat, the detector sees what town calls a fox. A threshold of one's own adds it all the same."""
    arguments = data(parts={"farm": ("cat", "cow"), "town": ("fox",)})
    oracle.scores = {"fox": 0.75, "cow": 0.6}
    report = run_completion(model, CompletionRequest(data=arguments, out=tmp_path / "out"))
    assert [dict(one.added) for one in report.datasets] == [{}, {"cow": 12}]
    (fox,) = (one for one in report.thresholds if one.name == "fox")
    assert (fox.threshold, fox.objects, fox.elsewhere) == (None, 12, 12)
    assert fox.why.endswith("; 12 boxes on what other datasets call otherwise")
    report = run_completion(model, CompletionRequest(data=arguments, out=tmp_path / "own", given={"fox": 0.5}))
    assert [dict(one.added) for one in report.datasets] == [{"fox": 12}, {"cow": 12}]


def test_nothing_is_written_into_a_dataset(
    model: METR, oracle: Oracle, data: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    arguments = data()
    before, folder = hashes(tmp_path), Path(arguments[0].partition("=")[2])
    with pytest.raises(DataError, match="own folder"):
        run_completion(model, CompletionRequest(data=arguments, out=folder / "sub"))
    assert hashes(tmp_path) == before
    assert not (folder / "sub").exists()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        run_completion(model, CompletionRequest(data=arguments, out=tmp_path / "file"))
    assert oracle.seen == []


def test_thresholds_are_the_lowest_that_are_precise() -> None:
    """Ten right ones, a wrong one, right ones until nine of ten around there are right; the last ones are below."""
    right = [True] * 10 + [False] + [True] * 12 + [False] * 3
    scores = np.linspace(0.9, 0.1, len(right))
    judged = [image(score, is_right) for score, is_right in zip(scores.tolist(), right, strict=True)]
    (one,) = thresholds(judged, ["cat"], CompletionConfig()).values()
    assert (one.threshold, one.precision, one.found) == (pytest.approx(scores[22]), pytest.approx(22 / 23), 22)
    (one,) = thresholds(judged, ["cat"], CompletionConfig(precision=1.0)).values()
    assert one.threshold == pytest.approx(scores[9])


def test_precision_is_asked_for_at_the_threshold_itself() -> None:
    """Many sure ones above do not make up for doubtful ones below."""
    scores = [0.9] * 30 + [0.3, 0.29, 0.28]
    judged = [image(score, right) for score, right in zip(scores, [True] * 30 + [False, True, False], strict=True)]
    (one,) = thresholds(judged, ["cat"], CompletionConfig()).values()
    assert (one.threshold, one.precision) == (0.9, 1.0)


def test_a_name_is_wrong_on_what_other_datasets_call_otherwise() -> None:
    home = [image(0.5, True) for _ in range(12)]
    elsewhere = [replace(image(0.8, True), categories=("dog",)) for _ in range(4)]
    beside = [replace(image(0.8, False), categories=("dog",)) for _ in range(4)]  # nothing is known there
    (one,) = thresholds([*home, *beside], ["cat"], CompletionConfig()).values()
    assert (one.threshold, one.elsewhere) == (0.5, 0)
    (one,) = thresholds([*home, *elsewhere], ["cat"], CompletionConfig()).values()
    assert (one.threshold, one.elsewhere) == (None, 4)
    alike = [replace(one, alike={"cat": "dog"}) for one in elsewhere]
    (one,) = thresholds([*home, *alike], ["cat"], CompletionConfig()).values()
    assert (one.threshold, one.elsewhere) == (0.5, 0)


def test_of_two_names_at_one_place_the_surer_one_stays() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 9, 10], [30, 0, 40, 10]], dtype=np.float64)
    found = Found(size=(30, 40), boxes=boxes, scores=np.array([0.6, 0.8, 0.7, 0.5]), labels=np.array([0, 1, 1, 0]))
    assert best_of_places(found, 0.5).scores.tolist() == [0.8, 0.7, 0.5]
    assert best_of_places(found, 0.5, {0}).scores.tolist() == [0.6, 0.8, 0.7, 0.5]
    assert best_of_places(found, 0.95).scores.tolist() == [0.6, 0.8, 0.7, 0.5]


def image(score: float, right: bool, *, annotated: tuple[int, ...] | None = None, ignored: bool = False) -> Judged:
    truth = np.array([[2, 3, 14, 15]], dtype=np.float32)
    record = ImageRecord(
        image_id=1,
        path=Path("a"),
        width=40,
        height=30,
        boxes=truth,
        labels=np.array([0]),
        areas=np.array([144.0]),
        ignore=np.array([ignored]),
        annotated=annotated,
    )
    box = [2, 3, 14, 15] if right else [20, 4, 35, 16]
    found = Found(
        size=(30, 40), boxes=np.array([box], dtype=np.float64), scores=np.array([score]), labels=np.array([0])
    )
    return Judged(record=record, categories=("cat",), found=found)


def test_ignored_boxes_and_unknown_images_count_neither_way() -> None:
    sure = [image(0.9, True) for _ in range(12)]
    neither = [image(0.99, True, ignored=True), image(0.99, False, annotated=())]
    (one,) = thresholds([*sure, *neither], ["cat"], CompletionConfig()).values()
    assert (one.threshold, one.precision, one.found, one.objects) == (0.9, 1.0, 12, 13)
    (one,) = thresholds([*sure[:4], *neither], ["cat"], CompletionConfig(least_objects=1)).values()
    assert (one.threshold, one.why) == (None, "sure of 4 objects in val alone, 5 are needed")
    (one,) = thresholds([image(0.8, False)], ["cat"], CompletionConfig(least_objects=1)).values()
    assert one.threshold is None


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"only": ("cta",)}, "'cta' is a name of no dataset"),
        ({"given": {"bird": 1.5}}, "expected a score of 0.05 to 1 for 'bird', found 1.5"),
    ],
)
def test_mistakes(
    model: METR, data: Callable[..., tuple[str, ...]], tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(what)):
        run_completion(model, CompletionRequest(data=data(), out=tmp_path / "out", **changes))
    with pytest.raises(ConfigError, match=r"no option 'olny'\n.*did you mean 'only'"):
        metr.complete(model, data_again(tmp_path), tmp_path / "out", olny=("cat",))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="one dataset has no names of others"):
        metr.complete(model, data_again(tmp_path)[0], tmp_path / "out")
