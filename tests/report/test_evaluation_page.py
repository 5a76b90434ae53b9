"""The page of an evaluation: its numbers, what it escapes, how large it is, and which images it shows."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metr.data.datasets_file import DatasetSource
from metr.data.joint import open_joint
from metr.data.records import Annotations, ImageRecord, InMemoryAnnotations
from metr.errors import MetrError
from metr.evaluation import diagnosis
from metr.evaluation.matching import Case, Verdict, judge
from metr.evaluation.report import write_report
from metr.evaluation.results import as_dict
from metr.evaluation.runner import Detailed, evaluate_in_detail
from metr.report import page as page_module
from metr.report import read_report, write_evaluation_page

from read_page import Element, data_of, one, read_page
from simulated_detector import Rates, simulated
from tiny import CommandLine, TinyRun

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow  # they draw the demo's datasets
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '"><b onmouseover="alert(1)',
    "{{ 7 * 7 }} {% raw %}",
    "\u202egnirts\u202c \u2066x",
    "x" * 3000,
    "猫 и כלב",
    "a\nb\x00c\x1b[31m",
)


@pytest.fixture(scope="module")
def detailed(demo_sets: Mapping[str, Annotations]) -> Detailed:
    return simulated(demo_sets)


@pytest.fixture(scope="module")
def written(detailed: Detailed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_report(detailed.report, folder)
    arm = replace(detailed.report, datasets=detailed.report.datasets[:2])
    return write_evaluation_page(detailed, folder / "evaluation.html", "Evaluation of runs/joint", {"alone": arm})


@pytest.fixture(scope="module")
def page(written: Path) -> Element:
    return read_page(written)


def value(cell: Element) -> float | None:
    """The number of a cell, which it shows rounded."""
    told = cell.attributes["data-value"]
    number = None if told == "" else float(told)
    shown = cell.text.split()[0].replace(",", "")
    assert (shown == "–") == (number is None)
    if number is not None:
        digits = len(shown.partition(".")[2])
        assert shown == f"{number:.{digits}f}"
    return number


def test_numbers_of_datasets_are_those_of_evaluation_json(page: Element, written: Path) -> None:
    values = json.loads((written.parent / "evaluation.json").read_text())
    *rows, mean = one(page, "table", id="dataset-table").rows
    for row, told in zip(rows, values["datasets"], strict=True):
        assert row[0].text == told["name"]
        own, joint = told["own"]["coco"], told["joint"]["coco"]
        expected = [told["images"], joint["objects"], len(joint["categories"]), own["ap"], own["ap50"], joint["ap"]]
        expected += [joint["ap50"], values["confusion"]["shares"][told["name"]]]
        assert [value(cell) for cell in row[2:]] == pytest.approx(expected, abs=0)
    assert [value(cell) for cell in mean[5:9]] == [
        values["mean"][mode][metric] for mode in ("own", "joint") for metric in ("ap", "ap50")
    ]
    for mode in ("own", "joint"):
        assert value(one(page, "dd", data_mean=mode)) == values["mean"][mode]["ap"]


def test_numbers_of_names_and_sizes_are_those_of_evaluation_json(page: Element, written: Path) -> None:
    values = json.loads((written.parent / "evaluation.json").read_text())["datasets"]
    rows = iter(one(page, "table", id="name-table").rows)
    sizes = iter(one(page, "table", id="size-table").rows)
    for told in values:
        for own, joint in zip(told["own"]["coco"]["categories"], told["joint"]["coco"]["categories"], strict=True):
            row = next(rows)
            assert [row[0].text, row[1].text] == [own["name"], told["name"]]
            point = joint["best"]
            expected = [joint["objects"], own["ap"], joint["ap"], joint["ap50"]]
            expected += [point["threshold"], point["precision"], point["recall"]]
            assert [value(cell) for cell in row[2:]] == expected
        coco = told["joint"]["coco"]
        expected = [coco[key] for key in ("ap_small", "ap_medium", "ap_large", "ap75", "ar100")]
        assert [value(cell) for cell in next(sizes)[1:]] == expected


def test_errors_and_calibration_are_those_of_evaluation_json(page: Element, written: Path) -> None:
    for told in json.loads((written.parent / "evaluation.json").read_text())["datasets"]:
        table = one(page, "table", data_errors=told["name"])
        errors = told["diagnosis"]["errors"]
        assert [[value(cell) for cell in row[1:]] for row in table.rows] == [[e["lost"], e["shown"]] for e in errors]
        assert value(one(page, "strong", data_ece=told["name"])) == told["diagnosis"]["calibration"]["error"]


def test_what_an_arm_lacks_is_not_compared(page: Element) -> None:
    (card,) = (card for card in page.every("div") if card.attributes.get("class") == "card" and "alone" in card.text)
    (table,) = card.every("table")
    assert [row[0].text for row in table.rows] == ["pond", "desk", "mean"]
    assert [row[3].text for row in table.rows] == ["+0.0", "+0.0", "+0.0"]


def test_what_the_datasets_gave_each_other(detailed: Detailed, tmp_path: Path) -> None:
    """Known where another detector was trained on some of the same datasets alone, and only for what both know."""
    whole = replace(detailed.report, trained_on=("pond", "desk", "meadow"))
    pond, desk, meadow = (replace(one, diagnosis=None) for one in whole.datasets)
    assert pond.own is not None
    worse = replace(pond, own=replace(pond.own, coco=replace(pond.own.coco, ap=1.0)))
    arms = {
        "without meadow": replace(whole, datasets=(worse, desk, meadow), trained_on=("pond", "desk")),
        "pond <alone>": replace(whole, datasets=(worse,), trained_on=("pond",)),
        "test": replace(whole, datasets=(replace(worse, split="test"), desk), trained_on=("pond",)),
        "more": replace(whole, trained_on=("pond", "other")),
        "same": whole,
        "unknown": replace(whole, trained_on=()),
    }
    page = read_page(write_evaluation_page(whole, tmp_path / "p.html", "arms", arms))
    gain = f"{pond.own.coco.ap - 1:+.1f}" if pond.own.coco.ap else ""
    rows = [[cell.text for cell in row] for row in one(page, "table", id="gifts").rows]
    assert rows == [["meadow", "without meadow", gain, "+0.0", "–"], ["desk, meadow", "pond <alone>", gain, "–", "–"]]
    cards = {next(card.every("h3")).text: card for card in page.every("div") if card.attributes.get("class") == "card"}
    means = {name: next(cards[name].every("table")).rows[-1][3].text for name in arms}
    assert means["pond <alone>"] == gain
    assert means["same"] == means["unknown"] == "+0.0"
    assert "Measured on other splits there" in cards["test"].text
    plain = read_page(write_evaluation_page(whole, tmp_path / "q.html", "none", {"same": whole}))
    assert not [table for table in plain.every("table") if table.attributes.get("id") == "gifts"]


def test_it_asks_no_network(written: Path, page: Element) -> None:
    text = written.read_text(encoding="utf-8")
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text
    for element in page.every():
        for key in ("src", "href", "srcset", "action", "data"):
            target = element.attributes.get(key)
            assert target is None or target.startswith(("data:", "#")), target
    policy = one(page, "meta", http_equiv="Content-Security-Policy").attributes["content"]
    assert policy.startswith("default-src 'none'")


def test_every_link_leads_to_a_section(page: Element) -> None:
    anchors = {element.attributes["id"] for element in page.every() if "id" in element.attributes}
    links = [link.attributes["href"].removeprefix("#") for link in one(page, "nav").every("a")]
    assert set(links) <= anchors
    assert len(links) == len(set(links)) == len(list(page.every("section")))


def hostile_sets(folder: Path) -> dict[str, Annotations]:
    """A dataset whose name, categories and files say what they can."""
    folder.mkdir()
    records = []
    for number, name in enumerate(HOSTILE):
        file = "".join(letter for letter in name[:60] if letter not in "/\0") + ".png"
        Image.fromarray(np.full((60, 80, 3), 40 * (number % 6), dtype=np.uint8)).save(folder / file)
        records.append(
            ImageRecord(
                image_id=file,
                path=folder / file,
                width=80,
                height=60,
                boxes=np.array([[10, 10, 50, 50]], dtype=np.float32),
                labels=np.array([number]),
                areas=np.array([1600.0]),
                ignore=np.array([False]),
            )
        )
    one_ = InMemoryAnnotations(name=HOSTILE[1], split="val", categories=HOSTILE, records=tuple(records))
    other = InMemoryAnnotations(name="plain", split="val", categories=("cat",), records=tuple(records[:1]))
    return {one_.name: one_, "plain": replace(other, records=(replace(records[0], labels=np.array([0])),))}


def test_images_that_training_had_are_told(detailed: Detailed, page: Element, tmp_path: Path) -> None:
    first, second, *_ = (one.name for one in detailed.report.datasets)
    fact = f"the checkpoint was trained on 7 images of <b>{60 * 'it'}</b>, these 3 images of val among them"
    report = detailed.report.with_seen({second: fact})
    told = [one.text for one in read_page(write_evaluation_page(report, tmp_path / "seen.html", "it")).every("p")]
    (text,) = (text for text in told if "trained on" in text)
    assert f"{fact}; AP there says how well it knows these, not how well it finds what is in new images." in text
    assert second in text
    assert first not in text
    assert not any("the checkpoint was trained on" in one.text for one in page.every("p"))


def test_nothing_from_elsewhere_is_markup(tmp_path: Path) -> None:
    rates = Rates(missed=0.5, wrong_name=0.9, elsewhere=2)
    detailed = simulated(hostile_sets(tmp_path / "images"), rates=rates)
    path = write_evaluation_page(detailed, tmp_path / "page.html", HOSTILE[0], {HOSTILE[1]: detailed.report})
    page = read_page(path)
    assert [script.attributes for script in page.every("script")] == [
        {"type": "application/json", "id": "worst-data"},
        {"type": "application/json", "id": "presence-data"},
        {},
    ]
    for element in page.every():
        assert not [key for key in element.attributes if key.startswith("on")]
        assert element.tag != "b"
        assert element.tag != "img" or element.attributes["src"].startswith("data:image/jpeg;base64,")
    names = [row[0].text for row in one(page, "table", id="name-table").rows]
    assert names[:4] == [" ".join(name.split()) for name in HOSTILE[:4]]
    assert names[4] == "\\u202egnirts\\u202c \\u2066x"
    assert len(names[5]) == 160
    assert names[5].endswith("…")
    assert names[6:8] == ["猫 и כלב", "a b\\x00c\\x1b[31m"]
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", path.read_text(encoding="utf-8"))
    assert "49" not in {row[0].text for row in one(page, "table", id="name-table").rows}
    assert any("<script>" in box["name"] for image in data_of(page, "worst-data") for box in image["truth"])


def test_without_objects_and_without_detections(tmp_path: Path) -> None:
    empty = ImageRecord(
        image_id=0,
        path=tmp_path / "gone.jpg",
        width=80,
        height=60,
        boxes=np.zeros((0, 4), dtype=np.float32),
        labels=np.zeros(0, dtype=np.int64),
        areas=np.zeros(0),
        ignore=np.zeros(0, dtype=bool),
    )
    sets = {"empty": InMemoryAnnotations(name="empty", split="val", categories=("cat",), records=(empty,))}
    path = write_evaluation_page(simulated(sets), tmp_path / "page.html", "nothing")
    assert "–" in one(read_page(path), "table", id="dataset-table").text


def test_many_names_and_many_images_stay_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = tmp_path / "noise.png"
    Image.fromarray(rng.integers(0, 256, (900, 900, 3), dtype=np.uint8)).save(noise)
    sets = {}
    for dataset in ("one", "two", "three"):
        categories = tuple(f"{dataset} category number {number}" for number in range(100))
        records = []
        for number in range(150):
            corners = rng.uniform(0, 600, (6, 2))
            boxes = np.concatenate([corners, corners + rng.uniform(20, 300, (6, 2))], axis=1)
            records.append(
                ImageRecord(
                    image_id=number,
                    path=noise,
                    width=900,
                    height=900,
                    boxes=boxes.astype(np.float32),
                    labels=rng.integers(0, 100, 6),
                    areas=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1),
                    ignore=np.zeros(6, dtype=bool),
                )
            )
        sets[dataset] = InMemoryAnnotations(name=dataset, split="val", categories=categories, records=tuple(records))
    path = write_evaluation_page(simulated(sets, rates=Rates(wrong_name=0.3)), tmp_path / "page.html", "many")
    page = read_page(path)
    assert len(one(page, "table", id="name-table").rows) == 300
    assert len(list(page.every("img"))) == 20
    assert path.stat().st_size < 8e6


def test_a_page_that_would_be_too_large_is_refused(
    detailed: Detailed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "LIMIT", 1000)
    with pytest.raises(MetrError, match="try: evaluate fewer datasets"):
        write_evaluation_page(detailed, tmp_path / "page.html", "large")
    assert not (tmp_path / "page.html").exists()


def planted(annotations: Annotations, seed: int, count: int = 10) -> tuple[InMemoryAnnotations, set[object]]:
    """The annotations with another label for one object in each of `count` images, and the ids of these images."""
    rng = np.random.default_rng(seed)
    records = [annotations[row] for row in range(len(annotations))]
    chosen = rng.permutation([row for row, record in enumerate(records) if len(record.labels)])[:count]
    for row in chosen.tolist():
        labels = records[row].labels.copy()
        place = int(rng.integers(len(labels)))
        labels[place] = (labels[place] + rng.integers(1, len(annotations.categories))) % len(annotations.categories)
        records[row] = replace(records[row], labels=labels)
    changed = InMemoryAnnotations(
        name=annotations.name, split=annotations.split, categories=annotations.categories, records=tuple(records)
    )
    return changed, {records[row].path.name for row in chosen.tolist()}


def test_detections_are_judged_once_for_numbers_and_page(
    demo_sets: Mapping[str, Annotations], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Case] = []

    def counted(case: Case) -> Verdict:
        looked.append(case)
        return judge(case)

    monkeypatch.setattr(diagnosis, "judge", counted)
    write_evaluation_page(simulated(demo_sets), tmp_path / "p.html", "once")
    assert len(looked) == 2 * sum(map(len, demo_sets.values()))  # all detections of an image, and the shown ones


@pytest.mark.parametrize("seed", range(3))
def test_wrong_labels_are_among_the_worst_images(
    seed: int, demo_sets: Mapping[str, Annotations], tmp_path: Path
) -> None:
    """Ten of 25 images of a dataset (of 75 in all) have one wrong label; the detector errs too, but less often."""
    wrong, images = planted(demo_sets["pond"], seed)
    rates = Rates(missed=0.03, wrong_name=0.005, elsewhere=0.2, other_dataset=0.005)
    detailed = simulated({**demo_sets, "pond": wrong}, demo_sets, seed, rates)
    shown = data_of(read_page(write_evaluation_page(detailed, tmp_path / "p.html", "planted")), "worst-data")
    assert len(shown) == 20
    assert len({image["name"] for image in shown} & images) >= 9


def test_wrong_labels_are_found_with_a_trained_detector(shared: Path, tmp_path: Path) -> None:
    joint = open_joint([str(shared / "data" / "chess_pieces")])
    wrong, images = planted(joint.evaluation()["chess_pieces"], 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DatasetSource, "split", lambda *_: wrong)
        found = evaluate_in_detail(
            ROOT / "checkpoints" / "metr-nano", str(shared / "data" / "chess_pieces"), device="cpu"
        )
    shown = data_of(read_page(write_evaluation_page(found, tmp_path / "p.html", "planted")), "worst-data")
    assert len({image["name"] for image in shown} & images) >= 9


def test_the_command_writes_it(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    ended = metr("evaluate", tiny_run.folder, *tiny_run.data, "-o", tmp_path / "e", "--html")
    assert ended.code == 0, ended.err
    assert f"{tmp_path / 'e/evaluation.html'} is one file of" in ended.words
    told = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert as_dict(read_report(tmp_path / "e"))["mean"] == told["mean"]
    page = read_page(tmp_path / "e/evaluation.html")
    assert value(one(page, "dd", data_mean="own")) == told["mean"]["own"]["ap"]
    assert len(data_of(page, "presence-data")) == 3
    again = metr(
        "evaluate",
        tiny_run.folder,
        tiny_run.data[0],
        "-o",
        tmp_path / "f",
        "--html",
        "--compare",
        f"all={tmp_path / 'e'}",
    )
    assert again.code == 0, again.err
    assert "Compared with other detectors" in (tmp_path / "f/evaluation.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compare", "a=b"], "--compare: goes with --html only"),
        (["--html", "--compare", "nothing"], "--compare: expected NAME=PATH, found 'nothing'"),
        (["--html", "--compare", "a=b", "--compare", "a=c"], "two evaluations are called 'a'"),
        (["--html", "--compare", "a=missing"], "missing: expected an evaluation.json"),
    ],
)
def test_mistakes(arguments: list[str], said: str, metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    ended = metr("evaluate", tiny_run.folder, tiny_run.data[0], "-o", tmp_path / "e", *arguments)
    assert ended.code == 1
    assert said in ended.words
    assert not (tmp_path / "e").exists()
