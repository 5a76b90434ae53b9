import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from played import Answer, Images, ScriptedNetwork, annotations, detections, record
from rich.console import Console

from metr.errors import ConfigError, DataError, ModelError
from metr.evaluation.coco import CocoResult, evaluate_detections
from metr.evaluation.evaluator import EvaluationSet, Evaluator
from metr.evaluation.report import as_markdown, category_table, dataset_table, show, write_report
from metr.evaluation.results import EvaluationConfig, EvaluationReport, Mode, as_dict, from_dict
from metr.text.vocabulary import Vocabulary

from small import TEXT_WIDTH, small_detector

CAT, DOG = (10.0, 10.0, 40.0, 40.0), (50.0, 20.0, 90.0, 70.0)
CARD, FAR = (0.0, 0.0, 30.0, 60.0), (60.0, 60.0, 99.0, 79.0)

PETS = annotations(
    "pets", ("cat", "dog"), record("a", [(0, CAT), (1, DOG)]), record("b", [(0, CAT)]), record("c", [(1, DOG)])
)
CARDS = annotations("cards", ("king", "ace"), record(0, [(0, CARD)]), record(1, [(0, CARD), (1, FAR)], crowds=[1]))
VOCABULARY = Vocabulary.union({"pets": PETS.categories, "cards": CARDS.categories})

# Images 0 to 2 are pets, 3 and 4 cards. In image 1 the best guess is a card.
SCRIPT = {
    0: [Answer("cat", 0.9, CAT), Answer("dog", 0.8, DOG), Answer("king", 0.1, FAR)],
    1: [Answer("king", 0.95, CAT), Answer("cat", 0.7, CAT), Answer("dog", 0.75, FAR)],
    2: [Answer("dog", 0.6, DOG)],
    3: [Answer("king", 0.9, CARD), Answer("cat", 0.5, CAT)],
    4: [Answer("ace", 0.9, CARD), Answer("king", 0.3, CARD)],
}


def make_network() -> ScriptedNetwork:
    return ScriptedNetwork(VOCABULARY.names, SCRIPT)


def make_sets() -> list[EvaluationSet]:
    return [
        EvaluationSet(annotations=PETS, batches=Images(PETS, (0, 1, 2))),
        EvaluationSet(annotations=CARDS, batches=Images(CARDS, (3, 4))),
    ]


def run(config: EvaluationConfig | None = None, unannotated: str | None = None) -> EvaluationReport:
    return Evaluator(torch.eye(4), VOCABULARY, config).evaluate(make_network(), make_sets(), unannotated)


def without_points(result: CocoResult) -> CocoResult:
    """The result without thresholds, which follow the scores and not their order alone."""
    return replace(result, categories=tuple(replace(one, best=None) for one in result.categories))


def test_scores_are_those_of_the_script() -> None:
    report = run()
    pets, cards = report.datasets
    # scripted scores go through logits and back, which keeps their order and so every number below
    own = {
        "a": detections(("cat", "dog"), ("cat", 0.9, CAT), ("dog", 0.8, DOG)),
        "b": detections(("cat", "dog"), ("dog", 0.75, FAR), ("cat", 0.7, CAT)),
        "c": detections(("cat", "dog"), ("dog", 0.6, DOG)),
    }
    assert without_points(pets.own.coco) == without_points(evaluate_detections(PETS, own))
    # all unannotated names fit among the hundred, so nothing changes but what presence says
    assert without_points(pets.joint.coco) == without_points(pets.own.coco)
    assert (pets.own.names, pets.joint.names) == (2, 4)
    # kings: both found first, one wrong "ace" counts for a category without objects
    assert cards.own.coco.ap == pytest.approx(100)
    assert [one.ap for one in cards.own.coco.categories] == [pytest.approx(100), None]
    assert report.mean("own") == pytest.approx((pets.own.coco.ap + 100) / 2)
    assert (pets.images, pets.missing, cards.images) == (3, 0, 2)


