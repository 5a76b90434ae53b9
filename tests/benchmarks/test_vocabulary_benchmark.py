"""The studies of vocabularies and of added names run, and their numbers belong together."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from metr.errors import DataError
from metr.model import METR
from metr.models.detector import Detector
from metr.structures import Detections

from tiny import TinyRun

NOUNS = """  1 This software and database is being provided to you, the LICENSEE
  2 ...
11_november n 1 2 @ #p 1 0 15185837
abacus n 2 3 @ ~ + 2 0 09194735 02666196
apple_tree n 1 2 @ ~ 1 0 12633994
frog n 3 4 @ ~ #m %p 3 2 01639765 10113869 09691279
x-ray n 2 5 @ ~ %p ; + 2 1 11428023 03999280
"""


@pytest.fixture
def vocabulary(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("vocabulary")


@pytest.fixture
def added_names(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("added_names")


@pytest.fixture
def nouns(tmp_path: Path) -> Path:
    path = tmp_path / "index.noun"
    made = "".join(f"thing_{a}{b} n 1 1 @ 1 0 00000001\n" for a in "abcdefgh" for b in "abcdefgh")
    path.write_text(NOUNS + made)
    return path


def run_with_shortlist(number: int, tiny_run: TinyRun, folder: Path) -> Path:
    """The tiny run's weights in a network that shortlists so many names; 0 takes its shortlist away."""
    model = METR.from_pretrained(tiny_run.best, device="cpu")
    plain = model.checkpoint.model
    config = plain.model_copy(update={"categories": plain.categories.model_copy(update={"shortlist": number})})
    network = Detector(config, model.checkpoint.text_width)
    network.load_state_dict(model.network.state_dict(), strict=False)
    METR(network, replace(model.checkpoint, model=config)).save_pretrained(folder)
    return folder


def test_distractors_are_nouns_that_no_dataset_names(vocabulary: ModuleType, nouns: Path) -> None:
    names = vocabulary.with_nouns(("Frog", "apple-tree"), nouns, 60, seed=0)
    assert names[:2] == ("Frog", "apple-tree")
    assert len({*names}) == 60
    assert not {"frog", "apple tree", "11 november"} & {*names}
    every = vocabulary.with_nouns(("Frog",), nouns, 68, seed=0)
    assert {"x-ray", "abacus", "apple tree"} <= {*every}
    # a larger vocabulary begins as a smaller one, and the seed decides
    assert vocabulary.with_nouns(("Frog", "apple-tree"), nouns, 20, seed=0) == names[:20]
    assert vocabulary.with_nouns(("Frog", "apple-tree"), nouns, 60, seed=1) != names
    with pytest.raises(DataError, match="expected 999 nouns, found 67"):
        vocabulary.with_nouns(("Frog",), nouns, 1000, seed=0)


def arguments(run: Path, tiny_run: TinyRun, nouns: Path, results: Path) -> list[str]:
    data = tiny_run.datasets[0].parent
    sizes = ["--sizes", "10", "30", "60", "--images", "2", "--timed", "1", "--device", "cpu"]
    return ["--run", str(run), "--data", str(data), "--nouns", str(nouns), "--results", str(results), *sizes]


def test_time_and_recall_of_shortlist_and_extraction_together(
    vocabulary: ModuleType, nouns: Path, tiny_run: TinyRun, tmp_path: Path
) -> None:
    run = run_with_shortlist(24, tiny_run, tmp_path / "run")
    assert vocabulary.main(arguments(run, tiny_run, nouns, tmp_path / "results")) == 0
    result = json.loads((tmp_path / "results" / "vocabulary-cpu.json").read_text())
    assert set(result["bars"]) == {"time_ratio", "recall_lost"}
    for bar in result["bars"].values():
        assert bar["met"] == (bar["value"] <= bar["bar"])
    assert list(result["sizes"]) == ["10", "30", "60"]
    assert result["sizes"]["10"]["ratio"]["shortlist"] == 1
    for size, figure in result["sizes"].items():
        both = figure["recall"]
        assert figure["pairs"] > 0
        for shares in both.values():
            assert 0 <= shares["1"] <= shares["5"] <= shares["20"] <= 100
        if int(size) <= 24:
            assert both["shortlist"] == both["every name"]
    lost = [one["recall"]["every name"]["20"] - one["recall"]["shortlist"]["20"] for one in result["sizes"].values()]
    assert result["bars"]["recall_lost"]["value"] == pytest.approx(max(lost))
    assert str(tmp_path) not in json.dumps(result)
    page = (tmp_path / "results" / "vocabulary-cpu.md").read_text()
    assert "Shortlist of 24 names" in page


