"""Mistakes on the command line end in one message that says what, where and what to try, never in a traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tiny import CommandLine, Ended, TinyRun, train_arguments

Place = Callable[[TinyRun, Path], list[object]]


def fails(ended: Ended, *told: object) -> None:
    """One message on the standard error, and the exit code of a mistake."""
    assert ended.code == 1, ended
    assert ended.err.startswith("error: ")
    assert ended.err.count("error: ") == 1
    assert "Traceback" not in ended.err + ended.out
    for part in told:
        assert str(part) in ended.err


def copied_run(run: TinyRun, place: Path) -> Path:
    return Path(shutil.copytree(run.folder, place / "run"))


def copied_pond(run: TinyRun, place: Path) -> Path:
    return Path(shutil.copytree(run.datasets[0], place / "pond"))


def change_json(path: Path, change: Callable[[dict], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_no_arguments_show_the_verbs(metr: CommandLine) -> None:
    ended = metr()
    assert ended.code == 2
    for verb in ("inspect", "train", "evaluate", "detect", "demo"):
        assert f"\n  {verb}  " in ended.out + ended.err
    assert metr("--version").words.startswith("metr ")
    for verb in ("inspect", "train", "evaluate", "detect"):
        assert metr(verb).code == 2
        assert "Usage: " in metr(verb, "--help").out


# training


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--set", "model.width"], ["--set: expected key=value, found 'model.width'", "try: write it as section.key"]),
        (["--set", "model.widht=64"], ["unknown key 'model.widht'", "did you mean 'width'?"]),
        (["--set", "model.width=wide"], ["'model.width': ", "found 'wide'"]),
        (["--set", "model.width=33"], ["model", "width 33 is not divisible"]),
        (["--set", "train=5"], ["'train': expected keys and values, found 5"]),
        (["--set", "loader.batch_size=0"], ["'loader.batch_size'", "found 0"]),
        (["--size", "medium"], ["--size: unknown size 'medium'", "'base', 'nano', 'small'"]),
        (["--config", "no.yaml"], ["no.yaml: no such configuration file"]),
        (["--set", "loader.mixture={pnd: 1}"], ["unknown dataset 'pnd'", "did you mean 'pond'?"]),
        (["--set", "text.source=bundled:minlm"], ["bundled:minlm: no such bundled model", "did you mean"]),
        (["--set", "text.source=./no/model"], ["no/model"]),
        (["--set", "model.backbone.name=resnt"], ["resnt"]),
        (["--set", "train.optimizer.learning_rate=1e9", "--set", "train.loop.max_skipped=1"], ["not finite"]),
    ],
)
def test_a_configuration_that_is_wrong(
    metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, more: list[object], told: list[str]
) -> None:
    fails(metr(*train_arguments(tiny_run, tmp_path / "run", *more)), *told)


@pytest.mark.parametrize("steps", ["0", "few"])
def test_steps_that_are_none(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, steps: str) -> None:
    ended = metr(*train_arguments(tiny_run, tmp_path / "run", "--steps", steps))
    assert ended.code == 2
    assert "--steps" in ended.err


def test_a_run_is_there_already(metr: CommandLine, tiny_run: TinyRun) -> None:
    fails(metr(*train_arguments(tiny_run, tiny_run.folder)), tiny_run.folder, "a run is in this folder", "--resume")


def test_resuming_with_another_configuration(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    run = copied_run(tiny_run, tmp_path)
    wider = train_arguments(tiny_run, run, "--resume", "--set", "model.width=64")
    fails(metr(*wider), run, "keeps its network", "model.width 32, now 64", "try: leave these settings out")
    other = ["train", tiny_run.data[0], "-o", run, "--config", tiny_run.recipe, "--resume"]
    fails(metr(*other), run, "begun with other datasets", "desk", "meadow", "try: give no datasets")


def test_a_damaged_configuration_of_a_run(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    run = copied_run(tiny_run, tmp_path)
    for text, told in (
        ("a: [", "not readable as YAML"),
        ("trian: {}", "unknown key 'trian'"),
        (None, "no configuration"),
    ):
        (run / "config.yaml").unlink(missing_ok=True)
        if text is not None:
            (run / "config.yaml").write_text(text)
        fails(metr("train", "--resume", "-o", run), run / "config.yaml", told)
    run = Path(shutil.copytree(tiny_run.folder, tmp_path / "other"))
    (run / "datasets.yaml").write_text("datasets: 5")
    fails(metr("train", "--resume", "-o", run), run / "datasets.yaml", "'datasets'")
    (run / "training.json").write_text("{")
    fails(metr("train", "--resume", "-o", run), run / "training.json", "not readable as JSON")


def test_a_dataset_of_a_run_that_is_gone(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    pond = copied_pond(tiny_run, tmp_path)
    started = metr("train", pond, "-o", tmp_path / "run", "--config", tiny_run.recipe, "--steps", 1)
    assert started.code == 0, started
    pond.rename(tmp_path / "moved")
    fails(metr("train", "--resume", "-o", tmp_path / "run"), pond)
    listing = tmp_path / "run/datasets.yaml"
    listing.write_text(listing.read_text().replace(str(pond), str(tmp_path / "moved")))
    ended = metr("train", "--resume", "-o", tmp_path / "run", "--steps", 2)
    assert ended.code == 0, ended


def test_a_damaged_state(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    run = copied_run(tiny_run, tmp_path)
    (run / "state/optimizer.safetensors").write_bytes(b"")
    fails(metr(*train_arguments(tiny_run, run, "--resume")), run / "state/optimizer.safetensors", "try: ")


def test_a_run_that_cannot_be_written(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fails(metr(*train_arguments(tiny_run, tmp_path / "file")), tmp_path / "file", "found a file", "another folder")
    fails(metr(*train_arguments(tiny_run, tmp_path / "file/run")), tmp_path / "file/run", "try: ")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere", ["nowhere: ", "no such"]),
        ("empty", ["empty: ", "try: "]),
        ("texts", ["texts: ", "try: "]),
        ("list.yaml", ["list.yaml", "unknown key 'pth'"]),
        ("broken.yaml", ["broken.yaml: not readable as YAML"]),
    ],
)
@pytest.mark.parametrize("verb", ["inspect", "train", "evaluate"])
def test_datasets_that_are_none(
    metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, verb: str, name: str, told: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/notes.txt").write_text("nothing to see")
    (tmp_path / "list.yaml").write_text("datasets: [{path: empty, pth: x}]")
    (tmp_path / "broken.yaml").write_text("datasets: [")
    rest = {
        "inspect": [],
        "train": ["-o", tmp_path / "run", "--config", tiny_run.recipe],
        "evaluate": ["-o", tmp_path / "e"],
    }[verb]
    first = [tiny_run.folder] if verb == "evaluate" else []
    fails(metr(verb, *first, tiny_run.data[0], tmp_path / name, *rest), *told)


def test_two_datasets_of_one_name(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    ended = metr("train", tiny_run.data[0], f"pond={tiny_run.data[1]}", "-o", tmp_path / "run")
    fails(ended, "2 datasets are called 'pond'", "try: give each a name of its own")


def test_two_datasets_without_a_image(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    for name, dataset in (("a", tiny_run.datasets[0]), ("b", tiny_run.datasets[2])):
        shutil.copytree(dataset, tmp_path / name)
        for image in (tmp_path / name).rglob("*.jpg"):
            image.unlink()
    ended = metr("train", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "run", "--config", tiny_run.recipe)
    fails(ended, tmp_path, "image")


def test_every_image_of_a_dataset_is_broken(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    pond = copied_pond(tiny_run, tmp_path)
    for image in (pond / "train").rglob("*.jpg"):
        image.write_bytes(b"")
    fails(metr("train", pond, "-o", tmp_path / "run", "--config", tiny_run.recipe), "pond", "cannot be read", "try: ")


def test_a_dataset_without_a_training_split(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    pond = copied_pond(tiny_run, tmp_path)
    shutil.rmtree(pond / "train")
    for path in pond.glob("annotations/*train*"):
        path.unlink()
    ended = metr("train", pond, "-o", tmp_path / "run", "--config", tiny_run.recipe)
    fails(ended, pond, "no 'train' split", "try: it has val")


def test_issues_that_training_goes_past(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    pond = copied_pond(tiny_run, tmp_path)
    (annotations,) = (pond / "annotations").glob("*train*.json")
    image = min((pond / "train").rglob("*.jpg"))

    def spoil(values: dict) -> None:
        values["annotations"][0]["bbox"] = [10_000, 10, 50, 50]
        values["annotations"][1]["category_id"] = 4711

    change_json(annotations, spoil)
    image.write_bytes(image.read_bytes()[:100])
    ended = metr("train", pond, "-o", tmp_path / "run", "--config", tiny_run.recipe)
    assert ended.code == 0, ended
    listed = metr("inspect", pond, "--check")
    assert listed.code == 0
    assert "pond: 1 x unknown category" in listed.words
    assert "4711" in listed.words
    assert "1 x unreadable image" in listed.words
    assert str(image) in listed.out


# checkpoints


def missing(run: TinyRun, place: Path) -> list[object]:
    return [place / "nowhere", "no such checkpoint"]


def without_checkpoint(run: TinyRun, place: Path) -> list[object]:
    (place / "run").mkdir()
    return [place / "run", "expected a checkpoint (config.json and model.safetensors)"]


def truncated(run: TinyRun, place: Path) -> list[object]:
    weights = copied_run(run, place) / "best/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return [place / "run", weights, "not readable as safetensors"]


def without_weights(run: TinyRun, place: Path) -> list[object]:
    (copied_run(run, place) / "best/model.safetensors").unlink()
    return [place / "run", "model.safetensors: no such file"]


def of_another_width(run: TinyRun, place: Path) -> list[object]:
    folder = copied_run(run, place) / "best"
    change_json(folder / "config.json", lambda values: values["model"].update(width=64))
    return [folder, folder, "the weights do not fit", "are not of one checkpoint"]


def with_an_unknown_key(run: TinyRun, place: Path) -> list[object]:
    folder = copied_run(run, place) / "best"
    change_json(folder / "config.json", lambda values: values["model"].update(widht=64))
    return [folder, "unknown key 'widht'", "did you mean 'width'?"]


def that_is_not_json(run: TinyRun, place: Path) -> list[object]:
    folder = copied_run(run, place) / "best"
    (folder / "config.json").write_text("{")
    return [folder, folder / "config.json", "not readable as JSON"]


def of_somebody_else(run: TinyRun, place: Path) -> list[object]:
    folder = copied_run(run, place) / "best"
    (folder / "config.json").write_text('{"model_type": "yolos"}')
    return [folder, "METR takes no weights from a yolos model"]


def with_other_preprocessing(run: TinyRun, place: Path) -> list[object]:
    folder = copied_run(run, place) / "best"
    change_json(folder / "config.json", lambda values: values["preprocessing"].update(size=-1))
    return [folder, "preprocessing", "'size'"]


def with_other_names(run: TinyRun, place: Path) -> list[object]:
    folder = copied_run(run, place) / "best"
    change_json(folder / "vocabulary.json", lambda values: values["names"].append("zebra"))
    return [folder, "text_embeddings.safetensors", "[11, 16]"]


@pytest.mark.parametrize(
    "spoil",
    [
        missing,
        without_checkpoint,
        truncated,
        without_weights,
        of_another_width,
        with_an_unknown_key,
        that_is_not_json,
        of_somebody_else,
        with_other_preprocessing,
        with_other_names,
    ],
)
def test_a_checkpoint_that_is_none(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, spoil: Place) -> None:
    run, *told = spoil(tiny_run, tmp_path)
    fails(metr("detect", run, tiny_run.unseen[0], "-o", tmp_path / "out"), *told, "try: ")
    fails(metr("evaluate", run, tiny_run.data[0], "-o", tmp_path / "out"), *told)
    assert not (tmp_path / "out").exists()


# detection and evaluation


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("", ["a name is empty", "try: write names between commas"]),
        ("penguin,,shark", ["a name is empty"]),
        ("leaf, leaf", ["given twice: 'leaf'"]),
    ],
)
def test_names_that_cannot_be_asked_for(
    metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, names: str, told: list[str]
) -> None:
    ended = metr("detect", tiny_run.folder, tiny_run.unseen[0], "--categories", names, "-o", tmp_path / "out")
    fails(ended, "categories", *told)


def test_images_that_are_none(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero.jpg").touch()
    out = ["-o", tmp_path / "out"]
    fails(metr("detect", tiny_run.folder, tmp_path / "empty", *out), tmp_path / "empty", "no image in this folder")
    fails(metr("detect", tiny_run.folder, tmp_path / "no.jpg", *out), tmp_path / "no.jpg", "no such image")
    ended = metr("detect", tiny_run.folder, tmp_path / "zero.jpg", *out)
    fails(ended, tmp_path / "zero.jpg", "the image could not be read")
    ended = metr("detect", tiny_run.folder, tiny_run.unseen[0], tmp_path / "zero.jpg", *out)
    assert ended.code == 0, ended
    assert f"skipped {tmp_path / 'zero.jpg'}: an empty file (0 bytes)" in ended.out


def test_numbers_out_of_range(metr: CommandLine, tiny_run: TinyRun) -> None:
    for more in (["--threshold", "2"], ["--batch-size", "0"]):
        assert metr("detect", tiny_run.folder, tiny_run.unseen[0], *more).code == 2
    assert metr("evaluate", tiny_run.folder, tiny_run.data[0], "--batch-size", "0").code == 2


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["calibration.unicorn=[1,5]"], ["inference.postprocess.calibration: ", "found 'unicorn'"]),
        (["nms_iou=null", "nms_across_names=true"], ["nms_across_names=True has no effect"]),
        (["thresholds.cup=0.3"], ["unknown key 'postprocess.thresholds'"]),
    ],
)
def test_settings_of_detection_without_effect(
    metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, given: list[str], told: list[str]
) -> None:
    settings = [part for one in given for part in ("--set", f"inference.postprocess.{one}")]
    fails(metr("detect", tiny_run.folder, tiny_run.unseen[0], "-o", tmp_path / "out", *settings), *told)
    assert not (tmp_path / "out/detections.json").exists()
    fails(metr("evaluate", tiny_run.folder, tiny_run.data[0], "-o", tmp_path / "judged", *settings), *told)


def test_scores_are_fitted_to_all_detections(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    cut = ["--set", "inference.postprocess.score_threshold=0.3"]
    ended = metr("evaluate", tiny_run.folder, tiny_run.data[0], "--store", "-o", tmp_path / "out", *cut)
    fails(ended, "--store", "those below 0.3 are to be left out", "leave out --set")
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    for device in ("cuda:77", "gpu"):
        fails(metr("detect", tiny_run.folder, tiny_run.unseen[0], "--device", device), f"no device '{device}'", "auto")


def test_output_that_cannot_be_written(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/inside"):
        fails(metr("detect", tiny_run.folder, tiny_run.unseen[0], "-o", out), tmp_path / "file", "try: ")
        fails(metr("evaluate", tiny_run.folder, tiny_run.data[0], "-o", out), tmp_path / "file", "try: ")


def test_a_split_that_is_not_there(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    ended = metr("evaluate", tiny_run.folder, tiny_run.data[0], "--split", "tset", "-o", tmp_path / "e")
    fails(ended, tiny_run.data[0], "no 'tset' split", "it has train, val")


def test_memory_that_runs_out(
    metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("metr.inference.predictor.Predictor._infer", burst)
    ended = metr("detect", tiny_run.folder, tiny_run.unseen[0], "-o", tmp_path / "out")
    fails(ended, "Tried to allocate 20 GiB", "try: a smaller batch")


def test_a_developer_can_have_the_traceback(metr: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metr.errors import DataError

    monkeypatch.setenv("METR_DEBUG", "1")
    with pytest.raises(DataError):
        metr("inspect", tmp_path / "nowhere")


def test_a_demo_leaves_other_files_alone(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/diary.txt").write_text("mine")
    fails(metr("demo", "-o", tmp_path / "photos"), tmp_path / "photos", "files that are not its own")
    shutil.copytree(tiny_run.folder, tmp_path / "project/run")
    fails(metr("demo", "-o", tmp_path / "project"), tmp_path / "project")
    assert (tmp_path / "project/run/best/config.json").is_file()
    fails(metr("demo", "-o", tmp_path / "new", "--set", "train.loop.stps=3"), "did you mean 'steps'")
    assert not (tmp_path / "new").exists()