def test_recall_of_presence_counts_present_categories() -> None:
    pets, cards = run(EvaluationConfig(recall_at=(1, 2))).datasets
    # own: a keeps cat, then dog; b ranks dog, cat; c dog. All names: king comes first in b.
    assert pets.own.recall == pytest.approx({1: 100 * 2 / 4, 2: 100})
    assert pets.joint.recall == pytest.approx({1: 100 * 2 / 4, 2: 100 * 3 / 4})
    # the crowd of aces is not asked for
    assert cards.own.recall == pytest.approx({1: 100 * 1 / 2, 2: 100})


def test_cross_dataset_confusion_counts_the_best_detections() -> None:
    report = run()
    # a: cat, dog; b: king; c: dog; the first card: king; the second, whose ace is a crowd: ace
    assert report.confusion.counts == ((3.0, 1.0), (0.0, 2.0))
    assert report.confusion.shares == pytest.approx({"pets": 25.0, "cards": 0.0})
    # the mean over datasets, not over detections (1 of 6), as all means are
    assert report.mean_confusion == pytest.approx(12.5)
    together = run(EvaluationConfig(domains={"pets": "photographs", "cards": "photographs"}))
    assert together.confusion is None
    assert [one.domain for one in together.datasets] == ["photographs", "photographs"]


def test_names_that_a_datasets_file_leaves_out_are_no_other_datasets() -> None:
    pets, cards = make_sets()
    part = replace(pets, annotations=replace(PETS, unknown_names=("king",)))
    report = Evaluator(torch.eye(4), VOCABULARY).evaluate(make_network(), [part, cards])
    assert report.confusion is not None
    assert report.confusion.shares == pytest.approx({"pets": 0.0, "cards": 0.0})


def test_foreign_names_count_among_the_detections_of_a_image() -> None:
    narrow = EvaluationConfig.checked({"inference": {"postprocess": {"max_detections": 1}}})
    pets = run(narrow).datasets[0]
    # Own: image b's one detection is a wrong dog, ahead of the right one in c. Joint vocabulary: it is the king.
    half_found = 100 * 51 / 101
    assert pets.own.coco.categories[1].ap == pytest.approx(half_found / 2)
    assert pets.joint.coco.categories[1].ap == pytest.approx(half_found)
    assert [part.coco.categories[0].ap for part in (pets.own, pets.joint)] == [pytest.approx(half_found)] * 2


def test_each_mode_asks_for_its_names_and_only_once() -> None:
    for modes, expected in {
        ("own",): [("cat", "dog")] * 2 + [("king", "ace")],
        ("joint",): [VOCABULARY.names] * 3,
        ("own", "joint"): [("cat", "dog"), VOCABULARY.names] * 2 + [("king", "ace"), VOCABULARY.names],
    }.items():
        network = make_network()
        report = Evaluator(torch.eye(4), VOCABULARY, EvaluationConfig(modes=modes)).evaluate(network, make_sets())
        assert network.asked == expected
        assert [one.own is not None for one in report.datasets] == ["own" in modes] * 2
        assert (report.confusion is not None) == ("joint" in modes)


def test_the_default_names_are_asked_where_a_dataset_has_no_others() -> None:
    modes: tuple[Mode, ...] = ("own", "default", "joint")

    def asked(*names: str) -> tuple[list[tuple[str, ...]], list[int | None]]:
        network = make_network()
        config = EvaluationConfig(modes=modes, default_names=names)
        report = Evaluator(torch.eye(4), VOCABULARY, config).evaluate(network, make_sets())
        assert from_dict(as_dict(report)) == report
        return network.asked, [one.default and one.default.names for one in report.datasets]

    pets, cards, every = ("cat", "dog"), ("king", "ace"), VOCABULARY.names
    assert asked("dog", "cat") == ([pets, every] * 2 + [cards, every], [2, None]), "pets is not run twice"
    three = ("ace", "dog", "cat")
    assert asked(*three) == ([pets, three, every] * 2 + [cards, every], [3, None])
    assert asked() == ([pets, every] * 2 + [cards, every], [None, None])


