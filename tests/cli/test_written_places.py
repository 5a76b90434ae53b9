"""Where a verb cannot write is told before it works, and a disk that refuses after that takes no result with it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from metr.errors import CheckpointError
from metr.model import METR

from tiny import CommandLine, TinyRun, train_arguments

Verb = Callable[[TinyRun, Path], list[object]]

# Windows and macOS have no such folder: on Linux nobody, root included, can make files there
NOBODYS = Path("/proc")

VERBS: dict[str, Verb] = {
    "detect": lambda run, out: ["detect", run.folder, run.unseen[0], "-o", out],
    "detect crops": lambda run, out: ["detect", run.folder, run.unseen[0], "-o", out, "--save", "crops"],
    "detect ray": lambda run, out: ["detect", run.folder, run.unseen[0], "-o", out, "--engine", "ray"],
    "evaluate": lambda run, out: ["evaluate", run.folder, run.data[0], "-o", out],
    "evaluate html": lambda run, out: ["evaluate", run.folder, run.data[0], "-o", out, "--html"],
    "export": lambda run, out: ["export", run.folder, "-o", out],
    "export names": lambda run, out: ["export", run.folder, "-o", out / "names.npz", "--format", "names"],
    "transfer": lambda run, out: ["transfer", run.folder, "--to", "rt_detr", "-o", out],
    "transfer from": lambda run, out: ["transfer", "--from", run.folder, "-o", out],
    "complete": lambda run, out: ["complete", *run.data, "--model", run.folder, "-o", out],
    "report": lambda run, out: ["report", run.folder, "-o", out / "page.html"],
    "inspect write": lambda run, out: ["inspect", run.data[0], "--write", out / "data.yaml"],
    "inspect export": lambda run, out: ["inspect", run.data[0], "--export", "coco", out],
    "inspect draw": lambda run, out: ["inspect", run.data[0], "--draw", out],
    "train": lambda run, out: list(train_arguments(run, out)),
    "finetune": lambda run, out: ["finetune", run.data[0], "--from", run.folder, "-o", out],
    "demo": lambda run, out: ["demo", "-o", out],
}


@pytest.fixture
def _idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes a while is an error."""

    def works(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    for work in (
        "metr.model.METR.from_pretrained",
        "metr.evaluation.runner.open_joint",
        "metr.inspection.label_report.inspect_datasets",
        "metr.report.run_page._run",
        "metr.conversion.adoption.import_detector",
        "metr.training.train.prepared",
        "metr.training.finetune.begun",
        "metr.demo.run.write_demo_datasets",
    ):
        monkeypatch.setattr(work, works)


@pytest.mark.usefixtures("_idle")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("place", ["a file", "in a file", "a link", "nobody's"])
def test_a_place_that_cannot_be_written_is_told_first(
    metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, verb: str, place: str
) -> None:
    if place == "nobody's" and not NOBODYS.is_dir():
        pytest.skip("needs a folder that nobody can write")
    (tmp_path / "fake.jpg").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    places = {"a file": "fake.jpg", "in a file": "fake.jpg/inside", "a link": "link"}
    out = NOBODYS / "metr/out" if place == "nobody's" else tmp_path / places[place]
    ended = metr(*VERBS[verb](tiny_run, out))
    assert (ended.code, ended.err.count("error: ")) == (1, 1), ended
    assert "try: " in ended.err
    assert "Errno" not in ended.err
    assert (str(out) if place == "nobody's" else str(tmp_path / places[place].split("/")[0])) in ended.err
    if "file" in place:
        told = ended.words.replace("fake.jpg", "")
        assert any(why in told for why in ("a file", "the file", "not a folder", "exists already")), told
    assert {item.name for item in tmp_path.iterdir()} == {"fake.jpg", "link"}


@pytest.mark.usefixtures("_idle")
@pytest.mark.parametrize(
    ("verb", "folder"),
    [
        ("evaluate", "evaluation.png"),
        ("evaluate html", "evaluation.html"),
        ("export names", "names.npz"),
        ("report", "page.html"),
        ("inspect draw", "pond.jpg"),
    ],
)
def test_a_folder_at_the_place_of_a_file(
    metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, verb: str, folder: str
) -> None:
    (tmp_path / folder).mkdir()
    ended = metr(*VERBS[verb](tiny_run, tmp_path))
    assert ended.code == 1, ended
    assert str(tmp_path / folder) in ended.err
    assert "the work has begun" not in ended.err


@pytest.mark.usefixtures("_idle")
def test_a_dataset_that_was_exported_already(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "pond").mkdir()
    (tmp_path / "pond/mine.txt").touch()
    ended = metr("inspect", tiny_run.data[0], "--export", "coco", tmp_path)
    assert (ended.code, "the folder is not empty" in ended.err) == (1, True), ended


def test_a_checkpoint_that_takes_no_calibration(
    metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))

    def refuse(folder: Path, *_: object) -> None:
        if folder == run / "best":
            raise CheckpointError("cannot be written", where=folder)

    monkeypatch.setattr("metr.writable.check_folder_to_write", refuse)
    monkeypatch.setattr("metr.evaluation.runner.open_joint", METR.from_pretrained)
    ended = metr("evaluate", run, tiny_run.data[0], "--store", "-o", tmp_path / "out")
    assert f"{run / 'best'}: cannot be written" in ended.err, ended


def test_a_disk_that_fills_up_takes_no_table_with_it(
    metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("metr.evaluation.report.json.dumps", full)
    ended = metr("evaluate", tiny_run.folder, tiny_run.data[0], "-o", tmp_path / "out")
    assert ended.code == 1, ended
    assert "No space left on device" in ended.err
    assert "AP50" in ended.out
