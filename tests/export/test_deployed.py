"""`metr.deploy` against METR: images, names, suppression and limits. The exported function stands in for the model."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from export_cases import assert_same
from PIL import Image

from metr import deploy
from metr.data.transforms import resize_image
from metr.errors import CheckpointError, ConfigError
from metr.export import export as exporting
from metr.export.export import export, write_names
from metr.export.graph import ExportedDetector
from metr.export.request import ExportConfig
from metr.inference.postprocess import ScoreThresholds
from metr.model import METR

from tiny import TinyRun


@pytest.fixture
def model(tiny_run: TinyRun) -> METR:
    return METR.from_pretrained(tiny_run.folder, device="cpu")


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Exports without a tracer, and gives a detector that runs the function itself."""
    graphs: list[ExportedDetector] = []
    monkeypatch.setattr(exporting, "exported_program", lambda graph: graphs.append(graph.eval()))
    monkeypatch.setattr(exporting, "_write", lambda program, interface, path, config: path.touch())

    def run(given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        graph = graphs[-1]
        with torch.inference_mode():
            answer = graph(*(torch.from_numpy(given[name]) for name in graph.interface.inputs))
        return [one.numpy() for one in answer]

    def made(model: METR, names=None, *, stored=None, **config) -> deploy.Detector:
        export(model, tmp_path / "out", names, config=ExportConfig(**config))
        return deploy.Detector(tmp_path / "out", stored, run=run)

    return made


def images(tiny_run: TinyRun) -> list:
    noise = np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8)
    return [*tiny_run.unseen, noise, Image.fromarray(noise[:, :40])]


def check(detector: deploy.Detector, model: METR, some: list, names=None) -> None:
    for found, expected in zip(detector.detect(some), model.detect(some, names), strict=True):
        assert_same(found, expected, detector.names)
    every = [one.detections for one in model.predictor(names).detect_many(some)]
    for found, expected in zip(detector.predict(some), every, strict=True):
        assert len(found) > 5
        assert_same(found, expected, detector.names)


@pytest.mark.parametrize("pixels", ["uint8", "float32"])
def test_it_finds_what_metr_finds(exported, model: METR, tiny_run: TinyRun, pixels: str) -> None:
    check(exported(model, pixels=pixels), model, images(tiny_run))


def test_images_that_keep_their_shape(exported, model: METR, tiny_run: TinyRun) -> None:
    model.resize = model.resize.model_copy(update={"mode": "fit", "size": 60, "longest": 80})
    check(exported(model), model, images(tiny_run))


def test_sides_that_are_no_multiples(exported, model: METR, tiny_run: TinyRun) -> None:
    model.resize = model.resize.model_copy(update={"size": 75, "filter": "bicubic"})
    check(exported(model), model, images(tiny_run))


def test_names_of_its_own_and_their_thresholds(exported, model: METR, tiny_run: TinyRun) -> None:
    names = ["leaf", "newt", "cup"]
    kept = {"calibration": {"newt": (0.5, 2.0), "cup": (2.0, 1.0)}, "thresholds": {"cup": 0.0, "leaf": 0.99}}
    detection = model.checkpoint.detection.model_copy(update=kept)
    object.__setattr__(model.checkpoint, "detection", detection)
    detector = exported(model, names)
    assert detector.names == tuple(names)
    check(detector, model, images(tiny_run), names)
    found = detector.detect(images(tiny_run)[0])
    assert {name for _, _, name in found} <= {"cup", "newt"}
    assert len(detector.detect(images(tiny_run)[0], threshold=0.0)) > len(found)


@pytest.mark.parametrize("open_names", [None, 40])
def test_names_in_another_case_mean_the_trained_ones(
    exported, model: METR, tiny_run: TinyRun, tmp_path: Path, open_names: int | None
) -> None:
    names = ["LEAF", "Newt", "cup"]
    kept = {"calibration": {"leaf": (0.5, 2.0)}, "thresholds": {"leaf": 0.45, "newt": 0.0, "cup": 0.99}}
    object.__setattr__(model.checkpoint, "detection", model.checkpoint.detection.model_copy(update=kept))
    if open_names is None:
        detector = exported(model, names)
    else:
        write_names(model, tmp_path / "new.npz", names)
        detector = exported(model, open_names=open_names, stored=tmp_path / "new.npz")
    check(detector, model, images(tiny_run), names)


def test_open_names_are_chosen_afterwards(exported, model: METR, tiny_run: TinyRun, tmp_path: Path) -> None:
    check(exported(model, open_names=40), model, images(tiny_run))
    for names in (["snail", "newt"], [*model.names, *(f"thing {letter}" for letter in "abcdefghijklmnop")]):
        write_names(model, tmp_path / "new.npz", names)
        detector = exported(model, open_names=40, stored=tmp_path / "new.npz")
        check(detector, model, images(tiny_run), names)


def test_open_names_that_do_not_fit(exported, model: METR, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="looks for 10 names, and the model is to take 4"):
        exported(model, open_names=4)
    write_names(model, tmp_path / "many.npz", [f"thing {letter}" for letter in "abcdefghijklmnop"])
    with pytest.raises(ValueError, match="16 names, and the model takes 1 to 12"):
        exported(model, open_names=12, stored=tmp_path / "many.npz")
    with pytest.raises(ValueError, match="its names are fixed"):
        exported(model, stored=tmp_path / "many.npz")
    values = dict(np.load(tmp_path / "many.npz"))
    np.savez(tmp_path / "other.npz", **{**values, "detector": np.array("another")})
    with pytest.raises(ValueError, match="another detector"):
        exported(model, open_names=20, stored=tmp_path / "other.npz")