def test_a_detector_encodes_each_image_once_for_all_vocabularies() -> None:
    network, text = small_detector(), torch.nn.functional.normalize(torch.randn(4, TEXT_WIDTH), dim=-1)
    encoded: list[int] = []
    network.encoder.register_forward_hook(lambda *_: encoded.append(1))

    def report(*modes: Mode) -> EvaluationReport:
        return Evaluator(text, VOCABULARY, EvaluationConfig(modes=modes)).evaluate(network, make_sets())

    both = report("own", "joint")
    assert len(encoded) == 3, "one for each batch"
    assert [one.own for one in both.datasets] == [one.own for one in report("own").datasets]
    assert [one.joint for one in both.datasets] == [one.joint for one in report("joint").datasets]


def test_one_dataset_is_not_run_twice() -> None:
    vocabulary = Vocabulary.union({"pets": PETS.categories})
    network = ScriptedNetwork(VOCABULARY.names, SCRIPT)
    held = EvaluationSet(annotations=PETS, batches=Images(PETS, (0, 1, 2)))
    report = Evaluator(torch.eye(4)[:2], vocabulary).evaluate(network, [held])
    assert network.asked == [("cat", "dog")] * 2
    assert report.datasets[0].own == report.datasets[0].joint
    assert report.confusion is None


def test_images_that_cannot_be_read_are_counted_and_in_no_number() -> None:
    held = EvaluationSet(annotations=PETS, batches=Images(PETS, (0, 1, 2), skip=(1,)))
    report = Evaluator(torch.eye(4), VOCABULARY).evaluate(make_network(), [held])
    (pets,) = report.datasets
    assert (pets.images, pets.missing, pets.own.coco.objects) == (2, 1, 3)
    assert pets.own.coco.ap == pytest.approx(100)
    assert "1 of pets" in as_markdown(report)
    nothing = EvaluationSet(annotations=PETS, batches=Images(PETS, (0, 1, 2), skip=(0, 1, 2)))
    with pytest.raises(DataError, match="no image could be read"):
        Evaluator(torch.eye(4), VOCABULARY).evaluate(make_network(), [nothing])


def test_progress_is_told_after_each_batch() -> None:
    told: list[tuple[str, int, int]] = []
    Evaluator(torch.eye(4), VOCABULARY, progress=lambda *step: told.append(step)).evaluate(make_network(), make_sets())
    assert told == [("pets", 2, 3), ("pets", 3, 3), ("cards", 2, 2)]


def test_metrics_are_flat_and_have_one_headline() -> None:
    report = run(EvaluationConfig(outside_mean=("cards",)))
    metrics = report.metrics()
    assert metrics["AP"] == report.datasets[0].own.coco.ap
    assert metrics["AP cards"] == pytest.approx(100)
    assert metrics["cross-dataset confusion"] == pytest.approx(25.0), "cards are outside the mean"
    assert run(EvaluationConfig(modes=("joint",))).metrics()["AP"] == run().mean("joint")


def test_issues_are_named() -> None:
    evaluator = Evaluator(torch.eye(4), VOCABULARY)
    stray = annotations("strays", ("cats",), record(0, []))
    with pytest.raises(DataError, match="did you mean 'cat'"):
        evaluator.evaluate(make_network(), [EvaluationSet(annotations=stray, batches=[])])
    with pytest.raises(DataError, match="not in the annotations"):
        evaluator.evaluate(make_network(), [EvaluationSet(annotations=PETS, batches=Images(CARDS, (3, 4)))])
    with pytest.raises(DataError, match="two datasets are called 'pets'"):
        evaluator.evaluate(make_network(), [make_sets()[0], make_sets()[0]])
    with pytest.raises(DataError, match="no dataset"):
        evaluator.evaluate(make_network(), [])
    with pytest.raises(ModelError, match="each of 4 names, found 3"):
        Evaluator(torch.eye(3), VOCABULARY)
    with pytest.raises(ConfigError, match="modes"):
        EvaluationConfig.checked({"modes": []})


