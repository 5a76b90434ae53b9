"""A detector of others as the first word of a command: `metr detect`, `evaluate`, `train`, `finetune`, `transfer`."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from conversion.conversion_cases import NAMES, alike, save_folder, stir, stirred
from hub_stand_in import Hub, Repository, hub
from metr.conversion.export import build
from metr.conversion.targets import find_target
from metr.model import METR

from tiny import CommandLine, TinyRun, read_coco

__all__ = ["hub"]

NAME = "lab/detector"
SHORT = [
    "--steps",
    2,
    "--set",
    "loader.workers=0",
    "--set",
    "train.loop.device=cpu",
    "--set",
    "train.loop.curves=false",
]
SHORT += ["--set", "train.loop.images=false"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector of transformers of random weights."""
    folder, network = tmp_path_factory.mktemp("theirs") / "rt-detr", stirred(alike("rt_detr"))
    model = stir(build(find_target("rt_detr"), network, NAMES, seed=3)).eval()
    save_folder(model, "rt_detr", network, folder)
    return folder


@pytest.fixture
def there(hub: Hub, theirs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The same on the hub; nothing of it is in the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit({path.name: path.read_bytes() for path in theirs.iterdir()})
    return hub


def test_detect_finds_what_the_source_names(metr: CommandLine, there: Hub, tiny_run: TinyRun, tmp_path: Path) -> None:
    ended = metr("detect", NAME, tiny_run.unseen[0], "-o", "found", "--threshold", 0)
    assert ended.code == 0, ended.words
    assert f"looked for: {', '.join(NAMES)}" in ended.words
    assert "fetching lab/detector from the hub" in ended.words or "%" not in ended.err
    assert read_coco(tmp_path / "found")[1]
    there.asked.clear()
    ended = metr("detect", NAME, tiny_run.unseen[0], "-o", "again", "--offline", "--categories", "shark")
    assert ended.code == 0, ended.words
    assert there.asked == []
    assert "looked for: shark" in ended.words
    ended = metr("detect", "lab/other", tiny_run.unseen[0], "--offline")
    assert ended.code == 1
    assert "not among what was fetched before, and nothing is to be fetched" in ended.words


def test_evaluate_writes_nothing_into_the_source(
    metr: CommandLine, theirs: Path, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in theirs.iterdir())
    ended = metr("evaluate", theirs, tiny_run.data[0], "--device", "cpu")
    assert ended.code == 0, ended.words
    assert (tmp_path / "evaluation/evaluation.json").is_file()
    assert sorted(path.name for path in theirs.iterdir()) == before
    ended = metr("evaluate", theirs, tiny_run.data[0], "--store")
    assert (ended.code, "calibration is kept in a METR on this machine" in ended.words) == (1, True), ended.words


def test_transfer_train_and_finetune_take_a_name_on_the_hub(
    metr: CommandLine, there: Hub, tiny_run: TinyRun, tmp_path: Path
) -> None:
    commit = there.repositories[NAME].refs["main"]
    ended = metr("transfer", "--from", f"{NAME}@main", "-o", "start")
    assert ended.code == 0, ended.words
    assert METR.from_pretrained(tmp_path / "start", device="cpu").names == NAMES
    ended = metr("train", tiny_run.data[0], "--from", NAME, "-o", "joint", *SHORT)
    assert ended.code == 0, ended.words
    assert f"begins with RT-DETR ({NAME}): 64 x 64, 3 names kept" in ended.words
    assert METR.from_pretrained(tmp_path / "joint", device="cpu").names[:3] == NAMES
    ended = metr("finetune", tiny_run.data[0], "--from", NAME, "-o", "tuned", *SHORT)
    assert ended.code == 0, ended.words
    for name, file in (("joint", "training.json"), ("tuned", "finetuning.json")):
        assert json.loads((tmp_path / name / file).read_text())["from"] == f"{NAME}@{commit}"
    assert len([name for name in there.got() if name == "model.safetensors"]) == 1, "downloaded once"


def test_a_name_that_is_nothing(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    image, data = tiny_run.unseen[0], tiny_run.data[0]
    for words in (
        ["detect", "nothing", image],
        ["evaluate", "nothing", data],
        ["train", data, "--from", "nothing", "-o", tmp_path / "run"],
        ["finetune", data, "--from", "nothing", "-o", tmp_path / "run"],
        ["transfer", "--from", "nothing", "-o", tmp_path / "run"],
        ["transfer", "nothing", "--to", "rt_detr", "-o", tmp_path / "run"],
    ):
        ended = metr(*words)
        assert ended.code == 1
        assert "nothing: no such checkpoint, folder or file here, and no name on the hub either" in ended.words
        assert not (tmp_path / "run").exists()
    ended = metr("train", data, "--from", tiny_run.folder, "--size", "small", "-o", tmp_path / "run")
    assert (ended.code, "--size" in ended.words) == (1, True), ended.words