def test_it_says_what_is_wrong_with_a_folder(exported, model: METR, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no export\.json"):
        deploy.Detector(tmp_path)
    detector = exported(model)
    path = detector.folder / "export.json"
    with pytest.raises(ValueError, match="expected RGB bytes"):
        detector.detect(np.zeros((4, 4), dtype=np.uint8))
    values = json.loads(path.read_text())
    for changed, message in (
        ("{", "damaged"),
        ("{}", "not of metr"),
        (json.dumps({**values, "format_version": 9}), "9"),
    ):
        path.write_text(changed)
        with pytest.raises(ValueError, match=message):
            deploy.Detector(detector.folder)


@pytest.mark.parametrize(("suffix", "runtime"), [("onnx", "onnxruntime"), ("xml", "openvino")])
def test_a_damaged_model_ends_in_one_message(exported, model: METR, tmp_path: Path, suffix: str, runtime: str) -> None:
    pytest.importorskip(runtime)
    detector = exported(model)
    path = detector.folder / f"model.{suffix}"
    values = json.loads((detector.folder / "export.json").read_text())
    (detector.folder / "export.json").write_text(json.dumps({**values, "model": path.name}))
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=rf"model\.{suffix}: cannot be loaded") as error:
        deploy.Detector(detector.folder)
    assert "\n" not in str(error.value)


def test_what_is_no_image_and_what_are_no_names(exported, model: METR, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="found NoneType"):
        exported(model).detect(None)
    with pytest.raises(ValueError, match=r"names\.npz: no such file; names are in an \.npz"):
        exported(model, open_names=12, stored=tmp_path / "names.npz")


def test_its_command_says_what_is_in_each_image_and_goes_on_after_a_broken_one(
    exported, model: METR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = exported(model)
    (tmp_path / "broken.jpg").write_text("no image")
    missing, empty = tmp_path / "missing.jpg", tmp_path / "empty.png"
    Image.new("RGB", (50, 40)).save(empty)
    assert deploy.main([str(tmp_path), str(empty)]) == 1
    assert capsys.readouterr() == ("", f"error: {tmp_path}: expected a folder of metr export, found no export.json\n")
    monkeypatch.setattr(deploy, "Detector", lambda folder: detector)
    found = detector.predict([str(empty)])[0]
    for shown in (found, found.where(found.scores > 2)):
        monkeypatch.setattr(detector, "detect", lambda image, shown=shown: detector.predict([image]) and shown)
        assert deploy.main([str(tmp_path / "broken.jpg"), str(missing), str(empty)]) == 1
        out, errors = capsys.readouterr()
        assert len(out.splitlines()) == max(len(shown), 1)
        assert all(line.startswith(f"{empty}: ") for line in out.splitlines())
        assert ("nothing found" in out) == (not len(shown))
        assert [line.split(": ")[:2] for line in errors.splitlines()] == [
            ["error", str(tmp_path / "broken.jpg")],
            ["error", str(missing)],
        ]
    assert len(found)
    assert deploy.main([str(empty)]) == 0


def test_an_export_is_replaced_and_nothing_else(exported, model: METR, tmp_path: Path) -> None:
    exported(model)
    exported(model, ["leaf"])
    assert (tmp_path / "out" / "deploy.py").read_bytes() == Path(deploy.__file__).read_bytes()
    (tmp_path / "out" / "export.json").unlink()
    with pytest.raises(CheckpointError, match=r"not a folder with export\.json"):
        exported(model)


@pytest.mark.parametrize("shape", [(33, 47), (64, 64), (90, 31), (20, 200)])
@pytest.mark.parametrize("wanted", [(32, 32), (41, 29), (150, 120)])
def test_numpy_resizes_as_opencv_does(monkeypatch: pytest.MonkeyPatch, shape, wanted) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = resize_image(image, *wanted)
    assert np.array_equal(deploy._resized(image, *wanted, "area"), expected)
    monkeypatch.setitem(sys.modules, "cv2", None)
    error = np.abs(deploy._resized(image, *wanted, "area").astype(int) - expected)
    assert error.max() <= 1
    assert (error > 0).mean() < 0.2


def test_files_of_many_kinds_are_read_as_metr_reads_them(tmp_path: Path) -> None:
    from metr.data.images import read_image

    rng = np.random.default_rng(2)
    colour = Image.fromarray(rng.integers(0, 255, (9, 14, 4), dtype=np.uint8))
    grey = Image.fromarray(rng.integers(0, 60000, (9, 14), dtype=np.uint16))
    turned = Image.Exif()
    turned[274] = 6
    colour.save(tmp_path / "alpha.png")
    grey.save(tmp_path / "deep.png")
    colour.convert("P").save(tmp_path / "palette.png")
    colour.convert("RGB").save(tmp_path / "turned.jpg", exif=turned)
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg")
    for path in sorted(tmp_path.iterdir()):
        assert np.array_equal(deploy._rgb(path), read_image(path)), path.name


def test_thresholds_are_those_of_metr(exported, model: METR) -> None:
    shown = ScoreThresholds()
    description = exported(model).description
    assert (description["threshold"], description["same_place"]) == (shown.default, shown.same_place)
