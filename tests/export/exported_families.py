"""Real exports: every family as ONNX, the other formats, and a process in which torch cannot be imported.

`test_exporters.py` runs this file in a process of its own.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export_cases import FAMILIES, FIT, STRETCH, assert_same, predictor_of
from scipy.optimize import linear_sum_assignment

from metr import deploy
from metr.export.export import export, write_names
from metr.export.graph import ExportedDetector, Interface, example_inputs, interface_of, padded_names
from metr.export.programs import exported_program, write_onnx
from metr.export.request import ExportConfig
from metr.model import METR
from metr.models.config import DetectorConfig

from small import adopted_config, small_config, softmax_config
from tiny import TinyRun

NANO = Path(__file__).resolve().parents[2] / "checkpoints" / "metr-nano"
WITHOUT_TORCH = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "pydantic", "cv2", "metr"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refused())
sys.path.insert(0, sys.argv[1])
import numpy, deploy
detector = deploy.Detector(sys.argv[1], threads=1)
for box, score, name in detector.detect(sys.argv[2], threshold=0.0):
    print(name, round(score, 3))
assert not {"torch", "metr", "cv2"} & set(sys.modules)
"""

# tracers take the sizes that annotations compare for constants: slow tests do not execute them
pytestmark = pytest.mark.slow


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, which is not installed here")


def given_to(interface: Interface, predictor) -> dict[str, torch.Tensor]:
    inputs = dict(zip(interface.inputs, example_inputs(interface, 3), strict=True))
    if interface.names is not None:
        rows = padded_names(predictor.text, predictor.limits.presence.tolist(), interface.names)
        inputs |= dict(zip(("text", "presence"), rows, strict=True))
    return inputs


def same_in_onnx(predictor, interface: Interface, path: Path) -> None:
    """The model on three images, exported with two, against the function itself."""
    import onnxruntime

    graph = ExportedDetector(predictor, interface).eval()
    write_onnx(exported_program(graph), interface, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = given_to(interface, predictor)
    with torch.inference_mode():
        expected = [one.numpy() for one in graph(*inputs.values())]
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    real = expected[1] >= 0
    assert np.array_equal(found[1] >= 0, real)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
    for image in range(len(real)):
        rows = real[image]
        same_boxes(*(tuple(one[image][rows] for one in outputs) for outputs in (found, expected)))


def same_boxes(found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> None:
    """Boxes, scores and labels of an image are those expected; scores that differ by rounding may change places."""
    boxes, scores, labels = (one[:, None] for one in found)
    distance = np.abs(boxes - expected[0]).max(-1)
    same = (distance <= 1e-4) & (np.abs(scores - expected[1]) <= 1e-4) & (labels == expected[2])
    taken = linear_sum_assignment(~same)
    assert same[taken].all(), f"{(~same[taken]).sum()} of {len(scores)} boxes have no counterpart"


def _on_efficientnet(config: DetectorConfig) -> DetectorConfig:
    return config.model_copy(update={"backbone": FAMILIES["efficientnet"].backbone})


# every part of a network in one of these, with fixed and free shapes, fixed and open names: an export takes a minute
EXPORTED = {
    "efficientnet, deformable, budget": (_on_efficientnet(small_config(encoder="deformable", layout="budget")), FIT),
    "hybrid, places, distribution": (adopted_config(decoder="distribution"), STRETCH),
    "plain, conditional, shared": (small_config(encoder="plain", layout="shared"), STRETCH),
    "projector": (FAMILIES["projector"], STRETCH),
    "softmax": (softmax_config(), STRETCH),
}


@pytest.mark.parametrize("family", EXPORTED)
def test_every_family_as_onnx(family, tmp_path: Path) -> None:
    needs("onnx", "onnxscript", "onnxruntime")
    config, resize = EXPORTED[family]
    blocks = {"blocks": 1}  # of equal layers one is enough: a converter takes its time for each operator
    config = config.model_copy(
        update={
            "categories": config.categories.model_copy(update=blocks),
            "decoder": config.decoder.model_copy(update={"layers": 1}),
        }
    )
    predictor = predictor_of(config, resize)
    interface = interface_of(predictor, "uint8") if resize == STRETCH else interface_of(predictor, "float32", 9)
    same_in_onnx(predictor, interface, tmp_path / "model.onnx")


def test_onnx_finds_what_metr_finds_and_without_torch(tiny_run: TinyRun, tmp_path: Path) -> None:
    needs("onnx", "onnxscript", "onnxruntime")
    model = METR.from_pretrained(tiny_run.folder, device="cpu")
    export(model, tmp_path / "out")
    detector = deploy.Detector(tmp_path / "out", threads=1)
    images = list(tiny_run.unseen)
    for found, expected in zip(detector.predict(images), model.predictor().detect_many(images), strict=True):
        assert_same(found, expected.detections, detector.names)
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "out"), str(images[0])]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == len(detector.detect(images[0], threshold=0.0))