def test_json_gives_the_report_back(tmp_path: Path) -> None:
    report = run(unannotated="ignore")
    table, text, chart = write_report(report, tmp_path / "out")
    values = json.loads(table.read_text())
    assert from_dict(values) == report
    assert values["mean"]["own"]["ap"] == report.mean("own")
    assert values["mean"]["confusion"] == report.mean_confusion == report.metrics()["cross-dataset confusion"]
    assert "12.5 % name a category of another domain, in the mean over datasets" in text.read_text()
    assert dataset_table(report).splitlines()[-1].endswith("| 12.5 |")
    console = Console(file=StringIO(), width=200)
    show(report, console)
    (last,) = [line for line in console.file.getvalue().splitlines() if line.startswith("mean of 2")]
    assert last.rstrip().endswith(" 12.5")
    assert text.read_text() == as_markdown(report)
    assert chart.read_bytes().startswith(b"\x89PNG")
    del values["datasets"][0]["name"]
    with pytest.raises(DataError, match=r"not an evaluation report.*name"):
        from_dict(values)


def test_markdown_has_every_number_in_its_column() -> None:
    report = run(EvaluationConfig(outside_mean=("cards",)), unannotated="negative")
    lines = dataset_table(report).splitlines()
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    pets = dict(zip(cells[0], cells[2], strict=True))
    assert pets["AP (own names)"] == f"{report.datasets[0].own.coco.ap:.1f}"
    assert pets["AP50 (joint vocabulary)"] == f"{report.datasets[0].joint.coco.ap50:.1f}"
    assert pets["cross-dataset confusion"] == "25.0"
    assert pets["recall at 1"] == "50.0"
    assert cells[3][0] == "cards (not in the mean)"
    assert cells[4][0] == "**mean of 1**"
    assert cells[4][4] == pets["AP (own names)"]
    page = as_markdown(report)
    assert "counted as absent" in page
    assert "| ace | 0 | – | – | – | – |" in category_table(report.datasets[1])


def test_one_mode_and_awkward_names_make_a_page_too(tmp_path: Path) -> None:
    held = annotations("piped|$x^2|猫", ("cat",), record("a", [(0, CAT)]), record("b", []), record("c", []))
    vocabulary = Vocabulary.union({"piped|$x^2|猫": ("cat",), "others": ("dog", "king", "ace")})
    evaluator = Evaluator(torch.eye(4), vocabulary, EvaluationConfig(modes=("joint",), recall_at=()))
    report = evaluator.evaluate(make_network(), [EvaluationSet(annotations=held, batches=Images(held, (0, 1, 2)))])
    write_report(report, tmp_path)
    assert "piped\\|$x^2\\|猫" in (tmp_path / "evaluation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["pets", "p" * 70])
def test_the_table_on_the_console_cuts_no_number(name: str) -> None:
    report = run(EvaluationConfig(modes=("own", "joint")))
    first = replace(report.datasets[0], name=name, images=1_234_567)
    assert report.confusion is not None
    shares = {name: 12.5, "cards": 99.9}
    report = replace(report, datasets=(first, report.datasets[1]), confusion=replace(report.confusion, shares=shares))
    for width in (40, 60, 80, 100, 140):
        console, whole = (Console(file=StringIO(), width=columns) for columns in (width, 400))
        for one in (console, whole):
            show(report, one)
        shown, known = (one.file.getvalue() for one in (console, whole))
        table = shown[: shown.index("own: ")] if "own: " in shown else shown
        numbers = {word for word in table.split() if any(letter.isdigit() for letter in word)}
        assert numbers - {"0", "100"} <= set(known.split()), width
        assert "…" not in table
        assert ("own AP50" in table) == (width >= 100 or (width == 80 and name == "pets")), (width, table)
        assert "own AP" in table
