"""What does an exported detector gain in speed, and lose in precision?

    python benchmarks/export.py --run checkpoints/metr-nano --data FOLDER

Exports a METR for ONNX Runtime and for OpenVINO, the latter also with 8-bit convolutions, and compares them with the
METR that they were made of, by its default question:

    AP        on the val splits of some of its datasets (`--sets`), 0 to 100, with all names that it looks for
    time      from an image's pixels in memory to detections, one image at a time, one thread; contenders take turns on
              every image, and each counts with its least time. Other work on the machine hits all of them: read ratios

Images of the training splits set the ranges of 8-bit numbers. Folders of models in `--work` are used again.

Results: `results/export-cpu.json` and `.md`.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

import report
import runner
from metr import deploy
from metr.config import Tree
from metr.data.images import exif_oriented, read_image
from metr.data.joint import JointData, open_joint
from metr.data.records import Annotations
from metr.evaluation.coco import evaluate_detections
from metr.export.export import export
from metr.export.request import ExportConfig
from metr.inference.predictor import Predictor
from metr.model import METR
from metr.structures import Detections

TORCH, INT8 = "torch", "openvino int8"
FORMATS = {"onnx": "onnx", "openvino": "openvino", INT8: "openvino"}
LOW = {"openvino bf16": "openvino", "openvino int8 bf16": INT8}
"""The same models in bfloat16, on processors that have it."""
LOST_BAR, INT8_LOST_BAR, SPEED_AIM = 0.1, 1.0, 2.2
Image = UInt8[np.ndarray, "h w 3"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a checkpoint or run folder")
    parser.add_argument("--data", type=Path, required=True, help="the folder of its datasets, one folder each")
    parser.add_argument("--sets", nargs="+", default=["bccd", "chess_pieces", "playing_cards"])
    parser.add_argument("--work", type=Path, default=Path("build/export"), help="where the exported models go")
    parser.add_argument("--ranges", type=int, default=90, help="images that set the ranges of 8-bit numbers")
    parser.add_argument("--rounds", type=int, default=20, help="times that each contender is timed")
    parser.add_argument("--most", type=int, default=0, help="images of each split that are scored; 0: all")
    given = vars(parser.parse_args(arguments))

    def work() -> bool:
        torch.set_num_threads(1)
        result = measure(given)
        report.write_result(given["results"] / "export-cpu", result, page(result))
        return True

    return runner.exit_status(work)


def measure(options: Mapping[str, Any]) -> Tree:
    """The result as the JSON file has it."""
    commit, model = runner.commit(), METR.from_pretrained(options["run"], device="cpu")
    joint = open_joint([f"{name}={options['data'] / name}" for name in options["sets"]])
    splits = {name: exif_oriented(one) for name, one in joint.evaluation().items()}
    folders = exported(model, options["work"], calibration(joint, options["ranges"]))
    predictor = model.predictor()
    detectors = {arm: deploy.Detector(folder, threads=1) for arm, folder in folders.items()}
    if multiplies_bf16():
        detectors |= {arm: deploy.Detector(folders[of], threads=1, bf16=True) for arm, of in LOW.items()}
    first = [read_image(one[0].path, one[0].source) for one in splits.values()]
    seconds = timed(contenders(predictor, detectors), first, options["rounds"])
    scores = {name: scored(predictor, detectors, one, options["most"]) for name, one in splits.items()}
    lost = {arm: max(one[TORCH]["ap"] - one[arm]["ap"] for one in scores.values()) for arm in detectors}
    speed = {arm: seconds[TORCH] / one for arm, one in seconds.items()}
    return {
        **runner.circumstances("export", commit, "cpu"),
        "settings": {
            **{key: options[key] for key in ("ranges", "rounds", "most")},
            "pixels": model.resize.size,
            "names": len(predictor.names),
            "steps": model.checkpoint.training.get("step"),
        },
        "seconds": seconds,
        "speed": speed,
        "sizes": {arm: sum(one.stat().st_size for one in folder.glob("model.*")) for arm, folder in folders.items()},
        "sets": scores,
        "bars": {
            arm: report.bar(lost[arm], LOST_BAR if arm in ("onnx", "openvino") else INT8_LOST_BAR) for arm in lost
        },
        "aim": report.aim("times as fast as torch", SPEED_AIM, max(speed.values())),
    }


def multiplies_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def exported(model: METR, work: Path, images: Sequence[Path]) -> dict[str, Path]:
    """The folder of each contender."""
    folders = {arm: work / arm.replace(" ", "-") for arm in FORMATS}
    for arm, folder in folders.items():
        if not (folder / deploy.DESCRIPTION).is_file():
            values: Any = {"format": FORMATS[arm], "int8": tuple(images) if arm == INT8 else ()}
            export(model, folder, config=ExportConfig(**values))
    return folders


def calibration(joint: JointData, number: int) -> list[Path]:
    """So many images of the training splits, the same number of each, evenly spread."""
    splits = [joint.train_split(source) for source in joint.sources]
    share = number // len(splits)
    return [one[index].path for one in splits for index in report.evenly_spread(len(one), share)]


def contenders(predictor: Predictor, detectors: Mapping[str, deploy.Detector]) -> dict[str, Callable[[Image], object]]:
    """What finds objects in an image."""

    def of(detector: deploy.Detector) -> Callable[[Image], object]:
        return lambda image: detector.predict([image])

    return {TORCH: predictor.detect, **{arm: of(detector) for arm, detector in detectors.items()}}


def timed(actions: Mapping[str, Callable[[Image], object]], images: Sequence[Image], rounds: int) -> dict[str, float]:
    """The least seconds of each; all take turns on every image."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 2):
        for name, action in actions.items():
            started = time.perf_counter()
            action(images[turn % len(images)])
            seconds[name].append(time.perf_counter() - started)
    return {name: min(one[2:]) for name, one in seconds.items()}


