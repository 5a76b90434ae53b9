"""The benchmark of added names runs, and says of a detection what became of it."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from metr.structures import Detections

from tiny import TinyRun

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def added_names(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import added_names

    return added_names


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
    added_names: ModuleType, tiny_run: TinyRun, tmp_path: Path
) -> None:
    nouns = tmp_path / "index.noun"
    nouns.write_text("".join(f"thing_{a}{b} n 1 1 @ 1 0 00000001\n" for a in "abcdef" for b in "abcdef"))
    data = tiny_run.datasets[0].parent
    arguments = ["--run", f"tiny={tiny_run.best}", "--data", str(data), "--nouns", str(nouns)]
    assert added_names.main([*arguments, "--sizes", "3", "20", "--results", str(tmp_path / "results")]) == 0
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


def test_what_is_wrong_is_one_message(
    added_names: ModuleType, tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_run.datasets[0].parent
    rest = ["--data", str(data), "--nouns", str(tmp_path / "none")]
    assert added_names.main(["--run", str(tiny_run.best), *rest]) == 1
    assert "NAME=FOLDER" in capsys.readouterr().out
    assert added_names.main(["--run", f"a={tiny_run.best}", *rest]) == 1
    assert "no such file" in capsys.readouterr().out
