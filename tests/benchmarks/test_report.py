"""Pages are drawn from the JSON alone: every number of a page that is kept comes from the result beside it."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
PAGES = {
    "added-names": "added_names",
    "adopted-speed-trial": "adopted_speed",
    "added-names-attention": "added_names",
    "choices-thirty": "choices",
    "complete-trial": "complete",
    "detection-defaults": "detection_defaults",
    "duplicates-trial": "duplicates",
    "index-cpu": "index",
    "multifield-comparison": "multifield",
    "multifield-thirty": "multifield",
    "multifield-trial": "multifield",
    "precision-avx512-bf16": "precision",
    "precision-trial": "precision",
    "rehearsal-trial": "rehearsal",
    "rehearsal-fields": "rehearsal",
    "step-cpu": "step",
    "step-pair-avx512-bf16": "step_pair",
    "step-pair-base-avx512-bf16": "step_pair",
    "step-pair-base-cpu": "step_pair",
    "step-pair-cpu": "step_pair",
    "taught": "taught",
    "transfer-detectors-trial": "transfer_detectors",
    "transfer-fields": "transfer",
    "transfer-tenth": "transfer",
    "transfer-trial": "transfer",
    "vocabulary-cpu": "vocabulary",
}


@pytest.fixture
def report(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("report")


def numbers(text: str) -> Counter[str]:
    return Counter(re.findall(r"[-+]?\d[\d.,]*\d|\d", text))


@pytest.mark.parametrize("name", PAGES)
def test_results_are_read_and_their_pages_are_theirs(study_of: Callable[[str], ModuleType], name: str) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text(), parse_constant=pytest.fail)
    page = study_of(PAGES[name]).page(result)
    assert numbers(page) == numbers((RESULTS / f"{name}.md").read_text())
    assert result["commit"] in page


def test_results_know_nothing_of_the_machine_that_made_them() -> None:
    paths = re.compile(r'"(?:[^"=]*=)?(?:/|~|[A-Z]:\\\\)[\w.-][^"]*"')
    found = {path.name: paths.findall(path.read_text()) for path in RESULTS.glob("*.json")}
    assert len(found) > 20
    assert {name: several for name, several in found.items() if several} == {}


def test_arms_are_compared_over_the_seeds_that_all_have_finished(report: ModuleType) -> None:
    runs = [
        {"name": name, "seed": seed, "arm": arm, "ap": ap + 10 * seed, "steps": 5, "images": 20}
        for name in ("a", "b")
        for seed in (0, 1)
        for arm, ap in (("one", 1.0), ("two", 4.0))
    ]
    first, second = report.compare_arms(runs[:-1], ("name",), ("one", "two"))
    assert (first["seeds"], second["seeds"]) == ([0, 1], [0])
    assert (first["ap"], first["each"]["two"]) == ({"one": 6.0, "two": 9.0}, [4.0, 14.0])
    assert report.ap_of_seeds(first, "one") == "6.0 (1.0 to 11.0)"
    assert report.ap_of_seeds(second, "one") == "1.0"
    assert report.same_steps({"a": first}) == "for the same steps"
    uneven = [run | {"steps": 1200} if (run["seed"], run["arm"]) == (1, "two") else run for run in runs]
    cells = report.compare_arms(uneven[:4], ("name",), ("one", "two"))
    assert report.same_steps({"it": cells[0]}) == "**not for the same steps: it (one 5, two 5 to 1,200)**"


def test_commits_are_told_once(report: ModuleType) -> None:
    made = [("first", "abc"), ("second", "def"), ("third", "abc")]
    assert report.all_commits({"commit": commit} for _, commit in made) == "abc and def"
    assert (
        report.runs_by_commit(made).strip() == "Not all runs are of one commit:\n\n- abc: first; third\n- def: second"
    )
    assert report.runs_by_commit(made[:1]) == ""
    shown = [report.number(value, "+.1f") for value in (-0.04, 0.04, -0.06, 0.06, None)]
    assert shown == ["0.0", "0.0", "-0.1", "+0.1", "-"]
    assert (report.number_range([5]), report.number_range([1500, 5, 70])) == ("5", "5 to 1,500")


def test_images_of_a_sheet_are_spread_over_the_split(report: ModuleType) -> None:
    assert report.evenly_spread(100, 2) == [25, 75]
    assert report.evenly_spread(2, 2) == [0, 1]
    assert report.evenly_spread(1, 2) == [0]


def test_a_result_is_written_with_its_page(report: ModuleType, tmp_path: Path) -> None:
    report.write_result(
        tmp_path / "new" / "it", {"ap": 1}, report.joined("# It", "", report.table(["", "AP"], [["a", "1"]]))
    )
    assert json.loads((tmp_path / "new/it.json").read_text()) == {"ap": 1}
    assert (tmp_path / "new/it.md").read_text() == "# It\n\n|  | AP |\n| --- | ---: |\n| a | 1 |\n"