def test_without_a_shortlist_times_only(
    vocabulary: ModuleType, nouns: Path, tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with_shortlist(0, tiny_run, tmp_path / "run")
    assert vocabulary.main(arguments(run, tiny_run, nouns, tmp_path)) == 0
    assert "times only" in capsys.readouterr().out
    result = json.loads((tmp_path / "vocabulary-cpu.json").read_text())
    assert set(result["bars"]) == {"time_ratio"}
    assert not any(figure["recall"] for figure in result["sizes"].values())


def test_what_is_missing_is_one_message(
    vocabulary: ModuleType, tiny_run: TinyRun, nouns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vocabulary.main(arguments(tiny_run.best, tiny_run, tmp_path / "none", tmp_path)) == 1
    assert "wordnet-base" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    given = arguments(tiny_run.best, tiny_run, nouns, tmp_path)
    given[3] = str(tmp_path / "empty")
    assert vocabulary.main(given) == 1
    assert "--data" in capsys.readouterr().out


def found(*rows: tuple[str, float, float]) -> Detections:
    """Detections of a name with a score, 10 pixels wide, that begin at some pixel."""
    names = ("fish", "frog", "heron")
    return Detections(
        boxes=torch.tensor([[x, 0.0, x + 10, 10.0] for _, _, x in rows]).view(-1, 4),
        scores=torch.tensor([score for _, score, _ in rows]),
        labels=torch.tensor([names.index(name) for name, _, _ in rows], dtype=torch.long),
        names=names,
    )


def test_a_detection_persists_under_its_own_name_and_in_its_place(added_names: ModuleType) -> None:
    before = found(("fish", 0.9, 0), ("frog", 0.5, 50), ("fish", 0.4, 90), ("fish", 0.1, 20))
    after = found(("heron", 0.8, 0), ("fish", 0.7, 0.1), ("fish", 0.6, 50), ("fish", 0.4, 95))
    kept, moved = added_names.persistence(before, after)
    assert kept == [100.0, 0.0, 0.0]  # the last was never sure
    assert moved == pytest.approx([20.0], abs=1e-4)
    assert added_names.persistence(before, found()) == ([0.0, 0.0, 0.0], [])
    assert added_names.persistence(found(), after) == ([], [])


def test_figures_of_a_run_with_and_without_threshold(
    added_names: ModuleType, tiny_run: TinyRun, nouns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_run.datasets[0].parent
    arguments = ["--run", f"tiny={tiny_run.best}", "--data", str(data), "--nouns", str(nouns)]
    arguments += ["--sizes", "3", "20", "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert added_names.main(arguments) == 0
    result = json.loads((tmp_path / "results" / "added-names.json").read_text())
    run = result["runs"]["tiny"]
    assert not run["self_attention"]
    assert set(run["thresholds"]) == {"0.0", "0.1"}
    for sizes in run["thresholds"].values():
        assert set(sizes) == {"0", "3", "20"}
        assert sizes["0"]["kept"] in (0.0, 100.0)
        assert sizes["0"]["moved"] == sizes["0"]["slots"] == 0
        # without attention among categories other names have no say in a name's presence
        assert all(figures["presence"] == pytest.approx(0, abs=1e-3) for figures in sizes.values())
    assert "| tiny | 0.1 | 20 |" in (tmp_path / "results" / "added-names.md").read_text()
    # what was measured is not measured again, nor taken for another measurement
    written = (tmp_path / "runs/tiny/report.json").stat().st_mtime_ns
    assert added_names.main(arguments) == 0
    assert (tmp_path / "runs/tiny/report.json").stat().st_mtime_ns == written
    capsys.readouterr()
    assert added_names.main([*arguments, "--seed", "1"]) == 1
    assert "seed 0, now 1" in " ".join(capsys.readouterr().out.split())


def test_what_is_wrong_of_added_names_is_one_message(
    added_names: ModuleType, tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_run.datasets[0].parent
    rest = ["--data", str(data), "--nouns", str(tmp_path / "none"), "--out", str(tmp_path / "runs")]
    assert added_names.main(["--run", str(tiny_run.best), *rest]) == 1
    assert "NAME=FOLDER" in capsys.readouterr().out
    assert added_names.main(["--run", f"a={tiny_run.best}", *rest]) == 1
    assert "no such file" in capsys.readouterr().out