def scored(
    predictor: Predictor, detectors: Mapping[str, deploy.Detector], split: Annotations, most: int
) -> dict[str, Tree]:
    """AP of each contender on a split."""
    chosen = range(min(most or len(split), len(split)))
    found: dict[str, dict[int | str, Detections]] = {arm: {} for arm in (TORCH, *detectors)}
    for index in chosen:
        record = split[index]
        image = read_image(record.path, record.source)
        found[TORCH][record.image_id] = predictor.detect(image)
        for arm, detector in detectors.items():
            found[arm][record.image_id] = of_torch(detector.predict([image])[0])
    part = Part(split, chosen)
    return {arm: {"ap": evaluate_detections(part, one).ap, "images": len(chosen)} for arm, one in found.items()}


class Part:
    """The first images of a split."""

    def __init__(self, split: Annotations, chosen: range) -> None:
        self.name, self.split, self.format = split.name, split.split, split.format
        self.categories, self.issues = split.categories, split.issues
        self._whole, self._chosen = split, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Any:
        return self._whole[self._chosen[index]]


def of_torch(found: deploy.Detections) -> Detections:
    """The same as METR's own."""
    boxes, scores, labels = (torch.from_numpy(one) for one in (found.boxes, found.scores, found.labels))
    return Detections(boxes=boxes.float(), scores=scores.float(), labels=labels.long(), names=found.names)


def page(result: Mapping[str, Any]) -> str:
    """The page of a result."""
    settings, sets, aim = result["settings"], result["sets"], result["aim"]
    rows = []
    for arm, seconds in result["seconds"].items():
        scores = [f"{one[arm]['ap']:.2f}" for one in sets.values()]
        lost = result["bars"].get(arm)
        kept = "-" if lost is None else f"{lost['value']:.2f} ({report.bar_text(lost)})"
        size = f"{result['sizes'][arm] / 1e6:.1f}" if arm in result["sizes"] else "-"
        rows.append([arm, f"{1000 * seconds:.0f}", f"{result['speed'][arm]:.2f}", size, *scores, kept])
    images = ", ".join(f"{name} {next(iter(one.values()))['images']}" for name, one in sets.items())
    names = [f"AP {name}" for name in sets]
    head = ["", "ms an image", "times as fast", "MB", *names, "AP lost at most"]
    notes = [
        f"{report.facts(result)}. {settings['pixels']} pixels, {settings['names']} names, one thread; least of "
        f"{settings['rounds']} rounds that took turns. Val images: {images}.",
        f"8-bit ranges from {settings['ranges']} training images. "
        f"Fastest: {aim['found']:.2f} times torch (aim {aim['aim']}: {'' if aim['reached'] else 'not '}reached).",
    ]
    return report.joined("# Exported detectors", report.table(head, rows), "\n".join(notes))


if __name__ == "__main__":
    sys.exit(main())