def test_open_names_in_openvino(tiny_run: TinyRun, tmp_path: Path) -> None:
    needs("openvino", "nncf", "onnx", "onnxscript")
    model = METR.from_pretrained(tiny_run.folder, device="cpu")
    images = list(tiny_run.unseen)
    export(model, tmp_path / "out", config=ExportConfig(format="openvino", open_names=12))
    for names in (None, ["newt", "leaf"]):
        write_names(model, tmp_path / "names.npz", names)
        detector = deploy.Detector(tmp_path / "out", tmp_path / "names.npz", threads=1)
        for found, expected in zip(detector.predict(images), model.predictor(names).detect_many(images), strict=True):
            assert_same(found, expected.detections, detector.names)
    # in bfloat16, where this processor has it
    low = deploy.Detector(tmp_path / "out", tmp_path / "names.npz", threads=1, bf16=True)
    for found, expected in zip(low.predict(images), detector.predict(images), strict=True):
        assert abs(float(found.scores[0] - expected.scores[0])) < 0.05
    whole = (tmp_path / "out" / "model.bin").stat().st_size
    export(model, tmp_path / "int8", ["leaf"], config=ExportConfig(format="openvino", int8=(images[0].parent,)))
    small = deploy.Detector(tmp_path / "int8", threads=1)
    assert small.description["precision"] == "int8"
    assert (tmp_path / "int8" / "model.bin").stat().st_size < whole
    assert len(small.predict(images)[0]) > 5


def test_torch_runs_its_own_format(tiny_run: TinyRun, tmp_path: Path) -> None:
    model = METR.from_pretrained(tiny_run.folder, device="cpu")
    export(model, tmp_path / "out", config=ExportConfig(format="torch"))
    with pytest.raises(ValueError, match="runs in PyTorch"):
        deploy.Detector(tmp_path / "out")
    program = torch.export.load(str(tmp_path / "out" / "model.pt2")).module()

    def run(given):
        return [one.numpy() for one in program(torch.from_numpy(given["images"]))]

    images = list(tiny_run.unseen)
    detector = deploy.Detector(tmp_path / "out", run=run)
    for found, expected in zip(detector.predict(images), model.predictor().detect_many(images), strict=True):
        assert_same(found, expected.detections, detector.names)


def test_the_shipped_detector_on_real_images(shared: Path, tmp_path: Path) -> None:
    needs("onnx", "onnxscript", "onnxruntime")
    model = METR.from_pretrained(NANO, device="cpu")
    export(model, tmp_path / "out")
    detector = deploy.Detector(tmp_path / "out", threads=1)
    patterns = ("bccd/JPEGImages/*.jpg", "chess_pieces/test/*.jpg", "playing_cards/images/test/*", "coco_mini/**/*.jpg")
    images = [path for pattern in patterns for path in sorted((shared / "data").glob(pattern))[:3]]
    images = [path for path in images if path.suffix.lower() in {".jpg", ".jpeg", ".png"}]
    assert len(images) >= 6
    for found, expected in zip(detector.detect(images), model.detect(images), strict=True):
        assert_same(found, expected, detector.names)
